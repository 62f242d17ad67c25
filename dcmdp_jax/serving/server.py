"""The process that serves a model folder: what `dcmdp serve` runs. See `service` for the protocol.

After SIGTERM the accepted requests have `grace` seconds to end, whether or not their clients read;
what is left then is cut off and the process exits.
"""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import socket
from collections.abc import Sequence
from typing import NamedTuple

import grpc
import jax

from dcmdp_jax import sharding, sync
from dcmdp_jax.config import Precision
from dcmdp_jax.models import weights
from dcmdp_jax.records import Sampling
from dcmdp_jax.rollout.jetstream import Engine
from dcmdp_jax.serving.service import Orchestrator, OrchestratorDriver, add_service
from dcmdp_jax.tokens import tokenizer as tokenizers

MAX_REQUEST_BYTES = 1 << 20
# RPCs beside those that decode or wait: health checks, and requests that will be refused.
SPARE_RPCS = 16
PENDING_RPCS = 16384  # RPCs that gRPC queues until the server handles them; it cancels further ones
MAX_GRACE_SECONDS = 86400.0


class Options(NamedTuple):
    """Where a server listens, how many requests it takes, and how long they may be."""

    # An address other than a loopback one opens the server to the network, without encryption or
    # passwords.
    host: str = "127.0.0.1"
    port: int = 9000
    slots: int = 8  # sequences decoded together
    waiting: int = 64  # requests that may wait for a slot; more are RESOURCE_EXHAUSTED
    max_prompt: int | None = None  # tokens; None: half of max_length
    # Tokens of prompt and completion together; every slot takes memory for all of them. None: 2,048
    # or the model's positions, whichever is less.
    max_length: int | None = None
    steps: int = 8  # tokens that are decoded, and then streamed, at a time
    grace: float = 10.0  # seconds for accepted requests to end after a signal


def listen(host: str, port: int, rpcs: int) -> tuple[grpc.aio.Server, int]:
    """Returns a server that is bound but not started, and its port; port 0 takes a free one.

    Raises OSError if the address cannot be bound, and ValueError if `host` is no host name.
    """
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        _try_to_bind(host, port)
    except OSError as error:
        raise OSError(
            f"cannot listen on {address} ({error.strerror}); choose another --port or --host"
        ) from None
    except UnicodeError:
        raise ValueError(f"--host {host!r:.100} is no host name; give one, or an address") from None
    server = grpc.aio.server(
        maximum_concurrent_rpcs=rpcs,
        options=[
            ("grpc.max_receive_message_length", MAX_REQUEST_BYTES),
            ("grpc.server.max_pending_requests", PENDING_RPCS),
            ("grpc.server.max_pending_requests_hard_limit", PENDING_RPCS),
            # Otherwise two servers can share a port, and each receives some of the requests.
            ("grpc.so_reuseport", 0),
            # A client's machine may vanish.
            ("grpc.keepalive_time_ms", 30_000),
            ("grpc.keepalive_timeout_ms", 10_000),
        ],
    )
    try:
        return server, server.add_insecure_port(address)
    except RuntimeError as error:  # another program took the port since
        raise OSError(
            f"cannot listen on {address} ({error}); choose another --port or --host"
        ) from None


def _try_to_bind(host: str, port: int) -> None:
    """Raises OSError if gRPC could not bind.

    gRPC itself would print a line to stderr and give no reason.
    """
    addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    failures = []
    for family, kind, _, _, address in addresses:
        try:
            with socket.socket(family, kind) as probe:
                # Connections of a server that ended may linger.
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
        except OSError as error:
            failures.append(error)
    in_use = [error for error in failures if error.errno == errno.EADDRINUSE]
    # Some of a name's addresses may be missing, such as the IPv6 one of localhost.
    if in_use or len(failures) == len(addresses):
        raise (in_use or failures)[0]


