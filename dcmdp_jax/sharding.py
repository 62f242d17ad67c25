"""Meshes, and the tables that map logical axes to mesh axes. The one place that builds a
`PartitionSpec`.

Mesh axes:
  data: replicas of the parameters; batch. The only axis that may cross slices.
  fsdp: parameters and batch.
  expert: experts and batch.
  sequence: parameters, and the positions of a row.
  tensor: heads, feed-forward and vocabulary.

A table maps every logical axis to mesh axes. An unknown logical axis is an error, and so are two
axes of one array on the same mesh axis.

`constrain`, `gather_params` and `shard_map` use the current mesh: the one that `with_mesh` sets
while a function is traced. Without one the first two do nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dcmdp_jax.config import Config, MeshConfig

AXES = ("data", "fsdp", "expert", "sequence", "tensor")
BATCH = ("data", "fsdp", "expert")
HOST = "pinned_host"  # JAX's name for the memory of a device's host

Axes = str | tuple[str, ...] | None
Table = dict[str, Axes]

# Parameters and optimizer moments. "embed" is split for storage alone.
TRAIN: Table = {
    "layers": None,
    "vocab": "tensor",
    "embed": ("fsdp", "expert", "sequence"),
    "q_heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "experts": "expert",
    "expert_embed": ("fsdp", "sequence"),
}
# Parameters as they are used, and as the engine stores them.
DECODE = TRAIN | {"embed": None, "expert_embed": None}
ACTIVATIONS = DECODE | {
    "rows": BATCH,
    "replicas": "data",
    "positions": "sequence",
    "split_embed": TRAIN["embed"],
    "split_expert_embed": TRAIN["expert_embed"],
}


# Meshes


def make_mesh(
    config: MeshConfig, devices: Sequence[jax.Device] | None = None, name: str = "mesh"
) -> Mesh:
    """Returns the mesh of `devices` (None: all); `name` is the option that errors name.

    Raises ValueError if the product of the axes is not the number of devices, or if another axis
    than `data` would cross slices.
    """
    devices = jax.devices() if devices is None else devices
    fixed = config.data * config.expert * config.sequence * config.tensor
    fsdp = config.fsdp or len(devices) // fixed
    if fixed * fsdp != len(devices):
        raise ValueError(
            f"{name}.data={config.data} * fsdp={config.fsdp or 'rest'} * expert={config.expert} * "
            f"sequence={config.sequence} * tensor={config.tensor} does not make {len(devices)}, "
            "the number of devices"
        )
    shape = (config.data, fsdp, config.expert, config.sequence, config.tensor)
    slices = len({slice_index(device) for device in devices})
    if config.data % slices:
        raise ValueError(
            f"{name}.data={config.data} is not a multiple of the {slices} slices; only data may "
            "cross them"
        )
    # The devices of a slice are adjacent, and within it those of a process: each is a block.
    ordered = sorted(
        devices, key=lambda device: (slice_index(device), device.process_index, device.id)
    )
    return Mesh(np.asarray(ordered).reshape(shape), AXES)


def slice_index(device: jax.Device) -> int:
    """Returns the number of the device's slice, 0 if there are no slices."""
    return getattr(device, "slice_index", None) or 0


def meshes(
    config: Config, devices: Sequence[jax.Device], process: int | None = None
) -> tuple[Mesh, Mesh]:
    """Returns the mesh that trains and the mesh on which this process samples.

    Both are over `devices`, divided as `rollout.devices` says. With several processes,
    each samples on its own block of the training mesh or on its share of `rollout.devices`; with
    `rollout.one_engine` all sample together. `process` is this process's number (None: JAX's).
    Raises ValueError if there are no such meshes.
    """
    process = jax.process_index() if process is None else process
    sampling = len(devices) if config.rollout.devices == -1 else config.rollout.devices
    by_process = {}
    for device in devices:
        by_process.setdefault(device.process_index, []).append(device)
    if config.rollout.one_engine and sampling not in (0, len(devices)):
        raise ValueError(
            "rollout.one_engine samples on all devices; set rollout.devices to -1 or 0, not "
            f"{sampling}"
        )
    if not sampling:
        mesh = make_mesh(config.mesh, devices)
        return mesh, mesh if config.rollout.one_engine else process_block(mesh, process)
    if config.rollout.one_engine:
        training = make_mesh(config.mesh, devices)
        return training, make_mesh(config.rollout.mesh, devices, "rollout.mesh")
    if sampling > len(devices):
        raise ValueError(f"rollout.devices={sampling} are more than the {len(devices)} there are")
    if sampling % len(by_process):
        raise ValueError(
            f"rollout.devices={sampling} do not divide over {len(by_process)} processes"
        )
    share = sampling // len(by_process)
    training = devices
    if sampling < len(devices):
        training = [device for own in by_process.values() for device in own[:-share]]
    return (
        make_mesh(config.mesh, training),
        make_mesh(config.rollout.mesh, by_process[process][-share:], "rollout.mesh"),
    )


