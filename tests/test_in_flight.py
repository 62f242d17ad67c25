"""Weights that come while a server samples: which tokens come from which."""

import contextlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcmdp_jax.records import NotFinite
from dcmdp_jax.rollout.http_client import ServerError
from support.sampling_servers import ALL, forward_logp, make, sample
from support.servers import MODEL, TOKENIZER, StandIn, Vllm, VllmInFlight, make_params, replaced
from support.training import tiny

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

    def come(count, labels):
        if count == 3 and server.label == labels[0] and len(server.loaded) == 1:
            stack.enter_context(sampler.in_flight(make_params(1), 1))
            with server.steps:
                assert server.steps.wait_for(lambda: server.label != labels[0], 60)

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
        sampler.update_weights(make_params(1), 1)  # the server has them
        again = sample(sampler)
        assert server.loaded == loaded and (again.version == 1).all()
        np.testing.assert_allclose(again.rollout_logp, forward_logp(again, 1), atol=1e-5)


class NotComputed:
    """A parameter whose value is never there."""

    def is_ready(self):
        return False


def without(reply):
    del reply["choices"][0]["weight_versions"]


def unlabelled(reply):
    reply["choices"][0]["weight_versions"] = None


def too_long(reply):
    reply["choices"][0]["weight_versions"][-1]["end"] += 1


def with_a_hole(reply):
    reply["choices"][0]["weight_versions"][0]["start"] = 1


def of_another_token(reply):
    reply["choices"][0]["logprobs"]["content"][0]["token_id"] += 1


@pytest.mark.parametrize("change", [without, unlabelled, too_long, with_a_hole, of_another_token])
def test_a_reply_that_does_not_tell_the_weights_of_each_token_is_refused(change):
    with StandIn(VllmInFlight) as server:
        sampler = make_in_flight(server)
        server.faults.append(replaced(change))
        with pytest.raises(ServerError, match="in another form than expected: its reply"):
            sample(sampler)


def test_weights_that_are_not_computed_when_a_batch_ends_come_after_it():
    with StandIn(VllmInFlight) as server:
        sampler = make_in_flight(server)
        with sampler.in_flight([NotComputed()], 1):
            rollout = sample(sampler)
        assert (rollout.version == 0).all() and len(server.loaded) == 1
        sampler.update_weights(make_params(1), 1)
        assert len(server.loaded) == 2 and (sample(sampler).version == 1).all()


def test_weights_that_are_not_finite_are_not_sent_in_flight():
    broken = make_params() | {"embed": make_params()["embed"] * jnp.nan}
    with StandIn(VllmInFlight) as server:
        sampler = make_in_flight(server)
        server.after_token = lambda count, labels: time.sleep(0.05)
        with sampler.in_flight(broken, 1):
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
    with pytest.raises(ValueError, match="set rollout.staleness to 1 and rollout.server"):
        tiny(**(IN_FLIGHT | changes))
