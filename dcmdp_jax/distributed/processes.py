"""Runs of several processes, on one host or many: starting together, failing together, gathering
arrays.

With a single process every function returns its input or does nothing. Functions that communicate
must be called by all processes in the same order.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import os
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
from dcmdp_jax.monitoring.screen import screen
from dcmdp_jax.run import staging
from dcmdp_jax.stopping import Failed, Interrupted

# Wait after a failed collective: the peers usually report the lost process within this time.
PEER_REPORT_SECONDS = 5.0
MESSAGE_BYTES = 2000

_peers: rendezvous.Peers | None = None


class Refused(ValueError):
    """An input error that is raised on all processes, whichever of them detected it."""


def start(
    workdir: pathlib.Path,
    coordinator: str = "",
    processes: int = 0,
    process: int = 0,
    limit: float = 120.0,
) -> None:
    """Connects this process to the others of the run and initializes `jax.distributed`.

    Call it before the first use of a device.

    Args:
        workdir: a folder that all processes share; it holds the run's secret until all are
            connected (see `rendezvous`).
        coordinator: HOST:PORT of process 0. If empty, address and numbers are detected from the TPU
            pod, Slurm, Open MPI or Kubernetes job.
        processes: number of processes.
        process: number of this process, from 0.
        limit: seconds to wait for the others.

    Raises ValueError that names the missing process, host, port or secret.
    """
    global _peers
    if not coordinator:
        coordinator, processes, process = _detected(limit)
    if processes == 1:
        return
    if staging.of(workdir) and not os.environ.get(rendezvous.VARIABLE):
        raise ValueError(
            f"{workdir} is in a bucket, where no folder holds the run's secret; give all processes "
            f"the same {rendezvous.VARIABLE}, of {rendezvous.SHORTEST} characters or more"
        )
    _peers = rendezvous.join(coordinator, processes, process, limit, workdir)
    atexit.register(_peers.send, done=True)
    # JAX's preemption service would catch SIGTERM, and it cannot interrupt a rollout.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        coordinator, processes, process, initialization_timeout=int(limit) + 1
    )


def log0(text: str) -> None:
    """Tells the progress of a run, on process 0 only."""
    if jax.process_index() == 0:
        screen.line(text)


def _detected(limit: float) -> tuple[str, int, int]:
    """Returns coordinator, number of processes and own number from the cluster's environment.

    `jax.distributed.initialize` detects the same, but only while it connects. The rendezvous comes
    before that, and JAX has no public function for it.
    """
    from jax._src.clusters import ClusterEnv

    unset = [None] * 5
    coordinator, processes, process, *_ = ClusterEnv.auto_detect_unset_distributed_params(
        *unset, initialization_timeout=int(limit)
    )
    if coordinator is None or processes is None or process is None:
        raise ValueError(
            "--distributed detects no TPU pod, Slurm, Open MPI or Kubernetes job; give "
            "--coordinator HOST:PORT, --processes N and --process I"
        )
    return coordinator, processes, process


@contextlib.contextmanager
def end_all_on_error() -> Iterator[None]:
    """Ends all processes if the body raises on this one.

    Exceptions that every process raises (`Refused`, `Interrupted`, `Failed`) pass through, and with
    a single process all do.
    """
    try:
        yield
    except (Refused, Interrupted, Failed):
        raise
    except BaseException as error:
        if _peers is None:
            raise
        # If another process is lost, a collective fails here; the peers' report then ends this
        # process with a message that names the lost one.
        time.sleep(PEER_REPORT_SECONDS)
        if sentence := errors.user_message(error):
            print(f"dcmdp: {sentence}", file=sys.stderr)
        else:
            traceback.print_exc()
        _peers.end(f"process {jax.process_index()} failed with {type(error).__name__}")


@contextlib.contextmanager
def raise_on_all() -> Iterator[None]:
    """Raises on every process if the body raises ValueError, ImportError or OSError on one.

    The processes on which it did not fail raise `Refused` with the number and message of the first
    one that did.
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
    """Returns True if all processes raised `error` at the same place."""
    return jax.process_count() == 1 or isinstance(error, (Refused, Interrupted))


