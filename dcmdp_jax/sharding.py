"""Meshes, and the tables that lay logical axes on mesh axes. The one place that builds a `PartitionSpec`.

Mesh axes: data (replicas of the parameters), fsdp (parameters and batch split), expert (experts and batch split), tensor
(heads, ffn and vocabulary split). A table maps every logical axis of the model; an unknown axis or two logical axes of one
array on one mesh axis is refused.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dcmdp_jax.config import Config, MeshConfig

AXES = ("data", "fsdp", "expert", "tensor")
BATCH = ("data", "fsdp", "expert")

TRAIN = {"layers": None, "vocab": "tensor", "embed": "fsdp", "q_heads": "tensor", "kv_heads": "tensor", "head_dim": None,
         "mlp": "tensor", "experts": "expert"}
DECODE = TRAIN | {"embed": None}


def make_mesh(config: MeshConfig, devices: list[Any] | None = None, name: str = "mesh") -> Mesh:
    """The mesh of all devices; `name` is the option that errors speak of. Raises ValueError where the axes' product is not their number."""
    devices = devices if devices is not None else jax.devices()
    fixed = config.data * config.expert * config.tensor
    fsdp = config.fsdp or len(devices) // fixed
    if fixed * fsdp != len(devices):
        raise ValueError(f"{name}.data={config.data} * fsdp={config.fsdp or 'rest'} * expert={config.expert} * "
                         f"tensor={config.tensor} does not make {len(devices)}, the number of devices")
    shape = (config.data, fsdp, config.expert, config.tensor)
    return Mesh(np.asarray(devices).reshape(shape), AXES)


def meshes(config: Config) -> tuple[Mesh, Mesh]:
    """The mesh that trains and the one that samples: the same, or the devices divided as `rollout.devices` says.

    Of several processes each samples on devices of its own: its block of the training mesh, or its share of
    `rollout.devices`. Raises ValueError where they cannot be.
    """
    devices, sampling, processes = jax.devices(), config.rollout.devices, jax.process_count()
    if not sampling:
        mesh = make_mesh(config.mesh)
        return mesh, local_block(mesh)
    if sampling > len(devices):
        raise ValueError(f"rollout.devices={sampling} are more than the {len(devices)} there are")
    if sampling % processes:
        raise ValueError(f"rollout.devices={sampling} do not divide over {processes} processes")
    each = sampling // processes
    of = [[device for device in devices if device.process_index == i] for i in range(processes)]
    training = devices if sampling == len(devices) else [device for own in of for device in own[:-each]]
    return make_mesh(config.mesh, training), make_mesh(config.rollout.mesh, of[jax.process_index()][-each:], "rollout.mesh")


def local_block(mesh: Mesh) -> Mesh:
    """This process's devices of the mesh. Raises ValueError where they are no block of it."""
    try:
        return mesh.local_mesh
    except ValueError:
        raise ValueError(f"the devices of a process are no block of the mesh {dict(mesh.shape)}; choose axes that fit the "
                         f"{jax.local_device_count()} devices of each") from None


def single_device_mesh() -> Mesh:
    return make_mesh(MeshConfig(), jax.devices()[:1])


def spec(logical: tuple[str | None, ...], table: dict[str, str | None]) -> PartitionSpec:
    """The partition of an array whose dimensions are named by `logical` (None: not split)."""
    unknown = [name for name in logical if name is not None and name not in table]
    if unknown:
        raise KeyError(f"logical axis {unknown[0]!r} is not in the table; it knows {', '.join(table)}")
    axes = [table[name] if name is not None else None for name in logical]
    used = [axis for axis in axes if axis is not None]
    if len(set(used)) < len(used):
        raise ValueError(f"logical axes {logical} fall on one mesh axis twice: {axes}")
    return PartitionSpec(*axes)


def params(logical_axes: Any, mesh: Mesh, table: dict[str, str | None], shapes: Any) -> Any:
    """Shardings of a tree of parameters from their logical axes. Raises ValueError where an axis does not divide."""
    def leaf(logical, shape):
        parts = spec(logical, table)
        for name, axis, size in zip(logical, parts, shape.shape):
            if axis is not None and size % mesh.shape[axis]:
                raise ValueError(f"the model's {name} axis of size {size} does not divide over mesh.{axis}={mesh.shape[axis]}")
        return NamedSharding(mesh, parts)

    def is_leaf(node):
        return isinstance(node, tuple) and all(item is None or isinstance(item, str) for item in node)

    return jax.tree.map(leaf, logical_axes, shapes, is_leaf=is_leaf)


def batch_size(mesh: Mesh) -> int:
    """Over how many shards rows and slots are split."""
    return math.prod(mesh.shape[name] for name in BATCH)


def split(mesh: Mesh, axis: int) -> NamedSharding:
    """Dimension `axis` over the batch axes."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, BATCH))


def decode_state(shapes: Any, mesh: Mesh) -> Any:
    """Slots over the batch axes and, in the cache `[slots, KV, S, h]`, kv heads over tensor."""
    def leaf(array):
        return NamedSharding(mesh, PartitionSpec(BATCH, "tensor") if array.ndim == 4 else PartitionSpec(BATCH))

    return jax.tree.map(leaf, shapes)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())
