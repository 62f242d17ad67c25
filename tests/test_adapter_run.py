"""A run that trains adapters near a reference that follows it, with an entropy target: sampled,
resumed and exported.
"""

import dataclasses

import jax
import numpy as np
import optax
import pytest

from dcmdp_jax import reference
from dcmdp_jax.losses import kl
from dcmdp_jax.models import weights
from dcmdp_jax.run.export import export
from support.adapters import adapted
from support.training import assert_same_run, rows, saved, tiny, train

pytestmark = pytest.mark.full


def run_of(steps, **changes):
    run = adapted(tiny(steps=steps, **changes))
    algorithm = dataclasses.replace(
        run.algorithm,
        reference_penalty=kl.k3,
        reference_update=reference.ema(0.9),
        entropy_target=0.5,
        schedule=optax.cosine_decay_schedule(1.0, 10),
    )
    return dataclasses.replace(run, algorithm=algorithm)


def test_resumed_equals_uninterrupted(tmp_path):
    train(run_of(4), tmp_path / "whole")
    train(run_of(2), tmp_path / "parts")
    train(run_of(4), tmp_path / "parts")
    assert_same_run(tmp_path / "whole", tmp_path / "parts", run_of(4))


def test_the_sampler_has_the_scored_weights(tmp_path):
    """A float32 engine that sampled from the frozen weights alone would show a gap."""
    train(run_of(3, **{"rollout.precision.weights": "float32"}), tmp_path)
    assert all(row["delta_mean"] < 1e-5 for row in rows(tmp_path))


def test_the_export_is_the_frozen_weights_and_the_adapters(tmp_path):
    run = run_of(2)
    train(run, tmp_path / "run")
    state, _ = saved(tmp_path / "run", run)
    export(run, tmp_path / "run", str(tmp_path / "model"))
    _, exported = weights.load(str(tmp_path / "model"))
    assert np.abs(state.params["up"]).max() > 0
    expected = state.frozen["embed"] + state.params["down"] @ state.params["up"]
    np.testing.assert_allclose(exported["embed"], expected, atol=1e-6)
    rest = jax.tree.map(np.asarray, dict(state.frozen) | {"embed": 0})
    jax.tree.map(np.testing.assert_array_equal, dict(exported) | {"embed": 0}, rest)
