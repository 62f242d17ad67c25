"""Meshes, and the tables that lay logical axes on mesh axes. The one place that builds a
`PartitionSpec`.

Mesh axes: data (replicas of the parameters, also across slices), fsdp (parameters and batch split),
    expert (experts and batch
split), sequence (positions of a row split), tensor (heads, ffn and vocabulary split). A table maps
every logical axis; an
unknown axis or two logical axes of one array on one mesh axis is refused.

Inside a function that `over` has given its mesh, `constrain` and `gather` say where activations and
weights lie; elsewhere they do nothing.
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

# Parameters and their moments are split over every axis that is not theirs alone; only `data` holds
# copies.
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
DECODE = TRAIN | {"embed": None, "expert_embed": None}
ACTIVATIONS = DECODE | {
    "rows": BATCH,
    "replicas": "data",
    "positions": "sequence",
    "split_embed": TRAIN["embed"],
    "split_expert_embed": TRAIN["expert_embed"],
}


def make_mesh(config: MeshConfig, devices: list[Any] | None = None, name: str = "mesh") -> Mesh:
    """The mesh of all devices; `name` is the option that errors speak of.

    Raises ValueError where the axes' product is not their number, and where anything but `data`
    would cross slices.
    """
    devices = devices if devices is not None else jax.devices()
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
            f"{name}.data={config.data} is no multiple of the {slices} slices; only data may cross them"
        )
    # A process's devices are neighbours, so that they are a block of the mesh; so are a slice's.
    ordered = sorted(
        devices, key=lambda device: (slice_index(device), device.process_index, device.id)
    )
    return Mesh(np.asarray(ordered).reshape(shape), AXES)


def slice_index(device: Any) -> int:
    return getattr(device, "slice_index", None) or 0


def meshes(config: Config, devices: Sequence[Any], process: int | None = None) -> tuple[Mesh, Mesh]:
    """The mesh that trains and the one that samples: the same, or the devices divided as
    `rollout.devices` says.

    Of several processes each samples on devices of its own: its block of the training mesh, or its
    share of `rollout.devices`; or all sample together, with `rollout.one_engine`. Raises ValueError
    where they cannot be.
    """
    process = jax.process_index() if process is None else process
    sampling = len(devices) if config.rollout.devices == -1 else config.rollout.devices
    of = {}
    for device in devices:
        of.setdefault(device.process_index, []).append(device)
    if config.rollout.one_engine and sampling not in (0, len(devices)):
        raise ValueError(
            f"rollout.one_engine samples on all devices; set rollout.devices to -1 or 0, not {sampling}"
        )
    if not sampling:
        mesh = make_mesh(config.mesh, devices)
        return mesh, mesh if config.rollout.one_engine else process_block(mesh, process)
    if config.rollout.one_engine:
        return make_mesh(config.mesh, devices), make_mesh(
            config.rollout.mesh, devices, "rollout.mesh"
        )
    if sampling > len(devices):
        raise ValueError(f"rollout.devices={sampling} are more than the {len(devices)} there are")
    if sampling % len(of):
        raise ValueError(f"rollout.devices={sampling} do not divide over {len(of)} processes")
    each = sampling // len(of)
    training = (
        devices
        if sampling == len(devices)
        else [device for own in of.values() for device in own[:-each]]
    )
    return make_mesh(config.mesh, training), make_mesh(
        config.rollout.mesh, of[process][-each:], "rollout.mesh"
    )


def process_block(mesh: Mesh, process: int) -> Mesh:
    """A process's devices of the mesh. Raises ValueError where they are no block of it."""
    own = np.vectorize(lambda device: device.process_index == process)(mesh.devices)
    part = mesh.devices[np.ix_(*(sorted(set(places.tolist())) for places in np.nonzero(own)))]
    if part.size != own.sum():
        raise ValueError(
            f"the devices of a process are no block of the mesh {dict(mesh.shape)}; choose axes that fit the "
            f"{own.sum()} devices of each"
        )
    return Mesh(part, mesh.axis_names)


def single_device_mesh() -> Mesh:
    return make_mesh(MeshConfig(), jax.devices()[:1])


def partition_spec(logical: tuple[str | None, ...], table: Table) -> PartitionSpec:
    """The partition of an array whose dimensions are named by `logical` (None: not split)."""
    unknown = [name for name in logical if name is not None and name not in table]
    if unknown:
        raise KeyError(
            f"logical axis {unknown[0]!r} is not in the table; it knows {', '.join(table)}"
        )
    axes = [table[name] if name is not None else None for name in logical]
    used = [axis for entry in axes for axis in _names(entry)]
    if len(set(used)) < len(used):
        raise ValueError(f"logical axes {logical} fall on one mesh axis twice: {axes}")
    return PartitionSpec(*axes)


def param_shardings(logical_axes: Any, mesh: Mesh, table: Table, shapes: Any) -> Any:
    """Shardings of a tree of parameters from their logical axes. Raises ValueError where an axis
    does not divide.
    """

    def leaf(logical, shape):
        parts = partition_spec(logical, table)
        for name, entry, size in zip(logical, parts, shape.shape):
            over = {axis: mesh.shape[axis] for axis in _names(entry) if mesh.shape[axis] > 1}
            if size % math.prod(over.values()):
                raise ValueError(
                    f"the model's {name} axis of size {size} does not divide over "
                    f"{' * '.join(f'mesh.{axis}={n}' for axis, n in over.items())}"
                )
        return NamedSharding(mesh, parts)

    return jax.tree.map(leaf, logical_axes, shapes, is_leaf=is_axis_names)


