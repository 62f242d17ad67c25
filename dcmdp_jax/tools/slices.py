"""TPU slices that a program can be compiled for without one, and what their chips can do."""

from __future__ import annotations

import importlib.util
import math
import os
import re
from typing import Any, NamedTuple

GIB = 2**30


class Chip(NamedTuple):
    """One device. Figures from cloud.google.com/tpu/docs, the page of each version; memory from
    libtpu's compiler, which keeps some of a chip's for itself.
    """

    memory: float  # bytes that a program may use
    flops: float  # bfloat16 FLOP/s
    bandwidth: float  # bytes/s of memory
    link: float  # bytes/s of all of a chip's links together, in one direction


CHIPS = {
    "v4": Chip(30.75 * GIB, 275e12, 1.2e12, 270e9),
    "v5e": Chip(15.75 * GIB, 197e12, 0.82e12, 200e9),
    "v5p": Chip(95.73 * GIB, 459e12, 2.77e12, 600e9),
    "v6e": Chip(31.25 * GIB, 918e12, 1.64e12, 400e9),
    "tpu7x": Chip(94.74 * GIB, 1153e12, 3.69e12, 300e9),  # a device is half a chip
}


def slice_devices(name: str, slices: int = 1) -> list[Any]:
    """Returns the devices of one or several slices such as "v5p:4x4x4".

    Raises ValueError if libtpu has no such slice.
    """
    kind = name.split(":")[0]
    if counted := re.fullmatch(r"(v4|v5p|v5e|v5litepod|v6e)-(\d+)", name):
        raise ValueError(f"--topology {name} {_shape_of(*counted.groups())}")
    if kind not in CHIPS or ":" not in name:
        raise ValueError(
            f"--topology {name!r} is not KIND:SHAPE with KIND one of {', '.join(CHIPS)}, such as "
            "v5p:4x4x4 or v5e:8x8"
        )
    if slices < 1 or "0" in name.split(":")[1].split("x"):
        raise ValueError(
            f"--topology {name} with --slices {slices} has no devices; both must be positive"
        )
    # Compiling uses no TPU, so several processes may load libtpu; there is no metadata server.
    os.environ |= {
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5p-8",  # any: libtpu warns where it finds none
        "TPU_STDERR_LOG_LEVEL": "3",
        "TPU_MIN_LOG_LEVEL": "3",
    }
    from jax.experimental import topologies

    # else the two cores of a v4 chip are two devices, as they are on no machine
    one_device = {"chip_config_name": "megacore"} if kind == "v4" else {}
    try:
        described = topologies.get_topology_desc(
            topology_name=name, platform="tpu", num_slices=slices, **one_device
        )
    except (RuntimeError, ValueError, NotImplementedError) as error:
        hint = "" if importlib.util.find_spec("libtpu") else " (pip install libtpu)"
        raise ValueError(
            f"libtpu gives no topology {name!r}{hint}: {str(error).splitlines()[0]}"
        ) from error
    return list(described.devices)


def _shape_of(kind: str, count: str) -> str:
    """Returns what to give in place of an accelerator type of Google Cloud, such as v5p-128."""
    kind = "v5e" if kind == "v5litepod" else kind
    has_two_cores = kind in ("v4", "v5p")  # which the type counts
    chips = int(count) // 2 if has_two_cores else int(count)
    sides = [1, 1, 1] if has_two_cores else [1, 1]
    while math.prod(sides) < chips:
        sides[sides.index(min(sides))] *= 2
    counts = "counts cores, two a chip" if has_two_cores else "names no shape"
    ordered = sorted(sides, key=lambda side: (side == 1, side))
    such_as = f", such as {kind}:{'x'.join(map(str, ordered))}"
    hint = such_as if math.prod(sides) == chips else ""
    return f"{counts}; give the shape of its {chips} chips{hint}"
