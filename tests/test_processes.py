"""Several processes on localhost against one with the same devices: the same run, whether stopped,
killed or resumed.
"""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from dcmdp_jax import calibrate, cli, sharding, train_state
from dcmdp_jax.distributed import processes
from dcmdp_jax.experiment import load_experiment
from dcmdp_jax.run import checkpoint
from support.training import write_pairs

pytestmark = pytest.mark.full

EXPERIMENT = str(pathlib.Path(__file__).parent / "support" / "hosts_experiment.py")
MAIN = "import sys; from dcmdp_jax.cli import main; sys.exit(main(sys.argv[1:]))"
REFILLS = ("--data.max_refills", 2)


@pytest.fixture
def start(tmp_path):
    """Starts the processes of a run; those that still run at the end are killed."""
    started = []

    def run(workdir, processes, devices, *options, environments=None):
        """Args: `environments`: of some processes, by number, beside the common one."""
        with socket.create_server(("127.0.0.1", 0)) as free:
            address = f"127.0.0.1:{free.getsockname()[1]}"
        flags = os.environ["XLA_FLAGS"].replace("device_count=8", f"device_count={devices}")
        environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
        command = [
            sys.executable,
            "-c",
            MAIN,
            "train",
            EXPERIMENT,
            "--workdir",
            str(workdir),
            *map(str, options),
        ]
        here = [
            ["--coordinator", address, "--processes", str(processes), "--process", str(i)]
            for i in range(processes)
        ]
        logs = [(tmp_path / f"log{len(started) + i}").open("w+") for i in range(processes)]
        new = [
            subprocess.Popen(
                [*command, *(own if processes > 1 else [])],
                stdout=log,
                stderr=log,
                env=environment | (environments or {}).get(i, {}),
            )
            for i, (own, log) in enumerate(zip(here, logs))
        ]
        for process, process.log in zip(new, logs):
            started.append(process)
        return new

    yield run
    for process in started:
        process.kill()
        process.wait()
        process.log.close()


def end(processes, statuses):
    """Returns what the processes printed, once they have ended with `statuses`."""
    ended = [process.wait(timeout=300) for process in processes]
    texts = []
    for process in processes:
        process.log.seek(0)
        texts.append(process.log.read())
    assert ended == statuses, "\n\n".join(texts)
    return texts


def rows(workdir):
    """Returns the metrics of a run's steps, without the seconds they took."""
    file = workdir / "metrics.jsonl"
    if not file.exists():
        return []
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in file.open()]


def await_rows(workdir, count, processes):
    deadline = time.monotonic() + 300
    while len(rows(workdir)) < count:
        assert all(process.poll() is None for process in processes), end(
            processes, [0] * len(processes)
        )
        assert time.monotonic() < deadline, f"the run has not written {count} rows in 300 s"
        time.sleep(0.02)


def saved(workdir):
    """Returns the newest checkpoint as NumPy, with the position in the data."""
    experiment = load_experiment(EXPERIMENT)
    like = train_state.abstract(
        experiment, experiment.model.architecture, sharding.single_device_mesh()
    )
    state, position = checkpoint.read(workdir, like)
    return jax.device_get(state), position


def assert_same(one, two):
    """Two runs are equal bit for bit: metrics, held-out rates, tolerance, state, order of data."""
    assert rows(one) == rows(two) and len(rows(one)) >= 4
    (a, position), (b, other) = saved(one), saved(two)
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert position == other and a.step == len(rows(one))
    assert (one / calibrate.FILE).read_text() == (two / calibrate.FILE).read_text()


def test_a_run_of_two_processes_that_is_stopped_goes_on_as_one(start, tmp_path):
    """SIGTERM reaches process 1 alone; both save the same step. One process of two devices goes on,
    and equals a run of one process from its start. The warm-up learns a file of pairs, and prompts
    without spread are replaced.
    """
    learns = "--warmup.path", write_pairs(tmp_path / "pairs.jsonl", 20), *REFILLS
    both = start(tmp_path / "two", 2, 1, "--steps", 1000, *learns)
    await_rows(tmp_path / "two", 2, both)
    both[1].send_signal(signal.SIGTERM)
    first, second = end(both, [130, 130])
    step = checkpoint.steps(tmp_path / "two")[-1]
    assert f"stopped after step {step} of 1000; everything is saved" in first
    assert "stopped after" not in second
    assert len(rows(tmp_path / "two")) == step >= 2
    end(start(tmp_path / "two", 1, 2, "--steps", step + 2), [0])
    end(start(tmp_path / "one", 1, 2, "--steps", step + 2, *learns), [0])
    assert_same(tmp_path / "one", tmp_path / "two")
    assert {0, 1} <= {row["refills"] for row in rows(tmp_path / "one")} <= {0, 1, 2}


