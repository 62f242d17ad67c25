"""A real vLLM on the CPU as the sampler: its log-probs are the trainer's, and a run trains through
it, a crash of the server included.
"""

import contextlib
import dataclasses
import itertools
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.engines import vllm_server
from dcmdp_jax.batches import make_sampler
from dcmdp_jax.experiment import override
from dcmdp_jax.models import decoder, weights
from dcmdp_jax.models.model_config import ModelConfig
from dcmdp_jax.records import Sampling
from dcmdp_jax.rollout import vllm
from dcmdp_jax.rollout.http_client import Call, Client, ServerError
from dcmdp_jax.rollout.server_sampler import Request
from dcmdp_jax.run.inputs import read_inputs
from dcmdp_jax.tools import parity
from support.random_params import random_params
from support.training import ONE_DEVICE, rows, tiny, train

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not vllm_server.PYTHON.exists(), reason=vllm_server.MISSING),
]

DENSE = ModelConfig(
    vocab_size=18,
    hidden_size=64,
    intermediate_size=96,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,  # vLLM's kernels for CPUs take no smaller one
)
EXPERTS = dataclasses.replace(DENSE, num_experts=8, experts_per_token=2, expert_size=64)
CLOSE = 1e-4  # nats, on every token
FLOAT32 = ("--dtype", "float32", "--enable-scale-out")


def sharp(model, seed=0):
    """Returns weights far from a uniform distribution, so that a wrong log-prob shows."""
    params = random_params(model, 0.2, norms=1.0)
    return jax.tree.map(lambda leaf: jnp.roll(leaf, seed, axis=-1), params)


def serve(folder, model, *options, port=0):
    """Starts a server with the weights of `sharp`, saved in `folder`."""
    if not (folder / "model").exists():
        weights.save(folder / "model", model, sharp(model), token_ids={"eos_token_id": 1})
    return vllm_server.Server(folder / "model", options, port, log=folder / "vllm.log")


@pytest.fixture(scope="module")
def float32(tmp_path_factory):
    """A server of the dense model; a test that ends it starts another in its place."""
    folder = tmp_path_factory.mktemp("float32")
    running = {"server": serve(folder, DENSE, *FLOAT32), "folder": folder}
    yield running
    running["server"].stop()


SMOLLM2 = vllm_server.REPOSITORY / "models" / "smollm2-135m"


@pytest.mark.skipif(
    not SMOLLM2.exists(),
    reason=f"{SMOLLM2} is missing; experiments/language/get_smollm2.sh makes it",
)
def test_a_language_model_in_float32_has_the_trainers_log_probs(tmp_path):
    experiment = SMOLLM2.parents[1] / "experiments" / "language" / "smollm2.py"
    with vllm_server.Server(SMOLLM2, ("--dtype", "float32"), log=tmp_path / "vllm.log") as running:
        run = override(
            vllm_server.config_of(experiment),
            {"rollout.server": running.url, "rollout.precision.weights": "float32"},
        )
        inputs = read_inputs(run, ONE_DEVICE)
        gap = parity.measure(run, inputs, parity.starting(run, inputs), 2).gaps["all"]
    assert gap.tokens > 300 and gap.logp_diff_max < CLOSE


def even(example, text):
    """A reward that random weights earn now and then."""
    return float(sum(map(ord, text)) % 2 == 0)


def run_of(url, model=DENSE, **changes):
    """Returns the tiny quickstart on `model`, sampled by the server at `url`."""
    run = tiny(**{"warmup.steps": 0, "rollout.server": url} | changes)
    return dataclasses.replace(
        run,
        model=dataclasses.replace(run.model, architecture=model),
        data=dataclasses.replace(run.data, verifier=even),
    )


def measured(run, params):
    """Returns what `dcmdp parity` finds at these weights."""
    inputs = read_inputs(run, ONE_DEVICE)
    return parity.measure(run, inputs, parity.TrainerWeights(params, 0, "random"), 4)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_float32_log_probs_are_the_trainers(float32, temperature):
    run = run_of(float32["server"].url, **{"rollout.temperature": temperature})
    gap = measured(run, sharp(DENSE)).gaps["all"]
    assert gap.tokens > 300 and gap.logp_diff_max < CLOSE


