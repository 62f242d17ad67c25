"""A folder for weights under the machine's temporary folder, which no killed process leaves behind
for good: the next that makes one removes those of processes that have ended.
"""

from __future__ import annotations

import fcntl
import os
import pathlib
import shutil
import tempfile
import weakref


class Folder(tempfile.TemporaryDirectory):
    """A temporary folder that is locked while this process needs it."""

    def __init__(self, parent: pathlib.Path):
        super().__init__(dir=parent, ignore_cleanup_errors=True)
        lock = _locked(pathlib.Path(self.name))
        if lock is not None:
            weakref.finalize(self, os.close, lock)


def make_folder() -> Folder:
    """Returns an empty folder, and removes what killed processes of this user have left.

    Raises ValueError if another user has taken the place of these folders.
    """
    parent = pathlib.Path(tempfile.gettempdir(), f"dcmdp-weights-of-user-{os.getuid()}")
    parent.mkdir(mode=0o700, exist_ok=True)
    if parent.is_symlink() or parent.stat().st_uid != os.getuid():
        raise ValueError(
            f"{parent} belongs to another user; set --rollout.weights_folder to a folder that the "
            "server sees under the same path, or TMPDIR to another temporary folder"
        )
    with (parent / "lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # a folder is made and locked before another looks at it
        for path in parent.iterdir():
            lock = _locked(path) if path.is_dir() else None
            if lock is not None:
                shutil.rmtree(path, ignore_errors=True)
                os.close(lock)
        return Folder(parent)


def _locked(folder: pathlib.Path) -> int | None:
    """Locks `folder` until the process ends or closes the returned descriptor.

    Returns None if another process has locked it, it is gone, or its file system has no locks.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor
