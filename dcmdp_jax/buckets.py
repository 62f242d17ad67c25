"""Objects of Google Cloud Storage, and the model folders and problem files that lie there.

An address is `gs://BUCKET/PATH`. `gs://BUCKET/PATH#PIN` is what lay there at one time: PIN is the
generation of an object, or a digest of the names and generations of a folder's objects. What is
downloaded stays in the folder `dcmdp_jax` of XDG_CACHE_HOME (by default ~/.cache).

Credentials are those that Google's library finds, and STORAGE_EMULATOR_HOST names another server.
The library repeats what fails for a while (429, 5xx, lost connections) for two minutes.
"""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import hashlib
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from dcmdp_jax import files

_ADDRESS = re.compile(r"gs://(?P<bucket>[\w.-]+)/(?P<path>[^#]*[^#/])/*(#(?P<pin>\w+))?")


class Gone(ValueError):
    """An object has been replaced or deleted."""


class Patterns(NamedTuple):
    """Which of a folder's objects are a model's, by the shell's patterns of their names."""

    allowed: Sequence[str]
    ignored: Sequence[str]


class Address(NamedTuple):
    """An address, split into its parts."""

    bucket: str
    path: str
    pin: str | None

    def __str__(self) -> str:
        return f"gs://{self.bucket}/{self.path}"


def parse(text: str) -> Address | None:
    """Returns the parts of an address, or None for a path.

    Raises ValueError on an address that is not read.
    """
    if "://" not in text:
        return None
    found = _ADDRESS.fullmatch(text)
    if found is None:
        raise ValueError(f"{text} is no address that is read; give a path, or gs://BUCKET/PATH")
    return Address(found["bucket"], found["path"], found["pin"])


# Objects


def check_bucket(address: Address) -> None:
    """Raises OSError if there is no such bucket, or if its settings may not be read, as Orbax
    does.
    """
    _ask(address, lambda client: client.get_bucket(address.bucket))


def listing(address: Address) -> dict[str, int]:
    """Returns the generation of each object in a folder, by its path there."""
    prefix = address.path + "/"
    objects = _ask(address, lambda client: list(client.list_blobs(address.bucket, prefix=prefix)))
    found = {item.name.removeprefix(prefix): item.generation for item in objects}
    # some programs make an object for a folder
    return {name: number for name, number in found.items() if name and not name.endswith("/")}


def generation(address: Address) -> int | None:
    """Returns the generation of an object, or None if there is none."""
    item = _ask(address, lambda client: client.bucket(address.bucket).get_blob(address.path))
    return None if item is None else item.generation


def read(address: Address) -> tuple[bytes, int] | None:
    """Returns an object's content with its generation, or None if there is none."""
    while number := generation(address):

        def download(client: Any, number: int = number) -> bytes:
            return _blob(client, address, number).download_as_bytes()

        content = _ask(address, download, missing=None)
        if content is not None:  # else replaced meanwhile
            return content, number
    return None


def write(address: Address, content: bytes, before: int) -> int | None:
    """Writes an object if its generation is `before`, 0 for none; returns its new generation.

    Returns None if it is another: then nothing is written. Where an answer was lost and the request
    repeated, that may have been done by this call.
    """

    def upload(client: Any) -> int:
        blob = _blob(client, address)
        blob.upload_from_string(content, if_generation_match=before)
        return blob.generation

    return _ask(address, upload, changed=None)


def delete(address: Address, before: int | None = None) -> None:
    """Deletes an object, if it is there, and of the generation `before` if one is given."""

    def remove(client: Any) -> None:
        _blob(client, address).delete(if_generation_match=before)

    _ask(address, remove, missing=None, changed=None)


def upload(file: pathlib.Path, address: Address) -> None:
    """Writes a file as an object, which readers see complete or not at all."""
    _ask(address, lambda client: _blob(client, address).upload_from_filename(file))


