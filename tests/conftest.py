"""Eight simulated CPU devices for every test, set before JAX reads its environment.

And programs shared by all.
"""

import contextlib
import os
import tempfile

import pytest
from hypothesis import settings

# On a shared machine an example may wait; the tests that bound a time do so themselves.
settings.register_profile("shared", deadline=None)
settings.load_profile("shared")
os.environ["JAX_PLATFORMS"] = "cpu"
# Most of a test's time is compilation; the cheaper passes of LLVM are enough for shapes this small.
_FLAGS = (
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=1 "
    "--xla_llvm_disable_expensive_passes=true"
)
if _FLAGS not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAGS}".strip()
# Tests train the same few models over and over: what one has compiled, the others, their workers
# and their children read.
_COMPILED = None
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _COMPILED = tempfile.TemporaryDirectory(prefix="dcmdp-tests-")
    os.environ |= {
        "JAX_COMPILATION_CACHE_DIR": _COMPILED.name,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
    }

import jax  # noqa: E402  (reads the environment as set above)

from support import own_data  # noqa: E402


@pytest.fixture(autouse=True)
def folder_of_its_own():
    """A test sees no run of the directory that pytest was started in, and leaves none there."""
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        yield


@pytest.fixture
def one_device(monkeypatch):
    """A run takes every device; here it gets one, so that a step compiles quickly."""
    devices = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *args: devices)


@pytest.fixture(scope="session", params=own_data.TOKENIZERS)
def chat_folder(request, tmp_path_factory):
    """A folder with tokenizer.json and chat_template.jinja: our own, and Qwen3's."""
    if request.param == "qwen3":
        return own_data.SHARED / "qwen3_tokenizer"
    return own_data.write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session", params=own_data.ROOTS)
def data_root(request, tmp_path_factory):
    """A folder with math_eval/ and gsm8k/: our own dozen rows each, and the published ones."""
    if request.param == "published":
        return own_data.SHARED
    return own_data.write_sets(tmp_path_factory.mktemp("sets"))


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """A process may map 65,530 areas of memory, and a worker that keeps every file's programs is
    ended by LLVM past that.
    """
    yield
    jax.clear_caches()
