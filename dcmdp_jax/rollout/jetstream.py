"""The sampling engine as a JetStream `Engine`: the one place, with serving, that imports
`jetstream`.

google-jetstream 0.2.2 imports seqio, which brings TensorFlow, and tiktoken for tokenizers that are
not used here; stand-in modules take their place while the import runs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import sys
import types
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dcmdp_jax import sharding
from dcmdp_jax.config import ModelConfig, Precision
from dcmdp_jax.records import Sampling, Weights
from dcmdp_jax.rollout import decode


@contextlib.contextmanager
def stand_ins() -> Iterator[None]:
    """Empty modules in the place of what google-jetstream imports and this project does not use,
    while it is imported.

    Raises ImportError where google-jetstream is not installed.
    """
    try:
        importlib.metadata.version("google-jetstream")
    except importlib.metadata.PackageNotFoundError:
        raise ImportError(
            "sampling needs google-jetstream 0.2.2 (`pip install --no-deps google-jetstream==0.2.2`); "
            "the package called `jetstream` is an unrelated one"
        ) from None
    names = {
        name: types.ModuleType(name)
        for name in ("seqio", "seqio.vocabularies", "tiktoken", "tiktoken.load")
    }
    names["seqio.vocabularies"].Vocabulary = names["seqio.vocabularies"].SentencePieceVocabulary = (
        object
    )
    names["tiktoken.load"].load_tiktoken_bpe = None
    before = {name: sys.modules.get(name) for name in names}
    sys.modules.update(names)
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


with stand_ins():
    from jetstream.engine import engine_api


class Read(NamedTuple):
    """A `ResultTokens` of `Engine.generate` on the host; B slots, K steps."""

    token: np.ndarray  # [B, K] int32
    logp: np.ndarray  # [B, K] float32, see `sampling.Drawn` for this and the next two
    raw_logp: np.ndarray  # [B, K] float32
    kept: np.ndarray  # [B, K] float32
    experts: np.ndarray  # [B, K, sparse layers, k] int32; [B, K, 0, 0] unless recorded
    valid: np.ndarray  # [B, K] bool
    active: np.ndarray  # [B] bool: the slot's sequence goes on
    version: int  # of the weights


class Engine(engine_api.Engine):
    """Continuous-batching decoder behind `prefill`, `insert`, `generate`.

    `prefill` takes one prompt, as in JetStream, or several; `bulk_insert` starts several slots from
    one prefix; `evict` ends sequences. Decode states are donated: use the returned one. `params`
    are `records.Weights`, as `sync` makes them. `generate` returns `ResultTokens` whose data holds
    K token columns, K validity columns and the generated length, and past what JetStream reads,
    what `read` takes apart: the slot's state, the weights' version, K log-probs as float32 bits.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        slots: int,
        max_length: int,
        stop_ids: tuple[int, ...],
        steps: int = 16,
        precision: Precision = Precision(),
        record_experts: bool = False,
        max_tokens: int | None = None,
        sampling: Sampling = Sampling(),
        mesh: jax.sharding.Mesh | None = None,
        load: Callable[[], Weights] | None = None,
    ):
        """Args:
        slots: sequences decoded together.
        max_length: positions of a slot, prompt and completion together.
        stop_ids: token ids that end a sequence; the stop token is part of it.
        steps: K, tokens per dispatch.
        precision: the cache's dtype and the router's top-k; the weights' is `sync`'s affair.
        record_experts: return the experts that each sampled token's distribution came from.
        max_tokens, sampling: of sequences started by `insert`; `bulk_insert` names its own.
        load: makes the weights that `load_params` returns.
        """
        self.slots = slots
        self.max_length = max_length
        self.stop_ids = stop_ids
        self.steps = steps
        self._mesh = mesh if mesh is not None else sharding.single_device_mesh()
        self.config = config = dataclasses.replace(
            config,
            experts_per_token=precision.experts_per_token or config.experts_per_token,
            expert_parts=self._mesh.shape["tensor"],
        )
        self.max_tokens = max_tokens or max_length
        self.sampling = sampling
        self._load = load
        self._requests = 0
        sparse = (
            sum(config.is_sparse(layer) for layer in range(config.num_layers))
            if record_experts
            else 0
        )
        self._experts = (sparse, config.experts_per_token if sparse else 0)
        empty = partial(decode.init_state, config, slots, max_length, precision.cache)
        place = sharding.decode_state_shardings(jax.eval_shape(empty), self._mesh)
        self._init = jax.jit(empty, out_shardings=place)
        self._prefill = jax.jit(partial(decode.prefill, config=config))
        self._insert = jax.jit(
            partial(decode.insert, positions=max_length), donate_argnums=0, out_shardings=place
        )
        self._evict = jax.jit(decode.evict, donate_argnums=0, out_shardings=place)
        # A CPU cuts the window out of the cache at every step; from four steps on, copying it there
        # and back costs less.
        apart = steps >= 4 and self._mesh.devices.flat[0].platform == "cpu"
        generate = partial(
            decode.generate,
            config=config,
            stop_ids=stop_ids,
            steps=steps,
            record_experts=record_experts,
            apart=apart,
        )
        self._generate = jax.jit(
            partial(_packed, generate),
            donate_argnums=1,
            static_argnames="window",
            out_shardings=(place, sharding.replicated(self._mesh)),
        )

    def state_shapes(self) -> decode.DecodeState:
        """Shapes and places of the decode state."""
        shapes = jax.eval_shape(self._init)
        return sharding.abstract_arrays(shapes, sharding.decode_state_shardings(shapes, self._mesh))

    def lower(
        self, weights: Any, prompts: int, width: int
    ) -> tuple[jax.stages.Lowered, jax.stages.Lowered]:
        """Prefill of `prompts` of `width` tokens, and one dispatch over the whole cache, from the
        weights' shapes alone.
        """
        tokens, lengths, leave_at = (
            jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((prompts, width), (prompts,), ())
        )
        return (
            self._prefill.lower(weights.params, tokens, lengths),
            self._generate.lower(weights, self.state_shapes(), leave_at, window=self.max_length),
        )

    def prefill(
        self, *, params: Weights, existing_prefix: Any = None, padded_tokens: Any, true_length: Any
    ) -> decode.Prefix:
        """Caches prompts: `padded_tokens` [P] with an int, or [rows, P] with [rows] true lengths."""
        if existing_prefix is not None:
            raise NotImplementedError("prefixes cannot be extended; prefill the whole prompt")
        tokens = np.atleast_2d(np.asarray(padded_tokens, np.int32))
        lengths = np.atleast_1d(np.asarray(true_length, np.int32))
        if lengths.min() < 1 or lengths.max() > min(tokens.shape[1], self.max_prefill_length):
            raise ValueError(
                f"prompt lengths {lengths.min()}..{lengths.max()} must lie in 1.."
                f"{min(tokens.shape[1], self.max_prefill_length)}"
            )
        return self._prefill(params.params, tokens, lengths)

    def insert(
        self, prefix: decode.Prefix, decode_state: decode.DecodeState, slot: int
    ) -> decode.DecodeState:
        """Starts the first prompt of `prefix` in `slot`, with the engine's limits and a key of its
        own.
        """
        self._requests += 1
        key = np.array([0, self._requests], np.uint32)
        return self.bulk_insert(
            prefix, decode_state, [slot], [0], key[None], self.max_tokens, self.sampling
        )

    def bulk_insert(
        self,
        prefix: decode.Prefix,
        decode_state: decode.DecodeState,
        slots: Any,
        rows: Any,
        keys: Any,
        limit: Any,
        sampling: Sampling,
    ) -> decode.DecodeState:
        """Starts g = `len(slots)` sequences; `limit` and the fields of `sampling` are one number or
        [g]. See `decode.insert`.
        """
        slots = np.asarray(slots, np.int32)

        def each(value, dtype):
            return np.array(np.broadcast_to(np.asarray(value, dtype), slots.shape))

        sampling = Sampling(
            each(sampling.temperature, np.float32),
            each(sampling.top_k, np.int32),
            each(sampling.top_p, np.float32),
            each(sampling.min_p, np.float32),
        )
        return self._insert(
            decode_state,
            prefix,
            slots,
            np.asarray(rows, np.int32),
            np.asarray(keys, np.uint32),
            each(limit, np.int32),
            sampling,
        )

    def evict(self, decode_state: decode.DecodeState, slots: Any) -> decode.DecodeState:
        """Ends the sequences in `slots` at once."""
        # one size to compile; past the last slot nothing happens
        padded = np.full(self.slots, self.slots, np.int32)
        padded[: len(slots)] = slots
        return self._evict(decode_state, padded)

    def generate(
        self,
        params: Weights,
        decode_state: decode.DecodeState,
        *,
        leave_at: int | None = None,
        window: int | None = None,
    ) -> tuple[decode.DecodeState, Any]:
        """Up to `steps` tokens in every active slot; returns once `leave_at` slots are idle
        (default: all).
        """
        leave_at = self.slots if leave_at is None else leave_at
        state, data = self._generate(
            params, decode_state, np.int32(leave_at), window=window or self.max_length
        )
        k = self.steps
        return state, engine_api.ResultTokens(
            data=data,
            tokens_idx=(0, k),
            valid_idx=(k, 2 * k),
            length_idx=(2 * k, 2 * k + 1),
            samples_per_slot=1,
        )

    def read(self, result: Any) -> Read:
        """What `generate` returned, on the host. Raises ValueError if a log-prob is not finite."""
        data = np.asarray(result.data)
        k = self.steps
        token, valid, numbers, logp, raw, kept, experts = np.split(
            data, np.cumsum([k, k, 3, k, k, k]), axis=1
        )
        floats = (np.ascontiguousarray(bits).view(np.float32) for bits in (logp, raw, kept))
        found = Read(
            token,
            *floats,
            experts.reshape(len(data), k, *self._experts),
            valid > 0,
            numbers[:, 1] > 0,
            int(numbers[0, 2]),
        )
        if not np.isfinite(found.logp[found.valid]).all():
            raise ValueError(
                "the engine sampled a token whose log-prob is not finite: its logits "
                "overflow or hold NaN; take other weights, or a more exact precision "
                "of the engine"
            )
        return found

    def init_decode_state(self, *args, **kwargs) -> decode.DecodeState:
        return self._init()

    def load_params(self, *args, **kwargs) -> Weights:
        if self._load is None:
            raise ValueError(
                "this engine was given no `load`; pass weights to prefill and generate"
            )
        return self._load()

    def get_prefix_destination_sharding(self) -> Any:
        return sharding.replicated(self._mesh)

    def get_tokenizer(self) -> Any:
        raise NotImplementedError(
            "tokens go in and come out; text is the caller's (dcmdp_jax.tokenizer)"
        )

    @property
    def max_concurrent_decodes(self) -> int:
        return self.slots

    @property
    def samples_per_slot(self) -> int:
        return 1

    @property
    def max_prefill_length(self) -> int:
        return self.max_length - 1

    @property
    def mesh(self) -> jax.sharding.Mesh:
        return self._mesh

    @property
    def colocated_cpus(self) -> None:
        return None


def _packed(
    generate: Callable,
    weights: Weights,
    state: decode.DecodeState,
    leave_at: jax.Array,
    *,
    window: int,
) -> tuple[decode.DecodeState, jax.Array]:
    """`decode.generate` with its output as one [slots, columns] int32 array, which is one copy to
    the host.
    """
    state, out = generate(weights, state, leave_at, window=window)
    slots = out.active.shape[0]
    numbers = jnp.stack(
        [
            out.generated,
            out.active.astype(jnp.int32),
            jnp.full((slots,), weights.version, jnp.int32),
        ],
        axis=1,
    )
    floats = [
        jax.lax.bitcast_convert_type(x, jnp.int32)
        for x in (out.steps.logp, out.steps.raw_logp, out.steps.kept)
    ]
    columns = [out.steps.token, out.steps.valid.astype(jnp.int32), numbers, *floats]
    if out.steps.experts.size:  # gathering nothing is no collective that processes agree on
        columns.append(out.steps.experts.reshape(slots, -1))
    return state, jnp.concatenate(columns, axis=1)
