"""Runs whose work folder is in a bucket, on a server of the real API: they end as a local run does,
whatever stops them, and no two of them share a folder.
"""

import itertools
import pathlib
import signal
import socket
import subprocess
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from dcmdp_jax import buckets
from dcmdp_jax.models import weights
from dcmdp_jax.run import checkpoint, staging
from support import gcs_server, training

pytestmark = [gcs_server.needed, pytest.mark.full, pytest.mark.slow]
HOSTS = str(pathlib.Path(__file__).parent / "support" / "hosts_experiment.py")
EVERY = {"checkpoint.every": 2, "warmup.steps": 20}


@pytest.fixture(scope="module")
def server():
    with gcs_server.serve() as client:
        yield client


@pytest.fixture
def bucket(server, tmp_path, monkeypatch):
    """The bucket `own`, empty, of a process that has not used it."""
    monkeypatch.setattr(staging, "_staged", {})
    monkeypatch.setattr(staging, "LEASE", 2.0)
    monkeypatch.setattr(staging, "RENEWAL", 0.3)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for blob in server.list_blobs("own"):
        blob.delete()
    return server.bucket("own")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A local run of five steps."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    training.train(training.tiny(steps=5, **EVERY), workdir)
    return workdir


def forget():
    """Lets this process see the bucket as a new process does."""
    staging._staged.clear()


def train(**changes):
    return training.dcmdp(training.command("gs://own/runs/a", **EVERY, **changes))


def objects():
    return buckets.listing(buckets.parse("gs://own/runs/a"))


def assert_same_as(whole):
    forget()
    training.assert_same_run(
        staging.folder("gs://own/runs/a"), whole, training.tiny(steps=5, **EVERY)
    )


def test_a_run_that_goes_on_in_another_process_is_the_uninterrupted_one(bucket, whole, capsys):
    assert train(steps=3) == 0
    assert "finished; see gs://own/runs/a/report.html" in capsys.readouterr().out
    files = {name for name in objects() if not name.startswith("checkpoints/")}
    assert files - {"times.json"} == {  # which is there if a step compiled nothing
        "config.json",
        "metrics.jsonl",
        "report.html",
        "warmup.jsonl",
    }
    forget()
    assert train(steps=5) == 0
    assert_same_as(whole)


def test_a_folder_that_was_read_before_another_run_wrote_it_is_read_again(bucket, whole):
    assert train(steps=1) == 0
    early = staging.Staged(buckets.parse("gs://own/runs/a"))
    assert train(steps=3) == 0
    staging._staged["gs://own/runs/a"] = early
    assert train(steps=5) == 0
    assert_same_as(whole)


def test_an_unfinished_checkpoint_is_none(bucket, whole):
    assert train(steps=4) == 0
    bucket.blob("runs/a/checkpoints/4/commit_success.txt").delete()
    forget()
    assert checkpoint.steps(staging.folder("gs://own/runs/a")) == [2]
    assert train(steps=5) == 0
    assert_same_as(whole)


