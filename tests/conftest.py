"""Sets eight simulated CPU devices and one compilation cache before JAX reads its environment, and
holds the fixtures that several files use.
"""

import contextlib
import os
import tempfile

import pytest
from hypothesis import settings

# An example may be slow on a busy machine. Tests that bound a time do so themselves.
settings.register_profile("shared", deadline=None)
settings.load_profile("shared")
os.environ["JAX_PLATFORMS"] = "cpu"
# Compilation takes most of a test's time, and shapes this small need no optimization. Notebooks and
# the README's first command run with XLA's own settings. libtpu, which reads the flags too, refuses
# the one that turns off the fusion emitters, but not this option.
_FLAGS = (
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 "
    "--xla_llvm_disable_expensive_passes=true "
    "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
)
if _FLAGS not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAGS}".strip()
# Tests train the same few models again and again. All processes of a session share what they have
# compiled.
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
_CACHE = None
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _CACHE = tempfile.TemporaryDirectory(prefix="dcmdp-tests-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _CACHE.name

import jax  # noqa: E402  (reads the environment as set above)

from support import own_data  # noqa: E402

LONGEST = (
    "test_bucket_run.py",
    "test_faults.py",
    "test_processes.py",
    "test_step.py",
    "test_study.py",
    "test_train.py",
    "test_walk.py",
)


def pytest_collection_modifyitems(items):
    """Runs the longest files first, so that two workers end together."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.fixture(autouse=True)
def temporary_working_directory():
    """Runs every test in an empty directory, so that it neither sees nor leaves a run elsewhere."""
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        yield


@pytest.fixture(scope="session", params=own_data.TOKENIZERS)
def chat_folder(request, tmp_path_factory):
    """Returns a folder with tokenizer.json and chat_template.jinja: our own, or Qwen3's."""
    if request.param == "qwen3":
        return own_data.SHARED / "qwen3_tokenizer"
    return own_data.write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session", params=own_data.ROOTS)
def data_root(request, tmp_path_factory):
    """Returns a folder with math_eval/ and gsm8k/: a dozen rows of our own, or the published."""
    if request.param == "published":
        return own_data.SHARED
    return own_data.write_sets(tmp_path_factory.mktemp("sets"))


@pytest.fixture(scope="module", autouse=True)
def clear_compiled_programs():
    """Drops the compiled programs of a file at its end: LLVM ends a process that maps more than
    65,530 areas of memory.
    """
    yield
    jax.clear_caches()
