"""LoRA in an experiment file: a short run trains the adapters, and they alone."""

import pathlib

import jax
import numpy as np
import pytest

from dcmdp_jax import train_state
from dcmdp_jax.experiment import load_experiment, override
from dcmdp_jax.models import decoder
from support.steps import MODEL, MOE, make_params
from support.training import options, rows, saved, train

pytestmark = pytest.mark.full

FILE = str(pathlib.Path(__file__).parents[1] / "experiments" / "own_adapter.py")


@pytest.fixture(scope="module")
def experiment():
    changes = options(**{"steps": 2, "rollout.precision.weights": "float32"})
    return override(load_experiment(FILE), changes)


@pytest.fixture(scope="module")
def workdir(experiment, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    train(experiment, folder)
    return folder


@pytest.mark.parametrize("model", [MODEL, MOE], ids=["dense", "moe"])
def test_at_first_the_decoder_s_parameters_are_the_starting_ones(experiment, model):
    params = make_params(model)
    state = train_state.init(experiment, params)
    jax.tree.map(
        np.testing.assert_array_equal, train_state.policy_params(state, experiment), params
    )


@pytest.mark.parametrize("model", [MODEL, MOE], ids=["dense", "moe"])
def test_every_projection_has_an_adapter(experiment, model):
    adapters = train_state.init(experiment, make_params(model)).params
    assert len(adapters) == len(jax.tree.leaves(decoder.contracting_axes(model), is_leaf=is_axes))


def is_axes(leaf):
    return isinstance(leaf, tuple)


def test_all_adapters_are_trained(experiment, workdir):
    state, _ = saved(workdir, experiment)
    assert all(np.abs(pair["up"]).max() > 0 for pair in state.params.values())


def test_the_sampler_has_the_adapters(workdir):
    """A float32 engine that sampled from the frozen weights alone would show a gap."""
    assert len(rows(workdir)) == 2
    assert all(row["delta_mean"] < 1e-5 for row in rows(workdir))