def download(address: Address, number: int, file: pathlib.Path) -> None:
    """Writes an object of generation `number` to a file, complete or not at all; its checksum is
    compared.

    Raises Gone if there is no such generation.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with files.atomic_path(file) as temporary:

        def fetch(client: Any) -> bool:
            _blob(client, address, number).download_to_filename(temporary)
            return True

        if not _ask(address, fetch, missing=False):
            raise Gone(f"{address} is no longer what it was; {_REMEDY}")


# Models and problems

_CONFIGURATIONS = ("config.json", "adapter_config.json")

_REMEDY = "put the old content back, or start a new run, in another --workdir"


def pinned_file(address: Address) -> str:
    """Returns the address of an object with its generation.

    Raises ValueError if there is none.
    """
    number = address.pin or generation(address)
    if number is None:
        raise ValueError(f"{address} does not exist; correct the address")
    return f"{address}#{number}"


def file(address: Address) -> str:
    """Returns the path of an object in the cache, downloaded if it is not there."""
    if address.pin is None:
        address = parse(pinned_file(address))
    path = _cache(address) / pathlib.PurePosixPath(address.path).name
    if not path.is_file():
        if not address.pin.isdecimal():
            raise ValueError(f"{address}#{address.pin} names no generation; leave the # out")
        download(address, int(address.pin), path)
    return str(path)


def pinned_folder(address: Address, patterns: Patterns) -> str:
    """Returns the address of a folder with the digest of those of its objects that match.

    Raises ValueError if there is none, or if the address has another digest.
    """
    return f"{address}#{_digest(_matching(address, patterns))}"


def folder(address: Address, patterns: Patterns, wanted: Sequence[str]) -> str:
    """Returns the path of a folder in the cache, with those matching objects downloaded that
    are in `wanted`. Raises ValueError as `pinned_folder` does.
    """
    found = _matching(address, patterns)
    cached = _cache(address._replace(pin=_digest(found)))
    for name, number in found.items():
        if _matches(name, wanted) and not (cached / name).is_file():
            download(address._replace(path=f"{address.path}/{name}"), number, cached / name)
    return str(cached)


@contextlib.contextmanager
def local_folder(text: str) -> Iterator[str]:
    """Yields the path of a folder to write a model to: `text` itself, or one whose files become the
    objects of that address when the block ends. The configuration is the last of them, without
    which no folder is read.

    Raises ValueError if there are objects at that address already.
    """
    address = parse(text)
    if address is None:
        yield text
        return
    if address.pin or listing(address):
        raise ValueError(f"{text} holds objects or is pinned; give a new address")
    with tempfile.TemporaryDirectory(prefix="dcmdp-") as temporary:
        local = pathlib.Path(temporary) / "model"
        yield str(local)
        paths = sorted(local.iterdir(), key=lambda path: path.name in _CONFIGURATIONS)
        for path in paths:
            upload(path, address._replace(path=f"{address.path}/{path.name}"))


@contextlib.contextmanager
def local_file(text: str) -> Iterator[pathlib.Path]:
    """Yields the path of a file to write or to go on with: `text` itself, or one that begins as the
    object of that address and becomes it when the block ends, also by an exception.

    Raises OSError if it cannot be written then, or if another program has written the object
    meanwhile; the file is kept, and the sentence names it.
    """
    address = parse(text)
    if address is None:
        yield pathlib.Path(text)
        return
    if address.pin:
        raise ValueError(f"{text} is pinned; leave the # out")
    before, number = read(address) or (b"", 0)
    path = pathlib.Path(tempfile.mkdtemp(prefix="dcmdp-"), pathlib.PurePosixPath(address.path).name)
    if number:
        path.write_bytes(before)
    try:
        yield path
    except ValueError as error:
        error.args = (str(error).replace(str(path), text),)
        raise
    finally:
        if path.is_file() and path.read_bytes() != before:
            _upload_or_keep(path, address, number)
        shutil.rmtree(path.parent)


def _upload_or_keep(path: pathlib.Path, address: Address, before: int) -> None:
    """Writes a file as an object whose generation is `before`; raises OSError if it is not."""
    content = path.read_bytes()
    kept = f"what was to be written is in {path}"
    try:
        written = write(address, content, before)
    except OSError as error:
        raise OSError(f"{error}; {kept}") from error
    if written is None and (read(address) or (b"", 0))[0] != content:
        raise OSError(f"another program has written {address} meanwhile; {kept}")


def _matching(address: Address, patterns: Patterns) -> dict[str, int]:
    found = {
        name: number
        for name, number in listing(address).items()
        if _matches(name, patterns.allowed) and not _matches(name, patterns.ignored)
    }
    if not found:
        raise ValueError(f"{address} holds no model; correct the address of the folder")
    if address.pin not in (None, _digest(found)):
        raise ValueError(f"{address} is no longer what it was; {_REMEDY}")
    return found


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _digest(found: Mapping[str, int]) -> str:
    lines = "\n".join(f"{name} {number}" for name, number in sorted(found.items()))
    return hashlib.sha256(lines.encode()).hexdigest()[:16]


def _cache(address: Address) -> pathlib.Path:
    root = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(root) / "dcmdp_jax" / address.bucket / address.path / f"#{address.pin}"


# The library

_RAISE = object()


@functools.cache
def _client() -> Any:
    from google.cloud import storage

    return storage.Client()


def _blob(client: Any, address: Address, number: int | None = None) -> Any:
    return client.bucket(address.bucket).blob(address.path, generation=number)


def _ask(
    address: Address,
    request: Callable[[Any], Any],
    missing: Any = _RAISE,
    changed: Any = _RAISE,
) -> Any:
    """Returns what the library answers; `missing` where there is no such object, and `changed`
    where it is of another generation, if these are given.

    Raises OSError, with the remedy, if the bucket cannot be used, and ValueError if there is no
    library.
    """
    try:
        import requests
        from google.api_core import exceptions
        from google.auth.exceptions import GoogleAuthError
        from google.cloud.storage.exceptions import DataCorruption, InvalidResponse
    except ImportError:
        raise ValueError(
            f"{address} needs google-cloud-storage, which is not installed; pip install "
            "'dcmdp-jax[buckets]'"
        ) from None
    try:
        return request(_client())
    except exceptions.NotFound as error:
        if missing is not _RAISE:
            return missing
        cause = error
        what = f"does not exist, or its bucket {address.bucket}; correct the address"
    except exceptions.PreconditionFailed as error:
        if changed is not _RAISE:
            return changed
        cause = error
        what = f"was changed meanwhile ({_first_line(error)}); try again"
    except (exceptions.Forbidden, exceptions.Unauthorized) as error:
        cause = error
        what = (
            f"may not be used by this account ({_first_line(error)}); give it roles of the bucket: "
            "Storage Object Viewer to read, and for a run Storage Object Admin and Storage Legacy "
            "Bucket Reader"
        )
    except GoogleAuthError as error:
        cause = error
        what = (
            f"needs an account ({_first_line(error)}); log in with `gcloud auth "
            "application-default login`"
        )
    except FileNotFoundError:  # of a file here
        raise
    except (
        exceptions.GoogleAPIError,
        requests.RequestException,
        InvalidResponse,
        DataCorruption,
        OSError,
    ) as error:
        cause = error
        what = f"cannot be reached ({_first_line(error)}); try again where there is a network"
    raise OSError(f"{address} {what}") from cause


def _first_line(error: Exception) -> str:
    line = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {line[:200]}"
