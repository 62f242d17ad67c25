"""A folder's lock, which ends with the process that holds it, however it ends."""

from __future__ import annotations

import errno
import fcntl
import os
import pathlib
import socket
import sys
from typing import IO

FILE = "in_use"
TAKEN = (errno.EACCES, errno.EAGAIN)


def take(folder: pathlib.Path) -> IO[str]:
    """Locks `folder`, which is made where it is missing, until the result is closed.

    POSIX record locks work over NFS, and no forked child keeps them. Where the file system has none,
    this is said and the folder is not locked. Raises ValueError, with its process and host, where
    another process holds the lock.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / FILE, "a+", encoding="utf-8")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in TAKEN:
            with file:
                file.seek(0)
                owner = file.read().strip() or "another process"
            raise ValueError(f"{folder} is in use by {owner}; wait until it ends, or choose another "
                             "--workdir") from None
        print(f"{folder} cannot be locked ({error.strerror}); see that no other run uses it",
              file=sys.stderr)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file
