"""Several processes, on one host or many: their start, what they agree on, and arrays that span
them.

Every function is an identity, or nothing, where there is one process. Those that communicate must
be called by all processes in the same order.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import pathlib
import sys
import time
import traceback
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from dcmdp_jax import errors, sharding
from dcmdp_jax.config import MeshConfig, RolloutConfig
from dcmdp_jax.distributed import rendezvous
from dcmdp_jax.stopping import Failed, Interrupted

NEWS_SECONDS = 5.0  # after a failed collective, for word of the process that is lost
MESSAGE_BYTES = 2000

_peers: rendezvous.Peers | None = None


class Refused(ValueError):
    """All processes refuse the same input."""


def start(
    workdir: pathlib.Path,
    coordinator: str = "",
    processes: int = 0,
    process: int = 0,
    limit: float = 120.0,
) -> None:
    """Joins this process to a run of several, once all have called at `coordinator` (HOST:PORT of
    process 0).

    Without a coordinator, address and numbers are those of the TPU pod, Slurm, Open MPI or
    Kubernetes job. All share `workdir`, which holds their secret while they meet (see `rendezvous`).
    Must precede the first use of a device. Raises ValueError, within `limit` seconds, that names
    what is missing.
    """
    global _peers
    if not coordinator:
        coordinator, processes, process = _detected(limit)
    if processes == 1:
        return
    _peers = rendezvous.join(coordinator, processes, process, limit, workdir)
    atexit.register(_peers.send, done=True)
    # it would take SIGTERM, and cannot end a rollout
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        coordinator, processes, process, initialization_timeout=int(limit) + 1
    )


def log0(text: str) -> None:
    """Prints, on process 0."""
    if jax.process_index() == 0:
        print(text, flush=True)


def _detected(limit: float) -> tuple[str, int, int]:
    # jax.distributed.initialize tells what it finds too late for the rendezvous
    from jax._src.clusters import ClusterEnv

    found = ClusterEnv.auto_detect_unset_distributed_params(
        *[None] * 5, initialization_timeout=int(limit)
    )[:3]
    if None in found:
        raise ValueError(
            "--distributed finds no TPU pod, Slurm, Open MPI or Kubernetes job here; give --coordinator HOST:PORT, "
            "--processes N and --process I"
        )
    return found


@contextlib.contextmanager
def end_all_on_error() -> Iterator[None]:
    """What fails inside on this process ends all.

    What all processes raise alike (`Refused`, `Interrupted`, `Failed`) passes.
    """
    try:
        yield
    except (Refused, Interrupted, Failed):
        raise
    except BaseException as error:
        if _peers is None:
            raise
        # a collective fails here where another process is lost, which the peers report
        time.sleep(NEWS_SECONDS)
        if said := errors.user_message(error):
            print(f"dcmdp: {said}", file=sys.stderr)
        else:
            traceback.print_exc()
        _peers.end(f"process {jax.process_index()} failed with {type(error).__name__}")


@contextlib.contextmanager
def raise_on_all() -> Iterator[None]:
    """What one process refuses inside (ValueError, ImportError, OSError) all refuse, with its
    number.
    """
    refusal = None
    try:
        yield
    except (ValueError, ImportError, OSError) as error:
        if jax.process_count() == 1:
            raise
        refusal = error
    reason = "" if refusal is None else errors.one_line(refusal) or type(refusal).__name__
    encoded = reason.encode(errors="replace")[:MESSAGE_BYTES].ljust(MESSAGE_BYTES, b"\0")
    rows = gather(np.frombuffer(encoded, np.uint8)[None])
    texts = [bytes(row).rstrip(b"\0").decode(errors="ignore") for row in rows]
    if refusal is not None:
        raise Refused(str(refusal)) from refusal
    for process, text in enumerate(texts):
        if text:
            raise Refused(f"process {process} refuses: {text}")


def raised_on_all(error: Exception) -> bool:
    """Whether all processes raise that at the same place."""
    return jax.process_count() == 1 or isinstance(error, Refused)


@contextlib.contextmanager
def print_errors(failure: str) -> Iterator[None]:
    """What fails inside is told, after `failure`, and passed over: something worse is being raised
    already.
    """
    try:
        yield
    except Exception as error:
        print(f"{failure}: {errors.type_and_message(error)}", file=sys.stderr, flush=True)


def check_same(text: str, name: str) -> None:
    """Raises Refused where processes hold different texts, of which `name` says what they are."""
    digests = gather(np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8)[None])
    for process, digest in enumerate(digests):
        if (digest != digests[0]).any():
            raise Refused(
                f"process {process} has another {name} than process 0; give all the same experiment and options"
            )


def request_stop() -> None:
    """Asks the other processes to stop, at once."""
    if _peers:
        _peers.send(stop=True)


def stop_requested() -> bool:
    """Whether another process asked to stop; processes come to know at different times (`any_process`
    agrees).
    """
    return _peers is not None and _peers.stopping


def any_process(flag: bool) -> bool:
    """Whether any process says so."""
    return bool(gather(np.array([flag])).any())


def gather(tree: Any) -> Any:
    """NumPy arrays of equal shape on each process, put together along their first axis in the order
    of processes.

    They travel between the last device of each process, so that what the others compute is not
    waited for.
    """
    if jax.process_count() == 1:
        return tree
    last = {device.process_index: device for device in jax.devices()}
    mesh = sharding.make_mesh(MeshConfig(data=len(last), fsdp=1), [last[i] for i in sorted(last)])
    rows = sharding.batch_sharding(mesh, 0)
    parts = jax.tree.map(lambda x: jax.make_array_from_process_local_data(rows, x), tree)
    whole = jax.jit(_same, out_shardings=sharding.replicated(mesh))(parts)
    return jax.tree.map(lambda x: np.array(x.addressable_data(0)), whole)


def _same(tree: Any) -> Any:
    return tree


def make_global(tree: Any, shardings: Any) -> Any:
    """Global arrays from NumPy arrays that every process holds whole."""
    return jax.tree.map(
        lambda x, place: jax.make_array_from_callback(x.shape, place, x.__getitem__),
        tree,
        shardings,
    )


def num_engines(config: RolloutConfig) -> int:
    """How many engines share the sampling: one for each process, or one for all."""
    return 1 if config.one_engine else jax.process_count()


def share(size: int, engines: int) -> slice:
    """The contiguous part of `size` items that this process's engine samples; the last may be
    shorter, or empty.
    """
    each = -(-size // engines)
    first = min(jax.process_index() * each, size) if engines > 1 else 0
    return slice(first, min(first + each, size))


def per_process_mesh(mesh: Mesh, own: Mesh) -> Mesh:
    """All devices of `mesh` with an axis `process` before the axes of `own`, one process's: a
    partition that does not name it is a whole copy on every process.
    """
    return Mesh(mesh.devices.reshape(-1, *own.devices.shape), ("process", *own.axis_names))


def local_copy(array: jax.Array, mesh: Mesh) -> jax.Array:
    """This process's whole copy, on its part of the mesh, of an array laid out on `per_process_mesh`;
    nothing moves.
    """
    return jax.make_array_from_single_device_arrays(
        array.shape,
        NamedSharding(mesh, array.sharding.spec),
        [shard.data for shard in array.addressable_shards],
    )