def test_processes_with_different_options_all_refuse(start, tmp_path):
    """Process 1 has another seed; nothing is compiled, and no folder is made."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    common = ["--coordinator", address, "--processes", 2]
    both = [
        start(tmp_path / "run", 1, 1, *common, "--process", i, "--seed", i)[0] for i in range(2)
    ]
    for text in end(both, [2, 2]):
        assert "dcmdp: process 1 has another configuration than process 0" in text
    assert not (tmp_path / "run").exists()


def test_slurm_gives_address_and_numbers(monkeypatch, tmp_path):
    for name, value in {
        "JOB_ID": 7,
        "STEP_NODELIST": "node[001-003],other",
        "STEP_NUM_NODES": 4,
        "NTASKS": 4,
        "PROCID": 2,
        "LOCALID": 0,
    }.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    monkeypatch.setenv("JAX_COORDINATOR_PORT", "1234")
    with pytest.raises(
        ValueError,
        match=r"process 2 found no process 0 at node001:1234 within 0.1 s \(no such host name\)",
    ):
        processes.start(tmp_path, limit=0.1)


@pytest.mark.parametrize(
    "options",
    [
        ["--coordinator", "localhost:1"],
        ["--processes", "2"],
        ["--process", "0"],
        ["--distributed", "--coordinator", "localhost:1", "--processes", "2", "--process", "0"],
    ],
)
def test_incomplete_or_contradictory_options_are_refused(options, tmp_path, capsys):
    assert cli.main(["train", EXPERIMENT, "--workdir", str(tmp_path / "run"), *options]) == 2
    assert (
        "is given --coordinator HOST:PORT, --processes N and --process I, or --distributed alone"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize("size", [1, 2, 7, 9])
def test_shares_are_contiguous_and_complete(monkeypatch, size):
    shares = []
    for process in range(3):
        monkeypatch.setattr(processes.jax, "process_index", lambda process=process: process)
        shares.append(processes.share(size, 3))
    assert [i for share in shares for i in range(size)[share]] == list(range(size))
    assert all(len(range(size)[share]) <= len(range(size)[shares[0]]) for share in shares)


def test_the_arrays_of_process_0_are_those_of_all(monkeypatch):
    """As process 1 sees it."""
    first = np.arange(3), None, np.array([True, False])

    def gather(mine):
        return jax.tree.map(lambda a, b: np.concatenate([a[None], b]), first, mine)

    monkeypatch.setattr(processes, "gather", gather)
    mine = np.arange(3) + 7, None, np.array([False, False])
    jax.tree.map(np.testing.assert_array_equal, processes.from_process_0(mine), first)


def test_the_arrays_of_a_single_process_are_its_own():
    np.testing.assert_array_equal(processes.from_process_0(np.arange(3)), np.arange(3))


def test_the_share_of_a_single_engine_is_everything():
    assert processes.share(7, 1) == slice(0, 7)


@pytest.mark.slow
def test_a_killed_process_ends_the_others_and_is_resumed_exactly(start, tmp_path):
    """SIGKILL two steps past a checkpoint: process 0 names the lost one. Two processes then equal
    one bit for bit; four on another mesh have the same losses to 1e-5.
    """
    both = start(tmp_path / "two", 2, 1, "--steps", 1000, "--checkpoint.keep", 1)
    await_rows(tmp_path / "two", 5, both)
    both[1].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    assert f"process 1 on {socket.gethostname()} is gone" in end(both, [1, -signal.SIGKILL])[0]
    assert time.monotonic() - killed < 30
    step = checkpoint.steps(tmp_path / "two")[-1]
    subprocess.run(["cp", "-r", tmp_path / "two", tmp_path / "four"], check=True)
    end(start(tmp_path / "two", 2, 1, "--steps", step + 2), [0, 0])
    end(start(tmp_path / "one", 1, 2, "--steps", step + 2), [0])
    assert_same(tmp_path / "one", tmp_path / "two")
    end(start(tmp_path / "four", 4, 1, "--steps", step + 2, "--mesh.tensor", 2), [0] * 4)
    for one, four in zip(rows(tmp_path / "one"), rows(tmp_path / "four")):
        for name in (
            "loss",
            "reward",
            "grad_norm",
            "delta_mean",
            "multiplier",
            "reward_eval_infer",
        ):
            assert one.get(name) == pytest.approx(four.get(name), abs=1e-5), name


@pytest.mark.slow
def test_processes_that_sample_on_devices_of_their_own(start, tmp_path):
    """Rollouts one step old, on half of the devices of each process; two processes equal one of
    four devices.
    """
    options = ("--rollout.devices", 2, "--rollout.staleness", 1)
    end(start(tmp_path / "two", 2, 2, *options), [0, 0])
    end(start(tmp_path / "one", 1, 4, *options), [0])
    assert rows(tmp_path / "one") == rows(tmp_path / "two") and len(rows(tmp_path / "one")) == 4
    assert all(row["gap_staleness"] > 0 for row in rows(tmp_path / "one")[1:])


@pytest.mark.slow
def test_a_verifier_that_fails_on_one_process_ends_all(start, tmp_path):
    """Both end with one sentence about it."""
    broken = {1: {"BROKEN_VERIFIER": "0"}}
    first, second = end(start(tmp_path / "two", 2, 1, "--steps", 1000, environments=broken), [1, 1])
    for text in (first, second):
        assert "the verifier even fails on a completion of the prompt" in text
        assert (
            "RuntimeError: the verifier is broken; fix the verifier; go on with: dcmdp train"
            in text
        )
        assert "Traceback" not in text
    assert "dcmdp: process 1 refuses: the verifier" in first


@pytest.mark.slow
def test_the_loss_of_process_0_ends_the_others(start, tmp_path):
    """JAX's coordinator, which process 0 held, may be the first to end process 1."""
    both = start(tmp_path / "two", 2, 1, "--steps", 1000)
    await_rows(tmp_path / "two", 1, both)
    both[0].send_signal(signal.SIGKILL)
    status = both[1].wait(timeout=60)
    assert status in (1, -signal.SIGABRT)
    text = end(both, [-signal.SIGKILL, status])[1]
    assert "process 0 at 127.0.0.1" in text if status == 1 else "another task died" in text


