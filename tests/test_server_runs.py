"""Runs that sample from a server (`rollout.server`), against stand-ins that answer from the
decoder.
"""

import dataclasses
import json
import os
import signal

import pytest

from dcmdp_jax.run.inputs import read_inputs
from dcmdp_jax.run.starting import unwarmed_weights
from dcmdp_jax.stopping import Interrupted
from support.random_params import random_params
from support.servers import LlamaCpp, Sglang, StandIn, Vllm, VllmInFlight, once, status
from support.training import (
    ONE_DEVICE,
    QUICKSTART,
    assert_same_run,
    command,
    dcmdp,
    rows,
    tiny,
    train,
    words,
)

pytestmark = pytest.mark.full

SMALL = {"rollout.max_tokens": 8, "rollout.samples": 2, "warmup.steps": 0}
REQUESTS = 8  # of a step
PROBES = 16  # at the start of a run


def started(kind):
    """A stand-in of the tiny quickstart's model, with weights that no run has."""
    inputs = read_inputs(tiny(), ONE_DEVICE)
    params = random_params(inputs.model_config, 0.1, norms=1.0)
    return StandIn(kind, inputs.model_config, params, inputs.tokenizer.eos_ids)


def even(example, text):
    """A reward that random weights earn now and then."""
    return float(sum(map(ord, text)) % 2 == 0)


def run_of(server, **changes):
    run = tiny(**(SMALL | {"rollout.server": server.url} | changes))
    return dataclasses.replace(run, data=dataclasses.replace(run.data, verifier=even))


def give_starting_weights(server):
    """As where the GGUF file holds the run's model."""
    run = run_of(server)
    server.params = unwarmed_weights(run, read_inputs(run, ONE_DEVICE))


@pytest.fixture(scope="module", params=[Vllm, Sglang])
def three_steps(request, tmp_path_factory):
    """A stand-in, and the folder of a run of three steps with held-out evaluation."""
    workdir = tmp_path_factory.mktemp("run")
    with started(request.param) as server:
        state = train(run_of(server, **{"steps": 3, "eval.every": 2}), workdir)
        yield server, workdir, state


def test_it_trains(three_steps):
    _, workdir, state = three_steps
    assert int(state.step) == 3 and int(state.skipped) == 0
    assert all(row["grad_norm"] > 0 for row in rows(workdir))


def test_each_step_samples_from_the_weights_before_it(three_steps):
    assert all(row["delta_mean"] < 1e-6 for row in rows(three_steps[1]))


def test_weights_that_a_server_does_not_load_show_in_delta(tmp_path, monkeypatch):
    monkeypatch.setattr(StandIn, "load", lambda server, folder: None)
    with started(Vllm) as server:
        give_starting_weights(server)
        train(run_of(server, steps=2), tmp_path)
    first, second = (row["delta_mean"] for row in rows(tmp_path))
    assert first < 1e-6 and second > 1e-4


def test_the_servers_policy_is_evaluated(three_steps):
    evaluated = [row["step"] for row in rows(three_steps[1]) if "reward_eval_infer" in row]
    assert evaluated == [1, 2, 3]


def test_a_resumed_run_is_the_uninterrupted_one(three_steps, tmp_path):
    server, whole, _ = three_steps
    for steps in (1, 3):
        train(run_of(server, **{"steps": steps, "eval.every": 2}), tmp_path)
    # a run of one step evaluates at its last step, as the first step does anyway
    assert_same_run(whole, tmp_path, run_of(server, **{"steps": 3, "eval.every": 2}))


def test_a_run_that_is_interrupted_while_it_samples_goes_on(three_steps, tmp_path):
    server, whole, _ = three_steps
    run = run_of(server, **{"steps": 3, "eval.every": 2})
    third = len(server.asked) + PROBES + 2 * REQUESTS + 2 * 8  # after a probe and two steps

    def interrupt(handler, number):
        os.kill(os.getpid(), signal.SIGINT)
        handler.connection.recv(1)  # returns once the client has closed the connection
        return True

    server.faults.append(once(third + 3)(interrupt))
    with pytest.raises(Interrupted, match="stopped after step 2 of 3"):
        train(run, tmp_path)
    train(run, tmp_path)
    assert_same_run(whole, tmp_path, run)


def test_passing_faults_and_a_restart_leave_the_run_as_it_is(three_steps, tmp_path):
    server, whole, _ = three_steps
    run = run_of(server, **{"steps": 3, "eval.every": 2})
    start = len(server.asked)
    server.faults += [
        once(start + 2, start + 3, start + 30)(status(503)),
        once(start + 20)(lambda handler, number: server.restart()),
    ]
    train(run, tmp_path)
    assert_same_run(whole, tmp_path, run)


