"""A folder's lock, which ends with the process that holds it, however it ends."""

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
TAKEN = (errno.EACCES, errno.EAGAIN)

# What this process holds: POSIX gives it the same lock twice, and drops both with the first.
_held: weakref.WeakValueDictionary[pathlib.Path, IO[str]] = weakref.WeakValueDictionary()


def take(folder: pathlib.Path) -> IO[str]:
    """Locks `folder`, which is made where it is missing, until the result is closed.

    POSIX record locks work over NFS, and no forked child keeps them. Where the file system has
    none, this is said and the folder is not locked. Raises ValueError, with its process and host,
    where the lock is held.
    """
    folder.mkdir(parents=True, exist_ok=True)
    mine = _held.get(folder.resolve())
    if mine is not None and not mine.closed:
        raise ValueError(
            f"{folder} is in use by another run of this process; wait until it ends, or "
            "choose another --workdir"
        )
    file = open(folder / FILE, "a+", encoding="utf-8")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in TAKEN:
            with file:
                file.seek(0)
                owner = file.read().strip() or "another process"
            raise ValueError(
                f"{folder} is in use by {owner}; wait until it ends, or choose another --workdir"
            ) from None
        print(
            f"{folder} cannot be locked ({error.strerror}); see that no other run uses it",
            file=sys.stderr,
        )
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    _held[folder.resolve()] = file
    return file