@pytest.mark.slow
def test_a_verifier_that_fails_on_one_process_loses_no_step(start, tmp_path):
    """It fails between two checkpoints; both save the state after the step before."""
    options = "--steps", 1000, "--checkpoint.every", 0, "--eval.every", 0
    first, second = end(
        start(
            tmp_path / "two",
            2,
            1,
            *options,
            environments={1: {"BROKEN_VERIFIER": str(16 + 3 * 8 + 1)}},
        ),
        [1, 1],
    )
    assert "the state after step 3 is saved in" in first and "Traceback" not in first + second
    assert "RuntimeError: the verifier is broken" in first
    assert "RuntimeError: the verifier is broken" in second
    assert checkpoint.steps(tmp_path / "two") == [0, 3] and len(rows(tmp_path / "two")) == 3


@pytest.mark.slow
def test_a_checkpoint_that_one_process_cannot_read_is_skipped_by_all(start, tmp_path):
    """Both go on from the checkpoint before, and the run ends as if nothing had happened."""
    end(start(tmp_path / "two", 2, 1), [0, 0])
    expected_state = saved(tmp_path / "two")
    expected_rows = rows(tmp_path / "two")
    unreadable = {1: {"UNREADABLE_CHECKPOINT": "4"}}
    first, _ = end(start(tmp_path / "two", 2, 1, environments=unreadable), [0, 0])
    assert "checkpoint 4 in" in first and "is damaged" in first
    assert "going on from checkpoint 2" in first
    jax.tree.map(np.testing.assert_array_equal, saved(tmp_path / "two"), expected_state)
    assert rows(tmp_path / "two") == expected_rows
    assert (tmp_path / "two" / "checkpoints" / "4.damaged").is_dir()