def serve(
    folder: str,
    options: Options = Options(),
    *,
    tokenizer_path: str = "",
    tokens_only: bool = False,
    precision: Precision = Precision(),
    sampling: Sampling = Sampling(),
    seed: int = 0,
    devices: Sequence[jax.Device] | None = None,
) -> int:
    """Serves a Hugging Face folder until SIGTERM or SIGINT.

    Args:
        folder: a Hugging Face model folder.
        tokenizer_path: file or folder of the tokenizer; empty: the model's folder.
        tokens_only: uses no tokenizer; texts are refused, and completions end at max_tokens only.
        precision: of the engine.
        sampling: how the tokens of every request are drawn.
        seed: request number n has the key (seed, n).
        devices: the first is used; None: of all there are.

    Returns the exit status: 0 if all accepted requests ended, 1 if `options.grace` or a second
    signal cut some off.

    Raises ValueError or OSError, before weights are read, if the options or the folder do not fit.
    """
    _check_range("port", options.port, 0, 65535)
    _check_range("slots", options.slots, 1)
    _check_range("queue", options.waiting, 0)
    _check_range("steps", options.steps, 1)
    _check_range("grace", options.grace, 0, MAX_GRACE_SECONDS)
    _check_range("seed", seed, 0, 2**32 - 1)
    model_config = weights.read_config(folder)
    max_prompt, max_length = _lengths(
        options.max_prompt, options.max_length, model_config.max_position
    )
    tokenizer = None if tokens_only else tokenizers.load(tokenizer_path or folder, folder)
    if tokenizer is not None:
        tokenizers.check_vocab_size(tokenizer, model_config.vocab_size)
    mesh = sharding.single_device_mesh(devices)
    sync.check(model_config, precision, mesh)

    def load() -> OrchestratorDriver:
        config, params = weights.load(folder)
        engine = Engine(
            config,
            slots=options.slots,
            max_length=max_length,
            steps=options.steps,
            precision=precision,
            mesh=mesh,
            stop_ids=tokenizer.eos_ids if tokenizer else (),
        )
        served = sync.converter(config, precision, mesh)(params, 0)
        return OrchestratorDriver(
            engine, served, waiting=options.waiting, sampling=sampling, seed=seed
        )

    async def run() -> int:
        rpcs = options.slots + options.waiting + SPARE_RPCS
        server, port = listen(options.host, options.port, rpcs)
        running = load()
        add_service(Orchestrator(running, tokenizer, max_prompt), server)
        await server.start()
        print(f"serving {folder} on {options.host}:{port}", flush=True)
        status = await _until_stopped(server, running, options.grace)
        if status:
            os._exit(status)  # a thread inside XLA delays or aborts the interpreter's own exit
        return status

    return asyncio.run(run())


async def _until_stopped(server: grpc.aio.Server, running: OrchestratorDriver, grace: float) -> int:
    """Waits for a signal, then up to `grace` seconds for the accepted requests to end.

    A second signal cuts them off. Returns the exit status.
    """
    stop = asyncio.Event()
    stop_now = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(
            number, lambda: (stop_now if stop.is_set() else stop).set()
        )
    await stop.wait()
    running.close()
    print(
        f"finishing the requests that were accepted, for {grace:g} s at most; a second signal "
        "stops at once",
        flush=True,
    )
    drained = asyncio.create_task(_drain(server, running))
    cut = asyncio.create_task(stop_now.wait())
    await asyncio.wait({drained, cut}, timeout=grace, return_when=asyncio.FIRST_COMPLETED)
    cut.cancel()
    if drained.done():
        return 0
    await server.stop(None)
    return 1


async def _drain(server: grpc.aio.Server, running: OrchestratorDriver) -> None:
    """Stops the driver, then the server.

    A stopped driver answers UNAVAILABLE to new requests; a stopping gRPC server may send CANCELLED.
    """
    await asyncio.to_thread(running.stop)
    await server.stop(MAX_GRACE_SECONDS)


def _lengths(max_prompt: int | None, max_length: int | None, positions: int) -> tuple[int, int]:
    """Returns max_prompt and max_length of `Options` for a model with so many positions.

    Raises ValueError if they do not fit it.
    """
    if max_length is None:
        max_length = min(2048, positions)
    if not 2 <= max_length <= positions:
        raise ValueError(
            f"--max-length is {max_length}; it must lie in 2..{positions}, the positions of the "
            "model"
        )
    if max_prompt is None:
        max_prompt = max_length // 2
    if not 1 <= max_prompt < max_length:
        raise ValueError(
            f"--max-prompt is {max_prompt}; it must be at least 1 and less than --max-length, "
            f"{max_length}"
        )
    return max_prompt, max_length


def _check_range(name: str, value: float, least: float, most: float = 2**31 - 1) -> None:
    if not least <= value <= most:
        raise ValueError(f"--{name} is {value}; it must lie in {least}..{most}")