def test_a_run_goes_on_with_another_server(three_steps, tmp_path):
    server, whole, _ = three_steps
    train(run_of(server, **{"steps": 1, "eval.every": 2}), tmp_path)
    with started(server.kind) as other:
        run = run_of(other, **{"steps": 3, "eval.every": 2})
        train(run, tmp_path)
        assert_same_run(whole, tmp_path, run)


def test_stale_weights_are_the_servers(tmp_path):
    with started(Vllm) as server:
        train(run_of(server, **{"steps": 3, "rollout.staleness": 1}), tmp_path)
    assert all(row["delta_mean"] < 1e-6 for row in rows(tmp_path))
    assert [row["gap_staleness"] > 1e-5 for row in rows(tmp_path)] == [False, True, True]


def test_weights_in_flight_are_scored_token_by_token(tmp_path):
    """From the second batch on, each completion waits after its second token for the update that
    runs meanwhile.
    """
    with started(VllmInFlight) as server:

        def wait(count, labels):
            batch = (len(server.asked) - PROBES - 1) // REQUESTS  # from 0 on
            if count == 2 and batch > 0:
                with server.steps:
                    server.steps.wait_for(lambda: len(server.loaded) > batch, 30)

        server.after_token = wait
        run = run_of(server, **{"steps": 3, "rollout.staleness": 1, "rollout.in_flight": True})
        train(run, tmp_path)
        assert len(server.loaded) == 3  # before the first batch, in the second and in the third
    first, *others = rows(tmp_path)
    assert first["on_policy_share"] == 1
    assert all(0 < row["on_policy_share"] < 1 for row in others)
    assert all(row["gap_staleness"] > 1e-5 for row in others)
    assert all(row["delta_mean"] < 1e-6 for row in (first, *others))


@pytest.mark.parametrize("kind", [Vllm, Sglang, LlamaCpp])
def test_parity_of_a_server_that_computes_as_the_trainer(kind, tmp_path, capsys):
    with started(kind) as server:
        if kind is LlamaCpp:
            give_starting_weights(server)
        options = words(**(SMALL | {"rollout.server": server.url}))
        arguments = ["--workdir", str(tmp_path), "--max-error", "1e-5", *options]
        assert dcmdp(["parity", QUICKSTART, *arguments]) == 0, capsys.readouterr().err
    record = json.loads((tmp_path / "parity.json").read_text())
    assert record["passed"] and record["precision"] is None


def test_the_tolerance_of_a_server_is_calibrated(tmp_path, capsys):
    with started(Vllm) as server:
        options = words(**(SMALL | {"rollout.server": server.url}))
        assert dcmdp(["calibrate", QUICKSTART, "--workdir", str(tmp_path), *options]) == 0
    assert "tolerance" in capsys.readouterr().out


def test_llama_cpp_takes_one_step_and_says_how_to_go_on(tmp_path, capsys):
    with started(LlamaCpp) as server:
        give_starting_weights(server)
        changes = SMALL | {"steps": 2, "rollout.server": server.url}
        assert dcmdp(command(tmp_path, **changes)) == 1
    assert "takes no new weights while it runs" in capsys.readouterr().err
    assert [row["step"] for row in rows(tmp_path)] == [1]


# What is refused before anything is compiled


def refused(capsys, workdir, **changes):
    status = dcmdp(command(workdir, **(SMALL | changes)))
    assert status == 2 and not workdir.exists()
    return capsys.readouterr().err


def test_a_server_that_is_not_there(capsys, tmp_path):
    message = refused(capsys, tmp_path / "run", **{"rollout.server": "http://127.0.0.1:9"})
    assert "http://127.0.0.1:9 cannot be reached" in message


def test_a_cut_support(capsys, tmp_path):
    with started(Vllm) as server:
        changes = {"rollout.server": server.url, "rollout.top_p": 0.9}
        assert "rollout.top_p=0.9 cuts the support" in refused(capsys, tmp_path / "run", **changes)
        assert not server.asked


def test_a_folder_without_a_server(capsys, tmp_path):
    message = refused(capsys, tmp_path / "run", **{"rollout.weights_folder": str(tmp_path)})
    assert "rollout.weights_folder is for rollout.server" in message


def test_diagnosis_of_a_server(capsys, tmp_path):
    options = words(**{"rollout.server": "http://127.0.0.1:9"})
    assert dcmdp(["diagnose", QUICKSTART, "--workdir", str(tmp_path), *options]) == 2
    assert "rollout.server=http://127.0.0.1:9 is another one" in capsys.readouterr().err


def test_properties_of_an_engine_that_is_not_there_are_not_checked():
    with started(Vllm) as server:
        run = run_of(server, **{"rollout.slots": 7, "rollout.precision.weights": "int3"})
        read_inputs(run, ONE_DEVICE)