def process_block(mesh: Mesh, process: int) -> Mesh:
    """Returns the mesh of a process's devices.

    Raises ValueError if they are not a block of `mesh`.
    """
    own = np.vectorize(lambda device: device.process_index == process)(mesh.devices)
    indices = (sorted(set(axis.tolist())) for axis in np.nonzero(own))
    block = mesh.devices[np.ix_(*indices)]
    if block.size != own.sum():
        raise ValueError(
            f"the devices of a process are not a block of the mesh {dict(mesh.shape)}; choose axes "
            f"that fit the {own.sum()} devices of each"
        )
    return Mesh(block, mesh.axis_names)


def single_device_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns the mesh of the first of `devices` (None: of all)."""
    return make_mesh(MeshConfig(), (jax.devices() if devices is None else devices)[:1])


def num_batch_shards(mesh: Mesh) -> int:
    """Returns the number of shards over which rows and slots are split."""
    return math.prod(mesh.shape[name] for name in BATCH)


# Tables


def partition_spec(logical: tuple[str | None, ...], table: Table) -> PartitionSpec:
    """Returns the partition of an array with dimensions named `logical` (None: not split)."""
    unknown = [name for name in logical if name is not None and name not in table]
    if unknown:
        raise KeyError(
            f"logical axis {unknown[0]!r} is not in the table, which has {', '.join(table)}"
        )
    axes = [table[name] if name is not None else None for name in logical]
    used = [axis for entry in axes for axis in _mesh_axes(entry)]
    if len(set(used)) < len(used):
        raise ValueError(f"logical axes {logical} use one mesh axis twice: {axes}")
    return PartitionSpec(*axes)


def _mesh_axes(entry: Axes) -> tuple[str, ...]:
    if entry is None:
        return ()
    return entry if isinstance(entry, tuple) else (entry,)


def is_axis_names(node: Any) -> bool:
    """Returns True if a node of a tree is the logical names of one array's dimensions."""
    return isinstance(node, tuple) and all(item is None or isinstance(item, str) for item in node)


# Shardings of trees


def param_shardings(logical_axes: Any, mesh: Mesh, table: Table, shapes: Any) -> Any:
    """Returns the shardings of a tree of parameters.

    `logical_axes` and `shapes` are trees of the same structure. Raises ValueError if a size is not
    a multiple of the number of its shards.
    """

    def leaf(logical, shape):
        spec = partition_spec(logical, table)
        for name, entry, size in zip(logical, spec, shape.shape, strict=True):
            shards = {axis: mesh.shape[axis] for axis in _mesh_axes(entry) if mesh.shape[axis] > 1}
            if size % math.prod(shards.values()):
                raise ValueError(
                    f"the model's {name} axis of size {size} does not divide over "
                    f"{' * '.join(f'mesh.{axis}={n}' for axis, n in shards.items())}"
                )
        return NamedSharding(mesh, spec)

    return jax.tree.map(leaf, logical_axes, shapes, is_leaf=is_axis_names)


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of an array of which every device has a copy."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh, axis: int) -> NamedSharding:
    """Returns the sharding of an array whose dimension `axis` is split over the batch axes."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, BATCH))


def batch_shardings(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of the [M, A, R, S] arrays of `records.Batch`."""
    return NamedSharding(mesh, partition_spec((None, None, "rows", "positions"), ACTIVATIONS))


def decode_state_shardings(shapes: Any, mesh: Mesh) -> Any:
    """Returns the shardings of a decode state: slots over the batch axes, and kv-heads of the cache
    `[slots, KV, S, h]` over tensor.
    """

    def leaf(array):
        axes = (BATCH, "tensor") if array.ndim == 4 else (BATCH,)
        return NamedSharding(mesh, PartitionSpec(*axes))

    return jax.tree.map(leaf, shapes)


