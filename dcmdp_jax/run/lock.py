"""The lock of a folder, which ends with the process that holds it, however that ends."""

from __future__ import annotations

import errno
import fcntl
import os
import pathlib
import socket
import sys
import weakref
from typing import IO

FILE = "in_use"
HELD_ERRORS = (errno.EACCES, errno.EAGAIN)  # of `fcntl.lockf` where another process has the lock

# Locks of this process: POSIX would give it the same lock twice, and drop both with the first.
_held: weakref.WeakValueDictionary[pathlib.Path, IO[str]] = weakref.WeakValueDictionary()


def check(folder: pathlib.Path) -> None:
    """Raises ValueError where `take` would, and leaves the folder as it is."""
    _check_own(folder)
    path = folder / FILE
    if not path.is_file():
        return
    with path.open("r+", encoding="utf-8") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in HELD_ERRORS:
                raise _in_use(folder, file) from None


def take(folder: pathlib.Path) -> IO[str]:
    """Locks `folder` until the returned file is closed; makes the folder where it is missing.

    The lock is a POSIX record lock: it works over NFS, and no forked child holds it. Where the file
    system has no locks, a warning is printed and the folder is not locked. Raises ValueError, with
    the process and host that hold it, where the folder is locked.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _check_own(folder)
    file = (folder / FILE).open("a+", encoding="utf-8")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in HELD_ERRORS:
            with file:
                raise _in_use(folder, file) from None
        print(
            f"{folder} cannot be locked ({error.strerror}); see that no other run uses it",
            file=sys.stderr,
        )
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    _held[folder.resolve()] = file
    return file


def _check_own(folder: pathlib.Path) -> None:
    """Raises ValueError where this process has the lock: it would get it a second time."""
    own = _held.get(folder.resolve())
    if own is not None and not own.closed:
        raise ValueError(
            f"{folder} is in use by another run of this process; wait until it ends, or choose "
            "another --workdir"
        )


def _in_use(folder: pathlib.Path, file: IO[str]) -> ValueError:
    """The error that names the holder of a lock."""
    file.seek(0)
    holder = file.read().strip() or "another process"
    return ValueError(
        f"{folder} is in use by {holder}; wait until it ends, or choose another --workdir"
    )
