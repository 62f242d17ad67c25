"""A real llama.cpp server on the CPU as the sampler: its log-probs are the trainer's."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from benchmarks.engines import llama_cpp_server
from dcmdp_jax.models import weights
from dcmdp_jax.models.model_config import ModelConfig
from dcmdp_jax.rollout.http_client import ServerError
from dcmdp_jax.run.inputs import read_inputs
from dcmdp_jax.tools import parity
from support.random_params import random_params
from support.training import ONE_DEVICE, tiny

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not llama_cpp_server.PYTHON.exists(), reason=llama_cpp_server.MISSING),
]

DENSE = ModelConfig(
    vocab_size=18,
    hidden_size=64,
    intermediate_size=96,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
)
CLOSE = 1e-4  # nats, on every token


def serve(folder, *options):
    """Starts a server with weights far from a uniform distribution."""
    weights.save(folder / "model", DENSE, sharp(), token_ids={"eos_token_id": 1})
    return llama_cpp_server.Server(folder / "model", options, log=folder / "llama_cpp.log")


def sharp(seed=0):
    params = random_params(DENSE, 0.2, norms=1.0)
    return jax.tree.map(lambda leaf: jnp.roll(leaf, seed, axis=-1), params)


@pytest.fixture(scope="module")
def float32(tmp_path_factory):
    with serve(tmp_path_factory.mktemp("float32")) as running:
        yield running


def run_of(url, **changes):
    """Returns the tiny quickstart on the served model."""
    run = tiny(**{"warmup.steps": 0, "rollout.server": url} | changes)
    return dataclasses.replace(run, model=dataclasses.replace(run.model, architecture=DENSE))


def measured(run, params):
    """Returns what `dcmdp parity` finds at these weights."""
    inputs = read_inputs(run, ONE_DEVICE)
    return parity.measure(run, inputs, parity.TrainerWeights(params, 0, "random"), 4)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_float32_log_probs_are_the_trainers(float32, temperature):
    found = measured(run_of(float32.url, **{"rollout.temperature": temperature}), sharp())
    assert found.dropped == 0
    assert found.gaps["all"].tokens > 300 and found.gaps["all"].logp_diff_max < CLOSE


def test_other_weights_than_the_servers_are_refused(float32):
    with pytest.raises(ServerError, match="^llama.cpp at .* other weights"):
        measured(run_of(float32.url), sharp(seed=1))


def test_another_folder_is_served_once_it_is_named(float32, tmp_path):
    weights.save(tmp_path / "model", DENSE, sharp(seed=1), token_ids={"eos_token_id": 1})
    before = llama_cpp_server.served_folder(float32.url)
    float32.serve(tmp_path / "model")
    gap = measured(run_of(float32.url), sharp(seed=1)).gaps["all"]
    float32.serve(before)
    assert gap.logp_diff_max < CLOSE


def test_int8_weights_have_a_gap(tmp_path):
    with serve(tmp_path, "--weights", "Q8_0") as running:
        found = measured(run_of(running.url), sharp())
    print(parity.table(found))
    assert 1e-4 < found.gaps["all"].delta < 0.05