def test_a_damaged_checkpoint_is_set_aside(bucket, whole, capsys):
    assert train(steps=4) == 0
    bucket.blob("runs/a/checkpoints/4/state/manifest.ocdbt").upload_from_string("other")
    forget()
    assert train(steps=5) == 0
    assert "checkpoint 4 in gs://own/runs/a/checkpoints is damaged" in capsys.readouterr().err
    assert checkpoint.steps(staging.folder("gs://own/runs/a")) == [4, 5]
    assert any(name.startswith("checkpoints/4.damaged/") for name in objects())
    assert_same_as(whole)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_that_is_ended_goes_on(bucket, whole, number):
    child = subprocess.Popen(
        [*training.CHILD, *training.command("gs://own/runs/a", **EVERY, steps=100_000)],
        env=training.child_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    deadline = time.monotonic() + 300
    while "checkpoints/2/commit_success.txt" not in objects():
        assert child.poll() is None, child.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    child.send_signal(number)
    said = child.communicate(timeout=120)[0]
    assert child.returncode == (-number if number == signal.SIGKILL else 130), said
    assert ("in_use" in objects()) == (number == signal.SIGKILL)
    step = max(checkpoint.steps(staging.folder("gs://own/runs/a")))
    last = len(staging.folder("gs://own/runs/a").joinpath("metrics.jsonl").read_text().splitlines())
    assert last >= step  # the rows of every checkpoint are there
    if number == signal.SIGTERM:
        assert "everything is saved in gs://own/runs/a; go on with: dcmdp train" in said
        assert "--workdir gs://own/runs/a\n" in said
    forget()
    assert train(steps=step + 1) == 0
    rows = training.rows(staging.folder("gs://own/runs/a"))
    assert [row["step"] for row in rows] == list(range(1, step + 2))
    first = training.rows(whole)[: len(rows)]
    assert rows[: len(first)] == first


def test_a_second_run_is_refused(bucket, capsys):
    with staging.Staged(buckets.parse("gs://own/runs/a")).take():
        assert train(steps=1) == 2
    said = capsys.readouterr().err
    assert "dcmdp: gs://own/runs/a is in use by process " in said
    assert "choose another --workdir" in said
    assert objects() == {}


def test_a_run_that_is_taken_over_ends_and_saves_nothing_more(bucket, monkeypatch, capsys):
    check = staging.Lock.check
    checks = itertools.count(1)

    def taken_at_the_third(lock):  # after those of the claim and of the starting checkpoint
        if next(checks) == 3:
            bucket.blob("runs/a/in_use").upload_from_string("process 1 on elsewhere")
            lock._renewed -= staging.LEASE
        check(lock)

    monkeypatch.setattr(staging.Lock, "check", taken_at_the_third)
    assert train(steps=4) == 1
    said = capsys.readouterr().err
    assert "gs://own/runs/a was taken over by another run while this one did not an" in said
    assert "Traceback" not in said
    assert checkpoint.steps(staging.folder("gs://own/runs/a")) == [0]
    assert bucket.blob("runs/a/in_use").download_as_text() == "process 1 on elsewhere"


def test_an_error_of_the_bucket_ends_the_run_with_a_sentence(bucket, monkeypatch, capsys):
    def refuse(manager, step, **_):
        raise RuntimeError("403: this account may not write")

    monkeypatch.setattr(ocp.CheckpointManager, "save", refuse)
    assert train(steps=2) == 1
    assert (
        "dcmdp: a checkpoint cannot be written to gs://own/runs/a/checkpoints: 403: this account "
        "may not write; go on with: dcmdp train "
    ) in capsys.readouterr().err
    assert "in_use" not in objects()


@pytest.fixture
def between(tmp_path, monkeypatch):
    """What stands before a server whose bucket `own` no process has used."""
    monkeypatch.setattr(staging, "_staged", {})
    between = gcs_server.Between()
    with gcs_server.serve(between):
        yield between
    between.close()


def test_a_bucket_that_refuses_now_and_then_holds_the_same_run(between, whole):
    """Every ninth request is answered by 503 or 429: those of all three libraries are repeated."""
    between.refuse = lambda number, method: 503 - 74 * (number % 2) if number % 9 == 0 else None
    assert train(steps=2) == 0
    assert between.refused.count(503) > 3 and between.refused.count(429) > 3
    forget()
    assert checkpoint.steps(staging.folder("gs://own/runs/a")) == [0, 2]
    assert training.rows(staging.folder("gs://own/runs/a")) == training.rows(whole)[:2]


def test_a_bucket_that_may_be_read_alone_is_refused_before_anything_is_compiled(
    between, monkeypatch, capsys
):
    monkeypatch.setattr(checkpoint, "Checkpoints", None)
    between.refuse = lambda number, method: None if method == "GET" else 403
    assert train(steps=2) == 2
    said = capsys.readouterr().err
    assert "dcmdp: gs://own/runs/a/in_use may not be used by this account" in said
    assert "Storage Object Admin" in said and "Traceback" not in said


def together(steps, secret):
    """What two processes of a run print, and their statuses."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    command = [*training.CHILD, "train", HOSTS, "--workdir", "gs://own/runs/a"]
    command += ["--steps", str(steps), "--coordinator", coordinator, "--processes", "2"]
    children = [
        subprocess.Popen(
            [*command, "--process", str(number)],
            env=training.child_environment() | {"DCMDP_SECRET": secret},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number in range(2)
    ]
    said = [child.communicate(timeout=300)[0] for child in children]
    return said, [child.returncode for child in children]


def test_two_processes_of_a_bucket_are_one_of_a_folder(bucket):
    said, statuses = together(2, secret="")
    assert statuses == [2, 2]
    assert all("give all processes the same DCMDP_SECRET, of 16 ch" in text for text in said), said
    assert all("gcsfs" not in text for text in said), said  # which would ask Google
    for steps in (2, 4):
        said, statuses = together(steps, secret="sixteen characters")
        assert statuses == [0, 0], "\n\n".join(said)
    forget()
    alone = ["train", HOSTS, "--workdir", "gs://own/runs/a", "--steps", "5"]
    assert training.dcmdp(alone, jax.devices()[:2]) == 0  # goes on in one process
    for steps in ("2", "4", "5"):
        words = ["train", HOSTS, "--workdir", "here", "--steps", steps]
        assert training.dcmdp(words, jax.devices()[:2]) == 0
    assert training.rows(staging.folder("gs://own/runs/a")) == training.rows(pathlib.Path("here"))
    assert checkpoint.steps(staging.folder("gs://own/runs/a"))[-1] == 5


def test_weights_go_to_a_bucket_and_come_from_one(bucket, tmp_path):
    assert train(steps=2) == 0
    words = ["convert", training.QUICKSTART]
    assert training.dcmdp([*words, str(tmp_path / "out"), "--workdir", "gs://own/runs/a"]) == 0
    assert training.dcmdp([*words, "gs://own/out", "--workdir", "gs://own/runs/a"]) == 0
    _, here = weights.load(tmp_path / "out")
    run = training.tiny(**{"model.folder": "gs://own/out", "warmup.steps": 0, "steps": 1})
    training.train(run, pathlib.Path("from"))
    assert '"folder": "gs://own/out#' in pathlib.Path("from", "config.json").read_text()
    (cached,) = pathlib.Path(tmp_path, "cache", "dcmdp_jax", "own", "out").iterdir()
    _, there = weights.load(cached)
    jax.tree.map(np.testing.assert_array_equal, here, there)
