"""The samplers of vLLM, SGLang and llama.cpp, against stand-ins that answer from the decoder."""

import dataclasses
import os
import signal
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcmdp_jax import stopping
from dcmdp_jax.models import weights
from dcmdp_jax.records import NotFinite, Prompts, Sampling
from dcmdp_jax.rollout import llama_cpp, server_probe, server_sampler, servers, sglang, vllm
from dcmdp_jax.rollout.http_client import BadReply, ServerError
from dcmdp_jax.tokens import tokenizer
from dcmdp_jax.tools import complete
from support.sampling_servers import (
    ALL,
    KINDS,
    PROMPTS,
    SAMPLES,
    forward_logp,
    make,
    sample,
)
from support.servers import (
    MODEL,
    POSITIONS,
    TOKENIZER,
    LlamaCpp,
    Sglang,
    StandIn,
    Vllm,
    logits_of,
    make_params,
    once,
    replaced,
)
from support.training import tiny

pytestmark = pytest.mark.full


@pytest.fixture(scope="module", params=ALL)
def served(request):
    """A kind, its stand-in and a sampler with the weights that the stand-in was started with."""
    with StandIn(ALL[request.param][0]) as server:
        yield request.param, server, make(request.param, server)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_are_those_of_the_forward_pass(served, temperature):
    rollout = sample(served[2], sampling=Sampling(temperature))
    np.testing.assert_allclose(
        rollout.rollout_logp, forward_logp(rollout, temperature=temperature), atol=1e-5
    )


def test_the_stop_token_is_part_of_the_completion_and_has_its_log_prob(served):
    rollout = sample(served[2])
    ended = np.flatnonzero(rollout.stopped)
    assert len(ended)
    last = rollout.lengths[ended] - 1
    assert (rollout.tokens[ended, last] == 1).all()
    assert (rollout.rollout_logp[ended, last] < 0).all()
    np.testing.assert_array_equal(rollout.text_lengths[ended], last)


def test_completions_that_do_not_stop_are_as_long_as_may_be(served):
    rollout = sample(served[2])
    running = ~rollout.stopped
    assert running.any()
    assert (rollout.lengths[running] == 20).all() and (rollout.text_lengths[running] == 20).all()


def test_a_rollout_repeats(served):
    first = sample(served[2])
    again = sample(served[2])
    np.testing.assert_array_equal(first.tokens, again.tokens)
    np.testing.assert_array_equal(first.rollout_logp, again.rollout_logp)


def test_a_completion_depends_on_its_number_alone(served):
    batch = sample(served[2])
    part = Prompts(PROMPTS.tokens[1:], PROMPTS.lengths[1:], ())
    rest = sample(served[2], prompts=part, offset=SAMPLES)
    np.testing.assert_array_equal(rest.tokens, batch.tokens[SAMPLES:])


def test_completions_of_a_prompt_and_of_another_seed_differ(served):
    one = sample(served[2])
    two = sample(served[2], seed=6)
    long = [
        tuple(row) for rollout in (one, two) for row in rollout.tokens[rollout.lengths > 3].tolist()
    ]
    assert len(long) > 3 * SAMPLES and len(set(long)) == len(long)


def test_a_stop_string_ends_a_completion_at_the_token_that_completes_it(served):
    whole = sample(served[2])
    text = TOKENIZER.decode(whole.tokens[0, :20])
    stop = text[4:6]
    cut = sample(served[2], stop_strings=(stop,))
    end = text.index(stop) + 2
    assert cut.stopped[0] and cut.lengths[0] == cut.text_lengths[0] == end
    np.testing.assert_array_equal(cut.tokens[0, :end], whole.tokens[0, :end])
    assert not cut.tokens[0, end:].any() and not cut.rollout_logp[0, end:].any()


def test_few_requests_are_under_way_at_once():
    with StandIn(Vllm) as server:
        sample(make("vllm", server, connections=2))
        assert server.most_at_once <= 2


def test_samples_are_in_the_order_of_their_requests_whatever_the_order_of_the_answers():
    def later_first(handler, number):
        time.sleep(0.02 * (12 - number))
        return False

    with StandIn(Vllm) as server:
        sampler = make("vllm", server)
        expected = sample(sampler)
        server.asked.clear()
        server.faults.append(later_first)
        np.testing.assert_array_equal(sample(sampler).tokens, expected.tokens)


# Weights


