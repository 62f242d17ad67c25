"""The command line, `dcmdp`: `parser` reads it, the other files hold the commands."""

from __future__ import annotations

import glob
import importlib.util
import os
import sys
from collections.abc import Sequence
from typing import Any

from dcmdp_jax import errors
from dcmdp_jax.cli import failures, fields, parser
from dcmdp_jax.monitoring import terminal
from dcmdp_jax.run import staging


def main(arguments: list[str] | None = None, devices: Sequence[Any] | None = None) -> int:
    """Runs one command and returns its exit status: 2, with one sentence, on bad input.

    A command first checks its input and returns a job, which is then run: only an error of the job
    may show a traceback.

    Args:
        arguments: the command and its options; None: those of the process.
        devices: the JAX devices that a run may use; None: all there are.
    """
    terminal.ignore_broken_streams()
    args, options = parser.make().parse_known_args(arguments)
    _leave_out_tpu()
    args.devices = devices
    try:
        job = args.command(args, options)
    except ModuleNotFoundError as error:
        print(
            f"dcmdp: {error}; the core alone does not train or sample, install requirements.txt or "
            "dcmdp-jax[train]",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print("dcmdp: stopped before the start", file=sys.stderr)
        return 130
    except Exception as error:
        message = errors.user_message(error)
        if message is None and not isinstance(error, ValueError):
            raise
        typed = fields.as_typed(message or str(error), args, options)
        failures.tell(error, typed, args.traceback)
        return 2
    status = job()
    try:
        staging.upload_all()
    except (OSError, ValueError) as error:
        print(f"dcmdp: {error}", file=sys.stderr)
        return status or 1
    return status


def _leave_out_tpu() -> None:
    """Has JAX compute on the CPU where libtpu is installed, without the library of another
    accelerator, and the machine has no TPU: libtpu would print warnings.
    """
    is_alone = importlib.util.find_spec("libtpu") and not importlib.util.find_spec("jax_plugins")
    has_tpu = glob.glob("/dev/accel*") or glob.glob("/dev/vfio/*")
    is_set = any(name.startswith(("JAX_PLATFORMS", "TPU_")) for name in os.environ)
    if is_alone and not has_tpu and not is_set:
        os.environ["JAX_PLATFORMS"] = "cpu"
