"""The programs of accelerators, on a CPU."""

import contextlib
from collections.abc import Iterator

import jax
import pytest


@contextlib.contextmanager
def accelerator_programs() -> Iterator[None]:
    """Within it, functions with a program for CPUs and another for accelerators trace the other."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.lax, "platform_dependent", lambda *args, cpu, default: default(*args))
        yield