def test_new_weights_are_sampled_from_once_they_are_given(float32):
    run = run_of(float32["server"].url)
    inputs = read_inputs(run, ONE_DEVICE)
    sampler = make_sampler(run, inputs)
    score = parity.scorer(run, inputs)
    for version in range(3):
        params = sharp(DENSE, version)
        sampler.update_weights(params, version)
        rollout = parity.sample(sampler, run, inputs, seed=version)
        mask = parity.token_mask(rollout)
        gaps = [
            np.abs(score(sharp(DENSE, other), rollout, 0) - rollout.rollout_logp)[mask].max()
            for other in range(3)
        ]
        assert np.all(rollout.version == version)
        assert [gap < CLOSE for gap in gaps] == [other == version for other in range(3)]


def test_completions_go_on_with_weights_that_come_in_flight(float32, monkeypatch):
    """Each token has the log-prob of the weights that it is said to come from, with which all
    tokens before it are computed again.
    """
    run = run_of(
        float32["server"].url,
        **{"rollout.staleness": 1, "rollout.in_flight": True, "rollout.samples": 64},
    )
    inputs = read_inputs(run, ONE_DEVICE)
    make = vllm.vllm(run.rollout.server, connections=32)
    sampler = make(run, inputs.model_config, inputs.tokenizer, inputs.decode_mesh)
    sampler.update_weights(sharp(DENSE, 0), 0)
    read = vllm.InFlight.read
    answered = itertools.count(1)
    with contextlib.ExitStack() as coming:

        def come_after_the_64th(self, reply, request):
            if next(answered) == 64:
                new = sharp(DENSE, 1)
                coming.enter_context(sampler.in_flight(new, lambda: new, 1))
            return read(self, reply, request)

        monkeypatch.setattr(vllm.InFlight, "read", come_after_the_64th)
        rollout = parity.sample(sampler, run, inputs, seed=0)
    mask = parity.token_mask(rollout)
    score = parity.scorer(run, inputs)
    gaps = [np.abs(score(sharp(DENSE, v), rollout, 0) - rollout.rollout_logp) for v in range(2)]
    for version in range(2):
        sampled = mask & (rollout.version == version)
        assert sampled.sum() > 20
        assert gaps[version][sampled].max() < CLOSE and gaps[1 - version][sampled].max() > 0.1
    mixed = [set(row[kept]) == {0, 1} for row, kept in zip(rollout.version, mask)]
    print(f"{sum(mixed)} of {len(mixed)} completions have tokens of both")
    assert any(mixed)


def test_a_run_with_weights_in_flight_has_no_gap(float32, tmp_path):
    run = run_of(
        float32["server"].url,
        **{"steps": 6, "rollout.staleness": 1, "rollout.in_flight": True, "rollout.samples": 32},
    )
    train(run, tmp_path)
    found = rows(tmp_path)
    print("on policy:", [round(row["on_policy_share"], 2) for row in found])
    assert any(0 < row["on_policy_share"] < 1 for row in found[1:])
    assert all(row["delta_mean"] < 1e-5 for row in found)


def sampled(url, prompts, seeds):
    """Returns the server's completion of each prompt, of at most 24 tokens."""
    client = Client(url, "vLLM")
    server = vllm.Server(client)
    requests = [Request(p, 24, Sampling(), (1,), (), seed) for p, seed in zip(prompts, seeds)]
    calls = [Call("POST", server.path, server.body(request)) for request in requests]
    return client.send(calls, lambda reply, number: server.read(reply, requests[number]))


def test_a_completion_depends_on_its_seed_alone(float32):
    """Not on the others of its batch, nor on their number."""
    url = float32["server"].url
    many = [reply.tokens for reply in sampled(url, [[3, 9]] * 32, range(32))]
    long = [tuple(tokens) for tokens in many if len(tokens) > 8]
    assert len(set(long)) == len(long) > 8
    few = [reply.tokens for reply in sampled(url, [[3, 9]] * 2, (30, 2))]
    assert few == [many[30], many[2]]


