"""Weights that come while a server samples: which tokens come from which."""

import contextlib
import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcmdp_jax.batches import make_sampler
from dcmdp_jax.records import NotFinite
from dcmdp_jax.rollout.http_client import ServerError
from dcmdp_jax.run.inputs import read_inputs
from support.sampling_servers import ALL, forward_logp, make, sample
from support.servers import (
    MODEL,
    TOKENIZER,
    StandIn,
    Vllm,
    VllmInFlight,
    make_params,
    once,
    replaced,
)
from support.training import ONE_DEVICE, tiny

pytestmark = pytest.mark.full

IN_FLIGHT = {
    "rollout.server": "http://127.0.0.1:1",
    "rollout.staleness": 1,
    "rollout.in_flight": True,
}


def make_in_flight(server, **options):
    """Returns a sampler with the weights of version 0, which takes others in flight."""
    return make("vllm", server, run=tiny(**IN_FLIGHT), **options)


def weights_after_third_token(server, sampler):
    """Has version 1 come when the first completion of three tokens has been drawn, which then
    waits for it. Returns what ends it.
    """
    stack = contextlib.ExitStack()
    is_first = iter([True])

    def come(count, labels):
        if count == 3 and next(is_first, False):
            stack.enter_context(sampler.in_flight(make_params(1), lambda: make_params(1), 1))
            with server.steps:
                server.steps.wait_for(lambda: server.label != labels[0], 30)

    server.after_token = come
    return stack


def test_weights_that_come_in_flight_sample_the_rest_of_a_completion():
    with StandIn(VllmInFlight) as server:
        sampler = make_in_flight(server, connections=1)
        with weights_after_third_token(server, sampler):
            rollout = sample(sampler, max_tokens=8)
        mixed = int(np.flatnonzero(rollout.lengths > 3)[0])
        assert mixed < 6 and rollout.lengths[mixed] > 4
        assert (rollout.version[mixed] == [0, 0, 0, 1, 1, 1, 1, 1]).all()
        assert (rollout.version[mixed + 1 :] == 1).all()
        first, then = (forward_logp(rollout, version) for version in (0, 1))
        expected = np.where(rollout.version == 0, first, then)
        np.testing.assert_allclose(rollout.rollout_logp, expected, atol=1e-5)
        assert np.abs(first - then)[mixed].max() > 0.1

        loaded = list(server.loaded)
        assert sampler.version == 1
        again = sample(sampler)
        assert server.loaded == loaded and (again.version == 1).all()
        np.testing.assert_allclose(again.rollout_logp, forward_logp(again, 1), atol=1e-5)


def test_a_log_prob_that_vllm_does_not_know_is_not_made_up():
    def forget(reply):
        reply["choices"][0]["logprobs"]["content"][0]["logprob"] = -9999.0

    with StandIn(VllmInFlight) as server:
        sampler = make_in_flight(server)
        server.faults.append(once(len(server.asked) + 3)(replaced(forget)))
        rollout = sample(sampler)
        assert np.isnan(rollout.rollout_logp).sum() == 1


class NotComputed:
    """A parameter whose value is never there."""

    def __init__(self):
        self.asked = 0

    def is_ready(self):
        self.asked += 1
        return False


def without(reply):
    del reply["choices"][0]["weight_versions"]


def unlabelled(reply):
    reply["choices"][0]["weight_versions"] = None


def too_long(reply):
    reply["choices"][0]["weight_versions"][-1]["end"] += 1


def with_a_hole(reply):
    reply["choices"][0]["weight_versions"][0]["start"] = 1


def without_an_end(reply):
    reply["choices"][0]["weight_versions"][0]["end"] = None


def of_another_token(reply):
    reply["choices"][0]["logprobs"]["content"][0]["token_id"] += 1


def of_another_prompt(reply):
    reply["prompt_token_ids"] = [2, 2, 2, 2, 2]


@pytest.mark.parametrize(
    "change",
    [
        without,
        unlabelled,
        too_long,
        with_a_hole,
        without_an_end,
        of_another_token,
        of_another_prompt,
    ],
)
def test_a_reply_that_does_not_tell_the_weights_of_each_token_is_refused(change):
    with StandIn(VllmInFlight) as server:
        sampler = make_in_flight(server)
        server.faults.append(replaced(change))
        with pytest.raises(ServerError, match="in another form than expected: its reply"):
            sample(sampler)


