"""The programs of accelerators, on a CPU."""

import contextlib
import functools
from collections.abc import Iterator

import jax
import pytest


@contextlib.contextmanager
def accelerator_programs() -> Iterator[None]:
    """Within it, functions with a program for CPUs and another for accelerators trace the other."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.lax, "platform_dependent", lambda *args, default, **forms: default(*args))
        yield


@contextlib.contextmanager
def tpu_programs() -> Iterator[None]:
    """Within it, functions with a program for TPUs trace that, its decoding kernel interpreted, and
    others that of accelerators.
    """

    def choose(*args, default, tpu=None, cpu=None):
        return functools.partial(tpu, interpret=True)(*args) if tpu else default(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.lax, "platform_dependent", choose)
        yield
