"""Work folders in a bucket: `gs://BUCKET/PATH`.

A temporary local folder stands for such a work folder. It begins with what the bucket holds and is
written as any work folder is; its changed files become objects, whole, before every checkpoint, at
the end, and now and then between. Checkpoints never lie in it: Orbax writes them to the bucket,
where a checkpoint is finished by an object that is written last.

Process 0 alone writes, and holds the lock: an object with a holder's name, which a holder rewrites
all the time. One that is not rewritten for LEASE seconds is a dead process's and is taken over.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import pathlib
import socket
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator

from dcmdp_jax import buckets
from dcmdp_jax.buckets import Address

LOCK = "in_use"  # the name of the lock; that of a local folder is never uploaded
LEASE = 60.0  # seconds
RENEWAL = 10.0  # seconds between two writes of a lock
UPLOAD = 60.0  # seconds between two uploads of a run that goes on
# parts of the paths of what is never in the local folder, or is of use there alone
IN_BUCKET_ALONE = {"checkpoints", "frozen"}
LOCAL_ALONE = {LOCK, "wandb"}

_staged: dict[str, Staged] = {}  # of this process, by address


def folder(text: str) -> pathlib.Path:
    """Returns a work folder: a path as it is, or the local folder that stands for an address, with
    what the bucket holds.

    Raises ValueError or OSError, in one sentence, if the bucket cannot be used.
    """
    address = buckets.parse(text)
    if address is None:
        return pathlib.Path(text)
    if address.pin:
        raise ValueError(f"--workdir {text} names a folder of one time; leave the # out")
    if str(address) not in _staged:
        _staged[str(address)] = Staged(address)
    return _staged[str(address)].folder


def of(workdir: pathlib.Path) -> Staged | None:
    """Returns what stands behind a work folder or a folder in it, or None if it is a local one."""
    return next((run for run in _staged.values() if workdir.is_relative_to(run.folder)), None)


def root(workdir: pathlib.Path) -> str:
    """Returns where the checkpoints of a work folder lie, as a path or an address."""
    staged = of(workdir)
    if staged is None:
        return str(workdir.absolute())
    part = workdir.relative_to(staged.folder).as_posix()
    return str(staged.address) if part == "." else f"{staged.address}/{part}"


def upload(workdir: pathlib.Path) -> None:
    """Writes the changed files of a work folder to its bucket; nothing if it is a local one."""
    if staged := of(workdir):
        staged.upload()


def upload_all() -> None:
    """Writes the changed files of all work folders of this process to their buckets."""
    for staged in _staged.values():
        if not staged.lost:
            staged.upload()


@contextlib.contextmanager
def uploaded(workdir: pathlib.Path) -> Iterator[None]:
    """A block at whose end, however it ends, the changed files are written to the bucket."""
    try:
        yield
    finally:
        upload(workdir)


def shown(text: str) -> str:
    """Returns `text` with the addresses of work folders for the local folders that stand for
    them.
    """
    for staged in _staged.values():
        text = text.replace(str(staged.folder), str(staged.address))
    return text


class Staged:
    """A work folder in a bucket, and the local folder that stands for it."""

    def __init__(self, address: Address):
        self.address = address
        self.writes = True  # False on the processes of a run but the first
        self._lock: Lock | None = None
        self._mutex = threading.Lock()
        _prepare_orbax(address)
        buckets.check_bucket(address)
        temporary = tempfile.TemporaryDirectory(prefix="dcmdp-")
        atexit.register(temporary.cleanup)
        self.folder = pathlib.Path(temporary.name).resolve() / pathlib.PurePath(address.path).name
        self.folder.mkdir()
        self._generations: dict[str, int] = {}  # of what was downloaded
        self._uploaded: dict[str, tuple[int, int]] = {}
        self.refresh()

    def refresh(self) -> None:
        """Makes the local folder what the bucket holds now."""
        with self._mutex:
            while True:
                with contextlib.suppress(buckets.Gone):  # a run that goes on has written it
                    self._download()
                    break
            self._uploaded = self._signatures()

    def _download(self) -> None:
        found = {
            name: number
            for name, number in buckets.listing(self.address).items()
            if _is_staged(name, LOCAL_ALONE | IN_BUCKET_ALONE)
        }
        for name in self._signatures().keys() - found.keys():
            (self.folder / name).unlink()
        for name, number in found.items():
            if self._generations.get(name) != number or not (self.folder / name).is_file():
                buckets.download(_join(self.address, name), number, self.folder / name)
                self._generations[name] = number

    def upload(self) -> None:
        """Writes the files that have changed, and deletes the objects of those that are gone.

        Raises OSError if the bucket cannot be used, or another process has taken the lock.
        """
        if not self.writes:
            return
        with self._mutex:
            if self._lock:
                self._lock.check()
            now = self._signatures()
            for name, signature in now.items():
                if self._uploaded.get(name) != signature:
                    with contextlib.suppress(FileNotFoundError):  # renamed meanwhile
                        buckets.upload(self.folder / name, _join(self.address, name))
                        self._uploaded[name] = signature
                        self._generations.pop(name, None)
            for name in self._uploaded.keys() - now.keys():
                buckets.delete(_join(self.address, name))
                del self._uploaded[name]

    @property
    def lost(self) -> bool:
        """True if another process has taken the lock of this one."""
        return self._lock is not None and self._lock.lost

    def take(self) -> Lock:
        """Locks the work folder, and uploads now and then until the lock is closed.

        Raises ValueError if another process has the lock.
        """
        self._lock = Lock(_join(self.address, LOCK), str(self.address), self.upload)
        return self._lock

    def _signatures(self) -> dict[str, tuple[int, int]]:
        """The size and time of each file, by its path."""
        signatures = {}
        for path in self.folder.rglob("*"):
            name = path.relative_to(self.folder).as_posix()
            with contextlib.suppress(FileNotFoundError):
                if (
                    path.is_file()
                    and not path.name.startswith(".")
                    and _is_staged(name, LOCAL_ALONE)
                ):
                    state = path.stat()
                    signatures[name] = (state.st_size, state.st_mtime_ns)
        return signatures


class Lock:
    """The lock of a work folder in a bucket, until it is closed or the process ends."""

    def __init__(self, address: Address, shown: str, upload: Callable[[], None]):
        self._address = address
        self._shown = shown
        self._upload = upload
        self._holder = (
            f"process {os.getpid()} on {socket.gethostname()} ({uuid.uuid4().hex[:8]})".encode()
        )
        self.lost = False
        self._generation = self._take()
        self._renewed = time.monotonic()
        self._mutex = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew_until_closed, daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def check(self) -> None:
        """Raises OSError if another process has taken the lock, or it cannot be renewed."""
        if self._ended.is_set():
            return
        with self._mutex:
            if not self.lost and time.monotonic() - self._renewed > LEASE / 2:
                self._renew()
            if self.lost:
                raise OSError(
                    f"{self._shown} was taken over by another run while this one did not answer; "
                    "nothing more is written there"
                )

    def close(self) -> None:
        """Gives the lock up."""
        if self._ended.is_set():
            return
        self._ended.set()
        atexit.unregister(self.close)
        self._thread.join()
        if not self.lost:
            with contextlib.suppress(OSError):  # it ends by itself
                buckets.delete(self._address, self._generation)

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def _take(self) -> int:
        taken = buckets.write(self._address, self._holder, before=0)
        if taken is None and (found := buckets.read(self._address)):
            holder, number = found
            if holder == self._holder:  # the answer was lost
                return number
            name = holder.decode(errors="replace")
            print(
                f"{self._shown} is locked by {name}; waiting {LEASE:.0f} s for a sign of it",
                file=sys.stderr,
                flush=True,
            )
            refusal = ValueError(
                f"{self._shown} is in use by {name}; wait until it ends, or choose another "
                "--workdir"
            )
            end = time.monotonic() + LEASE
            while time.monotonic() < end:
                time.sleep(RENEWAL / 2)
                current = buckets.generation(self._address)
                if current is None:
                    break
                if current != number:
                    raise refusal
            taken = buckets.write(self._address, self._holder, before=number)
        if taken is None:  # given up meanwhile
            taken = buckets.write(self._address, self._holder, before=0)
        if taken is None:
            raise ValueError(f"another process locks {self._shown} just now; try again")
        return taken

    def _renew(self) -> None:
        """Rewrites the lock. Raises OSError if the bucket cannot be used."""
        number = buckets.write(self._address, self._holder, before=self._generation)
        if number is None:
            found = buckets.read(self._address)
            if not found or found[0] != self._holder:
                self.lost = True
                return
            number = found[1]  # written, and the answer was lost
        self._generation = number
        self._renewed = time.monotonic()

    def _renew_until_closed(self) -> None:
        uploaded = time.monotonic()
        while not self._ended.wait(RENEWAL) and not self.lost:
            with contextlib.suppress(OSError, ValueError):  # tried again
                with self._mutex:
                    self._renew()
                if not self.lost and time.monotonic() - uploaded > UPLOAD:
                    self._upload()
                    uploaded = time.monotonic()


def _is_staged(name: str, left_out: set[str]) -> bool:
    return left_out.isdisjoint(name.split("/"))


def _join(address: Address, name: str) -> Address:
    return address._replace(path=f"{address.path}/{name}")


def _prepare_orbax(address: Address) -> None:
    """Lets Orbax's libraries see what others write, and use the server that Google's library is
    told to use. Raises ValueError if one is missing.
    """
    if server := os.environ.get("STORAGE_EMULATOR_HOST"):
        os.environ.setdefault("TENSORSTORE_GCS_HTTP_URL", server)
        # read by the import: it would ask Google what kind of bucket this is
        os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    try:
        import gcsfs  # noqa: F401
    except ImportError:
        raise ValueError(
            f"{address} needs gcsfs, which is not installed; pip install 'dcmdp-jax[buckets]'"
        ) from None
    import fsspec.config

    # gcsfs would keep its lists of objects, and never see what TensorStore or another process adds
    fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