def on_host(shardings: Any) -> Any:
    """Returns the same shardings, in the memory of the devices' hosts."""
    return jax.tree.map(lambda sharding: sharding.with_memory_kind(HOST), shardings)


def abstract_arrays(shapes: Any, shardings: Any) -> Any:
    """Returns shapes with shardings, for use instead of arrays."""
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        shapes,
        shardings,
    )


def local_bytes(tree: Any) -> int:
    """Returns the bytes that one device stores of arrays, or of shapes with shardings; those in its
    host's memory do not count. A number of four bits takes half a byte, but a byte on a CPU.
    """

    def stored(x: Any) -> int:
        on_cpu = next(iter(x.sharding.device_set)).platform == "cpu"
        bits = 8 * x.dtype.itemsize if on_cpu else jax.dtypes.itemsize_bits(x.dtype)
        return math.prod(x.sharding.shard_shape(x.shape)) * bits // 8

    return sum(stored(x) for x in jax.tree.leaves(tree) if x.sharding.memory_kind != HOST)


# Inside a traced function


def with_mesh(mesh: Mesh, f: Callable) -> Callable:
    """Returns `f`, to be traced with `mesh` as the current mesh."""

    def traced(*arguments):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return f(*arguments)

    traced.__name__ = getattr(f, "func", f).__name__  # JAX names the program so
    return traced


def current_mesh() -> jax.sharding.AbstractMesh | None:
    """Returns the current mesh, or None if there is none or it has one device."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.size == 1 else mesh


def activation_sharding(*logical: str | None) -> NamedSharding:
    """Returns the sharding over the current mesh of an activation with these dimensions."""
    return NamedSharding(jax.sharding.get_abstract_mesh(), partition_spec(logical, ACTIVATIONS))


def local_shape(logical: tuple[str | None, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape of one device's part of an activation."""
    return activation_sharding(*logical).shard_shape(shape) if current_mesh() else shape


def constrain(x: jax.Array, *logical: str | None) -> jax.Array:
    """Returns `x` sharded over the current mesh by the ACTIVATIONS table, and so its gradient."""
    if current_mesh() is None:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(logical, ACTIVATIONS))


def gather_params(weights: Any, logical_axes: Any) -> Any:
    """Returns weights gathered: from the TRAIN table to DECODE. Gradients return as in TRAIN."""
    if current_mesh() is None:
        return weights

    def leaf(names: tuple, w: jax.Array) -> jax.Array:
        gathered = partition_spec(names, DECODE)
        stored = partition_spec(names, TRAIN)

        @jax.custom_vjp
        def gather(w):
            return jax.lax.with_sharding_constraint(w, gathered)

        gather.defvjp(
            lambda w: (gather(w), None),
            lambda _, dw: (jax.lax.with_sharding_constraint(dw, stored),),
        )
        return gather(jax.lax.with_sharding_constraint(w, stored))

    return jax.tree.map(leaf, logical_axes, weights, is_leaf=is_axis_names)


def shard_map(f: Callable, *arguments: Any, out: Any) -> Callable:
    """Returns `f` mapped over the devices of the current mesh.

    Each of `arguments`, and `out` or each of its items, is the logical names of an array's
    dimensions, or a tree of specs.
    """

    def specs(names):
        return partition_spec(names, ACTIVATIONS) if is_axis_names(names) else names

    results = specs(out) if is_axis_names(out) else tuple(map(specs, out))
    return jax.shard_map(
        f, in_specs=tuple(map(specs, arguments)), out_specs=results, check_vma=False
    )


def all_gather(shard: jax.Array, axis: int) -> jax.Array:
    """Inside `shard_map`: returns the array whose dimension `axis` is split as "split_embed"."""
    return jax.lax.all_gather(shard, ACTIVATIONS["split_embed"], axis=axis, tiled=True)


def reduce_scatter(x: jax.Array, axis: int) -> jax.Array:
    """Inside `shard_map`: returns the sum over all rows and positions, split as by `all_gather`."""
    shard = jax.lax.psum_scatter(x, ACTIVATIONS["split_embed"], scatter_dimension=axis, tiled=True)
    return jax.lax.psum(shard, "data")