def test_weights_that_are_not_computed_when_a_batch_ends_come_after_it():
    with StandIn(VllmInFlight) as server:
        sampler = make_in_flight(server)
        awaited = NotComputed()
        server.after_token = lambda count, labels: time.sleep(0.05)
        with sampler.in_flight([awaited], lambda: make_params(1), 1):
            rollout = sample(sampler)
        assert awaited.asked > 0
        assert (rollout.version == 0).all() and len(server.loaded) == 1
        sampler.update_weights(make_params(1), 1)
        assert len(server.loaded) == 2 and (sample(sampler).version == 1).all()


def test_weights_that_are_not_finite_are_not_sent_in_flight():
    broken = make_params() | {"embed": make_params()["embed"] * jnp.nan}
    with StandIn(VllmInFlight) as server:
        sampler = make_in_flight(server)
        server.after_token = lambda count, labels: time.sleep(0.05)
        with sampler.in_flight(broken, lambda: broken, 1):
            rollout = sample(sampler)
        assert (rollout.version == 0).all() and len(server.loaded) == 1
        with pytest.raises(NotFinite):
            sampler.update_weights(broken, 1)


def test_a_restart_after_weights_in_flight_leaves_no_sample_of_others(capsys):
    with StandIn(VllmInFlight) as server:
        sampler = make_in_flight(server, connections=1)
        coming = weights_after_third_token(server, sampler)
        come = server.after_token

        def restart_after_fifth(count, labels):
            come(count, labels)
            if count == 5 and len(server.loaded) == 2:
                server.restart()

        server.after_token = restart_after_fifth
        with coming:
            rollout = sample(sampler)
        assert "has weights 'default' instead of" in capsys.readouterr().err
        assert (rollout.version == 1).all()
        np.testing.assert_allclose(rollout.rollout_logp, forward_logp(rollout, 1), atol=1e-5)


def test_a_restart_after_the_pause_gives_no_token_the_name_of_the_weights_in_flight():
    names = []

    class Dying(VllmInFlight):
        def control(server, method, path, body):
            if path == "/update_weight_version":
                names.append(body["new_version"])
                if len(names) == 2:  # the first in flight
                    with server.steps:
                        server.restart()
                        server.steps.notify_all()
                    raise ConnectionResetError
            return VllmInFlight.control(server, method, path, body)

    with StandIn(Dying) as server:
        sampler = make_in_flight(server, connections=1)
        with weights_after_third_token(server, sampler):
            rollout = sample(sampler)
        assert len(set(names)) == 2 and len(names) > 2
        assert (rollout.version == 1).all()
        np.testing.assert_allclose(rollout.rollout_logp, forward_logp(rollout, 1), atol=1e-5)


def test_a_cache_that_is_not_reset_ends_the_run():
    class Holding(VllmInFlight):
        def control(server, method, path, body):
            if path == "/reset_prefix_cache":
                return 200, {"success": False}
            return VllmInFlight.control(server, method, path, body)

    with (
        StandIn(Holding) as server,
        pytest.raises(ServerError, match="reports no success of /reset_prefix_cache"),
    ):
        make_in_flight(server)


def test_a_sampler_that_takes_no_weights_in_flight_is_refused():
    run = tiny()
    rollout = dataclasses.replace(
        run.rollout, staleness=1, in_flight=True, sampler=lambda *arguments: object()
    )
    run = dataclasses.replace(run, rollout=rollout)
    with pytest.raises(ValueError, match="by a method in_flight"):
        make_sampler(run, read_inputs(run, ONE_DEVICE))


@pytest.mark.parametrize("kind", ["sglang", "llama_cpp"])
def test_in_flight_is_refused_where_tokens_do_not_tell_their_weights(kind):
    with (
        StandIn(ALL[kind][0]) as server,
        pytest.raises(ServerError, match="does not tell which tokens come from which"),
    ):
        ALL[kind][1](server.url)(tiny(**IN_FLIGHT), MODEL, TOKENIZER, None)


def test_in_flight_needs_a_vllm_that_tells_the_weights_of_tokens():
    with (
        StandIn(Vllm) as server,
        pytest.raises(ServerError, match="--enable-scale-out, or set --rollout.in_flight no"),
    ):
        make_in_flight(server)


def test_in_flight_is_of_one_process(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with (
        StandIn(VllmInFlight) as server,
        pytest.raises(ValueError, match="and 2 train; set --rollout.in_flight no"),
    ):
        make_in_flight(server)


@pytest.mark.parametrize("changes", [{"rollout.staleness": 2}, {"rollout.server": ""}])
def test_in_flight_needs_a_server_and_a_batch_ahead(changes):
    with pytest.raises(ValueError, match="set rollout.staleness to 1 and a rollout.server"):
        tiny(**(IN_FLIGHT | changes))
