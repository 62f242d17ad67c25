"""The probe of a server's log-probs: what is told apart, and what ends a run before it samples."""

import jax
import numpy as np
import pytest

from dcmdp_jax.records import Sampling
from dcmdp_jax.rollout import log_prob_scorer, server_probe, vllm
from dcmdp_jax.rollout.http_client import ServerError
from dcmdp_jax.rollout.llama_cpp import llama_cpp
from support.servers import MODEL, TOKENIZER, LlamaCpp, StandIn, Vllm, make_params
from support.training import tiny

pytestmark = pytest.mark.full


def update(server, temperature=1.0, make=vllm.vllm):
    run = tiny(**{"rollout.temperature": temperature})
    sampler = make(server.url)(run, MODEL, TOKENIZER, None)
    sampler.update_weights(make_params(), 0)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_a_server_that_computes_as_the_trainer_is_as_stated(temperature, capsys):
    with StandIn(Vllm) as server:
        update(server, temperature)
    assert "as stated: the gap is numerical, of the size of float32" in capsys.readouterr().err


def test_log_probs_from_before_the_temperature_are_refused():
    with StandIn(Vllm) as server:
        server.raw = True
        with pytest.raises(ServerError, match="are raw, .* --logprobs-mode processed_logprobs"):
            update(server, 0.6)


def test_at_temperature_1_they_are_the_same(capsys):
    with StandIn(Vllm) as server:
        server.raw = True
        update(server)
    assert "as stated" in capsys.readouterr().err


def test_a_cut_by_the_servers_own_defaults_is_refused():
    with StandIn(Vllm) as server:
        server.top_k = 20
        with pytest.raises(ServerError, match="renormalised over a cut support"):
            update(server)


def test_other_weights_than_those_that_were_given_are_refused(monkeypatch):
    monkeypatch.setattr(StandIn, "load", lambda server, folder: None)
    with (
        StandIn(Vllm, params=make_params(1)) as server,
        pytest.raises(
            ServerError, match="has other weights.*in 4 bits.*no option skips this check"
        ),
    ):
        update(server)


def test_a_replica_with_other_weights_is_refused(monkeypatch):
    """One of three behind the same address has missed the update."""
    stale = StandIn(Vllm, params=make_params(1))
    complete = Vllm.complete

    def one_of_three(server, body):
        return complete(stale if body["seed"] % 3 == 0 else server, body)

    monkeypatch.setattr(Vllm, "complete", one_of_three)
    said = r"\d+ of \d+ completions have other weights"
    with StandIn(Vllm) as server, pytest.raises(ServerError, match=said):
        update(server)


def test_another_gguf_file_is_refused():
    with (
        StandIn(LlamaCpp, params=make_params(1)) as server,
        pytest.raises(ServerError, match="has other weights"),
    ):
        update(server, make=llama_cpp)


def test_it_is_asked_once():
    with StandIn(Vllm) as server:
        sampler = vllm.vllm(server.url)(tiny(), MODEL, TOKENIZER, None)
        for version in range(3):
            sampler.update_weights(make_params(), version)
        assert len(server.asked) == server_probe.COUNTS[0]


@pytest.mark.slow
def test_more_is_asked_for_where_there_are_too_few_tokens(monkeypatch):
    monkeypatch.setattr(server_probe, "TOKENS", 1)
    monkeypatch.setattr(StandIn, "load", lambda server, folder: None)
    with StandIn(Vllm, params=make_params(1)) as server:
        with pytest.raises(ServerError, match="has other weights"):
            update(server)
        assert len(server.asked) == sum(server_probe.COUNTS)


def test_log_probs_that_the_server_does_not_know_leave_nothing_to_tell(monkeypatch, capsys):
    """All but a few: the run goes on, and says so."""
    complete = Vllm.complete

    def forgetful(server, body):
        reply = complete(server, body)
        (choice,) = reply["choices"]
        known = body["seed"] % 16 == 1
        logp = choice["logprobs"]["token_logprobs"]
        choice["logprobs"]["token_logprobs"] = [logp[0] if known else None] + [None] * len(logp[1:])
        return reply

    monkeypatch.setattr(Vllm, "complete", forgetful)
    with StandIn(Vllm) as server:
        update(server)
    assert "tokens with a log-prob are too few to tell" in capsys.readouterr().err


def test_prompts_hold_no_stop_token():
    prompts = server_probe.prompts(5, (1, 3), 16)
    assert {id for prompt in prompts for id in prompt} == {0, 2, 4}


def test_log_probs_of_parameters_split_over_devices_are_the_same():
    prompts = server_probe.prompts(MODEL.vocab_size, (1,), 16)
    tokens = np.random.default_rng(0).integers(0, MODEL.vocab_size, (16, 12)).tolist()
    samplings = log_prob_scorer.fields([Sampling(), Sampling(0.7)])
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("tensor",))

    def split(leaf):
        axes = ["tensor" if leaf.ndim and leaf.shape[-1] % 2 == 0 else None]
        spec = jax.sharding.PartitionSpec(*[None] * (leaf.ndim - 1), *axes)
        return jax.device_put(leaf, jax.sharding.NamedSharding(mesh, spec))

    whole = server_probe.scorer(make_params(), MODEL)(prompts, tokens, samplings)
    parts = server_probe.scorer(jax.tree.map(split, make_params()), MODEL)
    np.testing.assert_allclose(parts(prompts, tokens, samplings), whole, atol=1e-5)


def test_log_probs_are_those_that_recorded_completions_are_judged_by():
    prompts = server_probe.prompts(MODEL.vocab_size, (1,), 16)
    tokens = np.random.default_rng(0).integers(0, MODEL.vocab_size, (16, 12)).tolist()
    tokens[3] = tokens[3][:2]
    samplings = log_prob_scorer.fields([Sampling(), Sampling(0.7)])
    expected = log_prob_scorer.scorer(make_params(), MODEL)(prompts, tokens, samplings)
    found = server_probe.scorer(make_params(), MODEL)(prompts, tokens, samplings)
    np.testing.assert_allclose(found, expected, atol=1e-5)