def is_axis_names(node: Any) -> bool:
    """Whether a node of a tree is the logical names of one array's dimensions."""
    return isinstance(node, tuple) and all(item is None or isinstance(item, str) for item in node)


def _names(entry: Axes) -> tuple[str, ...]:
    return entry if isinstance(entry, tuple) else () if entry is None else (entry,)


def with_mesh(mesh: Mesh, f: Callable) -> Callable:
    """`f`, to be traced with `mesh` as its ambient mesh."""

    def traced(*arguments):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return f(*arguments)

    return traced


def current_mesh() -> jax.sharding.AbstractMesh | None:
    """The mesh that the program is compiled for, None where there is none or only one device."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.size == 1 else mesh


def constrain(x: jax.Array, *logical: str | None) -> jax.Array:
    """`x` laid out over the ambient mesh as the ACTIVATIONS table says; so is its gradient."""
    return (
        x
        if current_mesh() is None
        else jax.lax.with_sharding_constraint(x, partition_spec(logical, ACTIVATIONS))
    )


def gather_params(weights: Any, logical_axes: Any) -> Any:
    """Weights as the DECODE table has them, whole along the axes that only store them; gradients go
    back split as in TRAIN.
    """
    if current_mesh() is None:
        return weights

    def leaf(names: tuple, w: jax.Array) -> jax.Array:
        whole = partition_spec(names, DECODE)
        split = partition_spec(names, TRAIN)

        @jax.custom_vjp
        def f(w):
            return jax.lax.with_sharding_constraint(w, whole)

        f.defvjp(
            lambda w: (f(w), None), lambda _, dw: (jax.lax.with_sharding_constraint(dw, split),)
        )
        return f(jax.lax.with_sharding_constraint(w, split))

    return jax.tree.map(leaf, logical_axes, weights, is_leaf=is_axis_names)


def activation_sharding(*logical: str | None) -> NamedSharding:
    """The layout over the ambient mesh of an activation with these dimensions."""
    return NamedSharding(jax.sharding.get_abstract_mesh(), partition_spec(logical, ACTIVATIONS))


def shard_map(f: Callable, *arguments: Any, out: Any) -> Callable:
    """`f` of each device's own part: arguments and results laid out by their logical names (or by a
    tree of specs).
    """

    def specs(names):
        return partition_spec(names, ACTIVATIONS) if is_axis_names(names) else names

    results = specs(out) if is_axis_names(out) else tuple(map(specs, out))
    return jax.shard_map(
        f, in_specs=tuple(map(specs, arguments)), out_specs=results, check_vma=False
    )


def all_gather(part: jax.Array, axis: int) -> jax.Array:
    """Inside `by_shard`: an array of which each device holds a part, split over `axis` as
    "split_embed".
    """
    return jax.lax.all_gather(part, ACTIVATIONS["split_embed"], axis=axis, tiled=True)


def reduce_scatter(x: jax.Array, axis: int) -> jax.Array:
    """Inside `by_shard`: the sum over all rows and positions, of which each device keeps the part
    that `whole` gathers.
    """
    return jax.lax.psum(
        jax.lax.psum_scatter(x, ACTIVATIONS["split_embed"], scatter_dimension=axis, tiled=True),
        "data",
    )


def local_shape(logical: tuple[str | None, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    """One device's part of an activation's shape."""
    return activation_sharding(*logical).shard_shape(shape) if current_mesh() else shape


def abstract_arrays(shapes: Any, places: Any) -> Any:
    """Shapes with shardings, in the place of arrays."""
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, places
    )


def on_host(places: Any) -> Any:
    """The same layout, in the memory of the devices' hosts."""
    return jax.tree.map(lambda place: place.with_memory_kind(HOST), places)


def local_bytes(tree: Any) -> int:
    """Bytes that one device holds of arrays, or of shapes with shardings; what lies on the host is
    not counted.
    """
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
        if x.sharding.memory_kind != HOST
    )


def num_batch_shards(mesh: Mesh) -> int:
    """Over how many shards rows and slots are split."""
    return math.prod(mesh.shape[name] for name in BATCH)


def batch_sharding(mesh: Mesh, axis: int) -> NamedSharding:
    """Dimension `axis` over the batch axes."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, BATCH))


def batch_shardings(mesh: Mesh) -> NamedSharding:
    """Of `records.Batch`'s [M, A, R, S]."""
    return NamedSharding(mesh, partition_spec((None, None, "rows", "positions"), ACTIVATIONS))


def decode_state_shardings(shapes: Any, mesh: Mesh) -> Any:
    """Slots over the batch axes and, in the cache `[slots, KV, S, h]`, kv heads over tensor."""

    def leaf(array):
        return NamedSharding(
            mesh, PartitionSpec(BATCH, "tensor") if array.ndim == 4 else PartitionSpec(BATCH)
        )

    return jax.tree.map(leaf, shapes)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())