@pytest.fixture(scope="module")
def ten_steps(float32, tmp_path_factory):
    """The rows of a run of ten steps."""
    workdir = tmp_path_factory.mktemp("run")
    train(run_of(float32["server"].url, **{"steps": 10, "eval.every": 5}), workdir)
    return rows(workdir)


def test_a_run_of_ten_steps_trains_without_a_gap(ten_steps):
    assert [row["step"] for row in ten_steps] == list(range(1, 11))
    assert all(row["grad_norm"] > 0 and row["delta_mean"] < 1e-5 for row in ten_steps)


def test_the_served_policy_is_evaluated_on_held_out_problems(ten_steps):
    evaluated = [row["step"] for row in ten_steps if "reward_eval_infer" in row]
    assert evaluated == [1, 5, 10]


def test_a_run_outlives_a_crash_of_the_server(float32, ten_steps, tmp_path):
    """It is killed after the third step, and started again with the weights of its folder."""
    killed = float32["server"]

    def restart():
        log = tmp_path / "run" / "metrics.jsonl"
        deadline = time.monotonic() + 300
        while not (log.exists() and len(log.read_text().splitlines()) >= 3):
            assert time.monotonic() < deadline, "the run has not written 3 rows in 300 s"
            time.sleep(0.01)
        killed.stop()
        float32["server"] = serve(float32["folder"], DENSE, *FLOAT32, port=killed.port)

    run = run_of(float32["server"].url, **{"steps": 10, "eval.every": 5})
    crash = threading.Thread(target=restart, daemon=True)
    crash.start()
    train(run, tmp_path / "run")
    crash.join(timeout=300)
    assert not crash.is_alive(), "the server was not started again in 300 s"
    assert float32["server"] is not killed, "the server was not killed, or not started again"
    found = rows(tmp_path / "run")
    assert [row["step"] for row in found] == list(range(1, 11))
    for row, undisturbed in zip(found, ten_steps, strict=True):
        assert row["delta_mean"] < 1e-5  # no token of the weights that the server began with
        for name in ("reward", "response_length"):
            assert row[name] == undisturbed[name]


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    """A server of the Mixture-of-Experts."""
    with serve(tmp_path_factory.mktemp("experts"), EXPERTS, "--dtype", "float32") as running:
        yield running


def test_a_mixture_of_experts_in_float32_has_the_trainers_log_probs(experts):
    """At the weights that the server starts with."""
    params = sharp(EXPERTS)
    forward = jax.jit(lambda tokens: decoder.logits(params, tokens, EXPERTS))
    prompts = np.random.default_rng(0).integers(2, 18, (16, 6)).tolist()
    completions = sampled(experts.url, prompts, seeds=range(16))
    for prompt, reply in zip(prompts, completions, strict=True):
        row = np.zeros((1, 30), np.int32)
        row[0, : 6 + len(reply.tokens)] = prompt + reply.tokens
        logp = np.asarray(jax.nn.log_softmax(forward(row)[0]))
        want = logp[5 + np.arange(len(reply.tokens)), reply.tokens]
        np.testing.assert_allclose(reply.logp, want, atol=CLOSE, rtol=0)
    assert sum(len(reply.tokens) for reply in completions) > 100


def test_experts_that_this_vllm_loads_later_on_a_cpu_are_refused(experts):
    """It does not repack them for its kernel, and samples from another model than it was given."""
    with pytest.raises(ServerError, match="^vLLM at .*"):
        measured(run_of(experts.url, EXPERTS), sharp(EXPERTS))


def test_bfloat16_has_a_gap(tmp_path):
    with serve(tmp_path, DENSE, "--dtype", "bfloat16") as running:
        found = measured(run_of(running.url), sharp(DENSE))
    print(parity.table(found))
    assert found.dropped == 0
    assert 1e-4 < found.gaps["all"].delta < 0.05
    assert CLOSE < found.gaps["all"].logp_diff_max < 1.0