@pytest.mark.parametrize("kind", KINDS)
def test_samples_come_from_the_weights_of_the_last_update(kind):
    with StandIn(KINDS[kind][0]) as server:
        sampler = make(kind, server)
        sampler.update_weights(make_params(1), 7)
        rollout = sample(sampler)
        assert (rollout.version == 7).all()
        np.testing.assert_allclose(rollout.rollout_logp, forward_logp(rollout, 1), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_folder_holds_the_last_weights_alone(kind, tmp_path):
    left = tmp_path / "dcmdp-weights-0123abcd-4"
    left.mkdir()
    (tmp_path / ".dcmdp-weights-0123abcd-5.77").mkdir()
    (tmp_path / "mine").mkdir()
    with StandIn(KINDS[kind][0]) as server:
        sampler = make(kind, server, weights_folder=str(tmp_path))
        sampler.update_weights(make_params(1), 1)
        assert sorted(path.name for path in tmp_path.iterdir()) == [server.loaded[-1], "mine"]
        assert len(set(server.loaded)) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_that_the_server_does_not_see_is_named(kind, monkeypatch):
    with StandIn(KINDS[kind][0]) as server:
        sampler = make(kind, server)
        monkeypatch.setattr(
            server, "load", lambda folder: StandIn.load(server, f"/its/own/disk{folder}")
        )
        with pytest.raises(ServerError, match="dcmdp-weights-.*(does not exist|weights_folder)"):
            sampler.update_weights(make_params(1), 1)
        assert not server.paused
        with pytest.raises(ValueError, match="has no weights"):
            sample(sampler)


@pytest.mark.parametrize("kind", ALL)
def test_weights_that_are_not_finite_are_not_sent(kind):
    with StandIn(ALL[kind][0]) as server:
        sampler = make(kind, server)
        loaded = len(server.loaded)
        with pytest.raises(NotFinite):
            sampler.update_weights(make_params() | {"embed": make_params()["embed"] * jnp.nan}, 1)
        assert len(server.loaded) == loaded


@pytest.mark.parametrize("kind", KINDS)
def test_a_server_that_restarts_between_batches_is_given_the_weights_again(kind, capsys):
    with StandIn(KINDS[kind][0]) as server:
        sampler = make(kind, server, version=1)
        expected = sample(sampler)
        server.restart()
        again = sample(sampler)
        np.testing.assert_array_equal(again.tokens, expected.tokens)
        np.testing.assert_array_equal(again.rollout_logp, expected.rollout_logp)
        assert "has weights 'default' instead of" in capsys.readouterr().err


@pytest.mark.parametrize("kind", KINDS)
def test_a_server_that_restarts_in_a_batch_leaves_no_sample_of_other_weights(kind):
    with StandIn(KINDS[kind][0]) as server:
        sampler = make(kind, server, version=1, connections=1)
        expected = sample(sampler)
        start = len(server.asked)
        server.faults.append(lambda handler, number: number == start + 6 and server.restart())
        again = sample(sampler)
        np.testing.assert_array_equal(again.tokens, expected.tokens)
        np.testing.assert_allclose(again.rollout_logp, forward_logp(again, 1), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_server_that_always_restarts_ends_the_run(kind):
    with StandIn(KINDS[kind][0]) as server:
        sampler = make(kind, server, version=1)
        server.faults.append(lambda handler, number: server.restart())
        with pytest.raises(ServerError, match="other weights than it was given 3 times"):
            sample(sampler)


LAST = {"vllm": "/reset_prefix_cache", "sglang": "/continue_generation"}  # after a load


@pytest.mark.parametrize("kind", KINDS)
def test_a_server_that_restarts_once_it_has_loaded_is_given_the_weights_again(kind):
    class Restarting(KINDS[kind][0]):
        def control(server, method, path, body):
            if path == LAST[kind] and len(server.loaded) == 2:
                server.restart()
            return KINDS[kind][0].control(server, method, path, body)

    with StandIn(Restarting) as server:
        sampler = make(kind, server)
        sampler.update_weights(make_params(1), 1)
        assert len(server.loaded) == 3
        rollout = sample(sampler)
        np.testing.assert_allclose(rollout.rollout_logp, forward_logp(rollout, 1), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_server_that_restarts_after_each_load_ends_the_run(kind):
    class Restarting(KINDS[kind][0]):
        def control(server, method, path, body):
            if path == LAST[kind]:
                server.restart()
            return KINDS[kind][0].control(server, method, path, body)

    with StandIn(Restarting) as server:
        with pytest.raises(ServerError, match="was given weights 3 times, and had others each"):
            make(kind, server)
        assert not server.asked


READS = {"vllm": "/collective_rpc", "sglang": "/update_weights_from_disk"}


def hanging(kind, gate, at=lambda server: True):
    """A kind of server that does not answer a load until `gate` is set."""

    class Hanging(KINDS[kind][0]):
        def control(server, method, path, body):
            if path == READS[kind] and at(server):
                gate.wait(60)
            return KINDS[kind][0].control(server, method, path, body)

    return Hanging


@pytest.mark.parametrize("kind", KINDS)
def test_a_load_that_times_out_is_not_begun_again(kind):
    gate = threading.Event()
    with StandIn(hanging(kind, gate)) as server:
        with pytest.raises(ServerError, match=f"does not answer POST {READS[kind]} within 3 s"):
            make(kind, server, timeout=3.0)
        assert server.paths.count(READS[kind]) == 1
        gate.set()


def interrupt(server):
    os.kill(os.getpid(), signal.SIGINT)
    return True


@pytest.mark.parametrize("kind", KINDS)
def test_a_signal_ends_the_wait_for_a_load(kind, monkeypatch):
    monkeypatch.setattr(server_sampler, "STOP_SECONDS", 0.0)
    gate = threading.Event()
    with StandIn(hanging(kind, gate, interrupt)) as server, stopping.requests():
        with pytest.raises(stopping.Interrupted, match="while .* was given weights"):
            make(kind, server)
        gate.set()


def test_a_signal_ends_the_wait_for_the_probe(monkeypatch):
    monkeypatch.setattr(server_sampler, "STOP_SECONDS", 0.0)
    gate = threading.Event()
    with StandIn(Vllm) as server, stopping.requests():
        server.faults.append(lambda handler, number: interrupt(server) and not gate.wait(60))
        with pytest.raises(stopping.Interrupted, match="while .* was given weights"):
            make("vllm", server, connections=1)
        gate.set()


def test_a_load_that_ends_soon_after_a_signal_is_not_given_up():
    gate = threading.Event()
    gate.set()
    with StandIn(hanging("vllm", gate, interrupt)) as server, stopping.requests() as stop:
        assert (sample(make("vllm", server)).version == 0).all() and stop()


def test_llama_cpp_takes_no_new_weights():
    with StandIn(LlamaCpp) as server:
        sampler = make("llama_cpp", server)
        with pytest.raises(ServerError, match="takes no new weights while it runs"):
            sampler.update_weights(make_params(), 1)


def test_llama_cpp_serves_a_run_that_learns_nothing():
    with StandIn(LlamaCpp) as server:
        sampler = make("llama_cpp", server, run=tiny(**{"algorithm.learning_rate": 0}))
        sampler.update_weights(make_params(), 1)
        assert (sample(sampler).version == 1).all()


# Replies


def test_a_server_that_stops_at_a_token_of_its_own_is_refused():
    with StandIn(Sglang, stop_ids=(1, 5, 6, 7, 8, 9)) as server:
        sampler = make("sglang", server)
        with pytest.raises(ServerError, match="by a token or a text that is in none"):
            sample(sampler)


def test_a_server_with_a_short_context_is_refused():
    def shorten(reply):
        choice = reply["choices"][0]
        choice["token_ids"] = [9]  # no stop token
        choice["logprobs"]["token_logprobs"] = choice["logprobs"]["token_logprobs"][:1]
        choice["finish_reason"] = "length"

    with StandIn(Vllm) as server:
        sampler = make("vllm", server)
        server.faults.append(once(len(server.asked))(replaced(shorten)))
        with pytest.raises(ServerError, match="after 1 of 20 tokens at no stop token"):
            sample(sampler)


def test_tokens_past_a_stop_token_are_left_out():
    with StandIn(LlamaCpp, stop_ids=()) as server:  # its file names no stop token
        rollout = sample(make("llama_cpp", server))
        assert rollout.stopped.any()
        np.testing.assert_allclose(rollout.rollout_logp, forward_logp(rollout), atol=1e-5)


def test_a_log_prob_that_the_server_does_not_know_is_not_made_up():
    def forget(reply):
        reply["choices"][0]["logprobs"]["token_logprobs"][1] = None

    with StandIn(Vllm) as server:
        sampler = make("vllm", server)
        whole = sample(sampler)
        server.faults.append(once(len(server.asked))(replaced(forget)))
        rollout = sample(sampler, prompts=PROMPTS)
        unknown = np.argwhere(~np.isfinite(rollout.rollout_logp))
        assert len(unknown) == 1 and unknown[0, 1] == 1
        rollout.rollout_logp[tuple(unknown[0])] = whole.rollout_logp[tuple(unknown[0])]
        np.testing.assert_array_equal(rollout.rollout_logp, whole.rollout_logp)


def test_llama_cpps_missing_log_probs_are_found_by_their_ids():
    tokens = [3, 4, 4, 5, 6]
    assert llama_cpp.aligned(tokens, [(3, -1.0), (5, -2.0), (6, -3.0)]) == [
        -1.0,
        None,
        None,
        -2.0,
        -3.0,
    ]


def test_llama_cpps_log_probs_that_may_be_of_one_token_or_another_are_left_out():
    assert llama_cpp.aligned([3, 4, 4], [(3, -1.0), (4, -2.0)]) == [-1.0, None, None]


def test_llama_cpps_log_probs_of_other_tokens_are_refused():
    with pytest.raises(BadReply, match="of other tokens"):
        llama_cpp.aligned([3, 4], [(3, -1.0), (5, -2.0)])


def test_llama_cpp_may_sample_past_the_limit():
    with StandIn(LlamaCpp) as server:
        sampler = make("llama_cpp", server)
        whole = sample(sampler)

        def one_more(handler, number):
            server.asked[number]["n_predict"] += 1
            return False

        server.faults.append(one_more)
        np.testing.assert_array_equal(sample(sampler).tokens, whole.tokens)


# What is asked for


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize(
    "name, value", [("rollout.top_k", 5), ("rollout.top_p", 0.9), ("rollout.min_p", 0.1)]
)
def test_a_cut_support_is_refused_before_any_request(kind, name, value):
    with StandIn(ALL[kind][0]) as server:
        with pytest.raises(ValueError, match=f"^{name}={value} cuts the support"):
            make(kind, server, run=tiny(**{name: value}))
        assert not server.asked and not server.loaded


def test_replayed_routing_is_refused():
    run = tiny(**{"algorithm.replay_routing": True})
    with StandIn(Vllm) as server, pytest.raises(ValueError, match="not asked for them"):
        make("vllm", server, run=run)


def test_one_engine_of_all_processes_is_refused():
    run = tiny(**{"rollout.one_engine": True})
    with StandIn(Vllm) as server, pytest.raises(ValueError, match="one_engine no"):
        make("vllm", server, run=run)


@pytest.mark.parametrize("kind", ALL)
def test_the_server_tells_what_it_is(kind):
    modules = {"vllm": vllm, "sglang": sglang, "llama_cpp": llama_cpp}
    with StandIn(ALL[kind][0]) as server:
        assert isinstance(servers.connect(server.url), modules[kind].Server)


def test_another_server_is_refused():
    class Other:
        path = "/"

        def control(server, method, path, body):
            return 404, {}

    with StandIn(Other) as server, pytest.raises(ServerError, match="neither vLLM nor SGLang"):
        servers.connect(server.url)


def test_a_vllm_that_takes_no_weights_is_refused():
    class Old(Vllm):
        def control(server, method, path, body):
            if path == "/weight_info":
                return 404, {}
            return Vllm.control(server, method, path, body)

    with StandIn(Old) as server, pytest.raises(ServerError, match="VLLM_SERVER_DEV_MODE=1"):
        make("vllm", server)


def test_seeds_have_31_bits_and_differ():
    seeds = {server_sampler.completion_seed(2**32 - 1, number) for number in range(1000)}
    assert len(seeds) == 1000 and max(seeds) < 2**31


def test_sampler_and_server_are_not_both_set():
    rollout = dataclasses.replace(tiny().rollout, sampler=vllm.vllm("http://a"), server="http://a")
    with pytest.raises(ValueError, match="are both set"):
        dataclasses.replace(tiny(), rollout=rollout)


def test_completions_of_a_model_folder_are_sampled_by_a_server(tmp_path):
    folder = str(tmp_path / "hf")
    weights.save(folder, MODEL, make_params(1))
    tokenizer.save(TOKENIZER, folder)
    with StandIn(Vllm) as server:
        (one, two), _ = complete.texts(
            folder, ["abc", "de"], samples=2, max_tokens=6, server=server.url, chunk_size=1
        )
        assert len(server.loaded) == 1 and len(server.asked) == server_probe.COUNTS[0] + 4
    for completion in (one, two):
        ids = TOKENIZER.encode("abc" + completion.text) + [1] * completion.stopped
        row = np.zeros((1, POSITIONS), np.int32)
        row[0, : len(ids)] = ids
        logp = np.asarray(jax.nn.log_softmax(logits_of(MODEL)(make_params(1), row)[0]))
        expected = sum(logp[at - 1, ids[at]] for at in range(3, len(ids)))
        assert completion.logp == pytest.approx(expected, abs=1e-4)


def test_a_cut_support_of_a_model_folder_is_refused(tmp_path):
    folder = str(tmp_path / "hf")
    weights.save(folder, MODEL, make_params())
    tokenizer.save(TOKENIZER, folder)
    with StandIn(Vllm) as server, pytest.raises(ValueError, match="top_p=0.5 cuts the support"):
        complete.texts(folder, ["abc"], sampling=Sampling(1.0, 0, 0.5), server=server.url)