@contextlib.contextmanager
def print_errors(failure: str) -> Iterator[None]:
    """Prints an exception of the body, after `failure`, and suppresses it.

    For cleaning up while a more important exception propagates.
    """
    try:
        yield
    except Exception as error:
        print(f"{failure}: {errors.type_and_message(error)}", file=sys.stderr, flush=True)


def check_same(text: str, name: str) -> None:
    """Raises Refused if `text`, which messages call `name`, differs between processes."""
    digests = gather(np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8)[None])
    for process, digest in enumerate(digests):
        if (digest != digests[0]).any():
            raise Refused(
                f"process {process} has another {name} than process 0; give all the same "
                "experiment and options"
            )


def request_stop() -> None:
    """Sends a request to stop to the other processes; does not wait."""
    if _peers:
        _peers.send(stop=True)


def stop_requested() -> bool:
    """Returns True if another process has requested a stop.

    The request arrives at different times on different processes; use `any_process` to agree.
    """
    return _peers is not None and _peers.stopping


def any_process(flag: bool) -> bool:
    """Returns True, on all processes, if `flag` is true on any."""
    return bool(gather(np.array([flag])).any())


def gather(tree: Any) -> Any:
    """Returns each process's NumPy arrays concatenated along their first axis, in process order.

    The arrays must have the same shape on every process. They travel between the last device of
    each, so that the computations of the other devices are not waited for.
    """
    if jax.process_count() == 1:
        return tree
    last = {device.process_index: device for device in jax.devices()}
    mesh = sharding.make_mesh(MeshConfig(data=len(last), fsdp=1), [last[i] for i in sorted(last)])
    rows = sharding.batch_sharding(mesh, 0)
    parts = jax.tree.map(lambda x: jax.make_array_from_process_local_data(rows, x), tree)
    gathered = jax.jit(_identity, out_shardings=sharding.replicated(mesh))(parts)
    return jax.tree.map(lambda x: np.array(x.addressable_data(0)), gathered)


def from_process_0(tree: Any) -> Any:
    """Returns process 0's NumPy arrays, on all processes.

    The arrays must have the same shape on every process.
    """
    of_all = gather(jax.tree.map(lambda x: x[None], tree))
    return jax.tree.map(lambda x: x[0], of_all)


def _identity(tree: Any) -> Any:
    return tree


def make_global(tree: Any, shardings: Any) -> Any:
    """Returns global arrays with `shardings` from NumPy arrays that are equal on all processes."""
    return jax.tree.map(
        lambda x, to: jax.make_array_from_callback(x.shape, to, x.__getitem__),
        tree,
        shardings,
    )


def num_engines(config: RolloutConfig) -> int:
    """Returns the number of engines that share the sampling: one per process, or one in all."""
    return 1 if config.one_engine else jax.process_count()


def share(size: int, engines: int) -> slice:
    """Returns the contiguous slice of `size` items that this process's engine samples.

    All slices have the same length, except that the last ones may be shorter or empty.
    """
    each = -(-size // engines)
    first = min(jax.process_index() * each, size) if engines > 1 else 0
    return slice(first, min(first + each, size))


def per_process_mesh(mesh: Mesh, own: Mesh) -> Mesh:
    """Returns all devices of `mesh` with an axis `process` in front of the axes of `own`, the mesh
    of one process.

    An array whose partition does not name `process` has one complete copy on every process.
    """
    return Mesh(mesh.devices.reshape(-1, *own.devices.shape), ("process", *own.axis_names))


def local_copy(array: jax.Array, mesh: Mesh) -> jax.Array:
    """Returns this process's copy, on its own `mesh`, of an array laid out on `per_process_mesh`.

    No data is moved.
    """
    return jax.make_array_from_single_device_arrays(
        array.shape,
        NamedSharding(mesh, array.sharding.spec),
        [shard.data for shard in array.addressable_shards],
    )
