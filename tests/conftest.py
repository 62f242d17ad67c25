"""Eight simulated CPU devices for every test, set before JAX reads its environment; the golden vectors."""

import json
import os
import pathlib

import pytest

os.environ["JAX_PLATFORMS"] = "cpu"
# Most of a test's time is compilation; the cheaper passes of LLVM are enough for shapes this small.
_FLAGS = ("--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=1 "
          "--xla_llvm_disable_expensive_passes=true")
if _FLAGS not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAGS}".strip()


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes more than a few seconds; leave out with -m 'not slow'")


@pytest.fixture(scope="session")
def golden() -> dict:
    """The file named by DCMDP_GOLDEN, else shared/golden/losses.json beside the checkout."""
    named = os.environ.get("DCMDP_GOLDEN")
    path = pathlib.Path(named or pathlib.Path(__file__).parents[1].parent / "shared" / "golden" / "losses.json")
    if not named and not path.exists():
        pytest.skip(f"golden vectors are not at {path}; name another file with DCMDP_GOLDEN")
    return json.loads(path.read_text())
