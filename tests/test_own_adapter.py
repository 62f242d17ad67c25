"""An adapter in an experiment file: a short run trains the scales of norms, and they alone."""

import pathlib

import jax
import numpy as np
import pytest

from dcmdp_jax import train_state
from dcmdp_jax.experiment import load_experiment, override
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


def test_the_scales_of_norms_alone_are_trained(experiment, workdir):
    state, _ = saved(workdir, experiment)
    before = train_state.divide(experiment, state.frozen)[0]
    assert len(before) == 5  # final, input and post-attention, and those of queries and keys
    assert all(np.abs(state.params[name] - before[name]).max() > 0 for name in before)


def test_the_sampler_has_the_scales(workdir):
    """A float32 engine that sampled from the frozen weights alone would show a gap."""
    assert len(rows(workdir)) == 2
    assert all(row["delta_mean"] < 1e-5 for row in rows(workdir))
