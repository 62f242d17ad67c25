"""The lock of a work folder: one process at a time, and none once that is gone."""

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys

import pytest

from dcmdp_jax.run import lock

HOLD = (
    "import pathlib, sys, time\nfrom dcmdp_jax.run import lock\n"
    "held = lock.take(pathlib.Path(sys.argv[1]))\nprint('held', flush=True)\ntime.sleep(120)\n"
)


@pytest.fixture
def holder(tmp_path):
    child = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout.readline() == "held\n"
    yield child
    child.kill()
    child.wait()


def test_a_folder_in_use_is_refused_with_its_process_and_is_free_after_sigkill(tmp_path, holder):
    with pytest.raises(ValueError) as error:
        lock.take(tmp_path / "run")
    assert str(error.value) == (
        f"{tmp_path / 'run'} is in use by process {holder.pid} on {socket.gethostname()}; "
        "wait until it ends, or choose another --workdir"
    )
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with lock.take(tmp_path / "run") as held:
        assert (
            tmp_path / "run" / lock.FILE
        ).read_text() == f"process {os.getpid()} on {socket.gethostname()}\n"
    assert held.closed


def test_a_look_refuses_a_folder_in_use(tmp_path, holder):
    with pytest.raises(ValueError, match=f"is in use by process {holder.pid} "):
        lock.check(tmp_path / "run")


def test_a_look_refuses_a_folder_that_this_process_uses(tmp_path):
    with lock.take(tmp_path), pytest.raises(ValueError, match="another run of this process"):
        lock.check(tmp_path)


def test_a_look_leaves_no_trace(tmp_path):
    lock.check(tmp_path)
    lock.check(tmp_path / "absent")
    assert not list(tmp_path.iterdir())


def test_a_refused_process_does_not_take_the_lock_away(tmp_path, holder):
    for _ in range(2):
        with pytest.raises(ValueError, match=f"process {holder.pid} "):
            lock.take(tmp_path / "run")


def test_a_process_takes_a_folder_once_until_it_lets_it_go(tmp_path):
    in_use = pytest.raises(ValueError, match="is in use by another run of this process")
    with lock.take(tmp_path / "run"), in_use:
        lock.take(tmp_path / "other" / ".." / "run")
    lock.take(tmp_path / "run").close()
    lock.take(tmp_path / "run")  # nobody keeps it
    lock.take(tmp_path / "run").close()


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, capsys):
    def refuse(*args):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with lock.take(tmp_path):
        pass
    assert (
        f"{tmp_path} cannot be locked (No locks available); see that no other run uses it"
        in capsys.readouterr().err
    )
