"""The sampling engine as a JetStream `Engine`: the one place, with serving, that imports `jetstream`.

google-jetstream 0.2.2 imports seqio, which brings TensorFlow, and tiktoken for tokenizers that are not used here; stand-in
modules take their place while the import runs.
"""

from __future__ import annotations

import importlib.metadata
import sys
import types
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dcmdp_jax import sharding
from dcmdp_jax.config import ModelConfig
from dcmdp_jax.rollout import decode


def _import_engine_api() -> types.ModuleType:
    try:
        importlib.metadata.version("google-jetstream")
    except importlib.metadata.PackageNotFoundError:
        raise ImportError(
            "sampling needs google-jetstream 0.2.2 (`pip install --no-deps google-jetstream==0.2.2`); "
            "the package called `jetstream` is an unrelated one") from None
    names = {name: types.ModuleType(name) for name in ("seqio", "seqio.vocabularies", "tiktoken", "tiktoken.load")}
    names["seqio.vocabularies"].Vocabulary = names["seqio.vocabularies"].SentencePieceVocabulary = object
    names["tiktoken.load"].load_tiktoken_bpe = None
    before = {name: sys.modules.get(name) for name in names}
    sys.modules.update(names)
    try:
        from jetstream.engine import engine_api
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module
    return engine_api


engine_api = _import_engine_api()


class Engine(engine_api.Engine):
    """Continuous-batching decoder behind `prefill`, `insert`, `generate`.

    `prefill` takes one prompt, as in JetStream, or several; `bulk_insert` starts several slots from one prefix. Decode states
    are donated: use the returned one. `generate` returns `ResultTokens` whose data holds K token columns, K validity
    columns and the generated length, and past what JetStream reads, whether the slot is still active and K log-probs as
    float32 bits; `read` takes them apart.
    """

    def __init__(self, config: ModelConfig, *, slots: int, max_length: int, stop_ids: tuple[int, ...], steps: int = 16,
                 max_tokens: int | None = None, temperature: float = 1.0, mesh: jax.sharding.Mesh | None = None,
                 load: Callable[[], Any] | None = None):
        """Args:
          slots: sequences decoded together.
          max_length: positions of a slot, prompt and completion together.
          stop_ids: token ids that end a sequence; the stop token is part of it.
          steps: K, tokens per dispatch.
          max_tokens, temperature: of sequences started by `insert`; `bulk_insert` names its own.
          load: makes the parameters that `load_params` returns.
        """
        self.config, self.slots, self.max_length, self.stop_ids, self.steps = config, slots, max_length, stop_ids, steps
        self.max_tokens, self.temperature = max_tokens or max_length, temperature
        self._mesh = mesh if mesh is not None else sharding.single_device_mesh()
        self._load = load
        self._requests = 0
        empty = partial(decode.init_state, config, slots, max_length, jnp.bfloat16 if config.bfloat16 else jnp.float32)
        place = sharding.decode_state(jax.eval_shape(empty), self._mesh)
        self._init = jax.jit(empty, out_shardings=place)
        self._prefill = jax.jit(partial(decode.prefill, config=config))
        self._insert = jax.jit(decode.insert, donate_argnums=0, out_shardings=place)
        self._generate = jax.jit(self._generate_packed, donate_argnums=1, static_argnames="window",
                                 out_shardings=(place, sharding.replicated(self._mesh)))

    def _generate_packed(self, params, state, leave_at, *, window):
        state, out = decode.generate(params, state, leave_at, config=self.config, stop_ids=self.stop_ids, steps=self.steps,
                                     window=window)
        bits = jax.lax.bitcast_convert_type(out.logp, jnp.int32)
        numbers = [out.token, out.valid, out.generated[:, None], out.active[:, None], bits]
        return state, jnp.concatenate([column.astype(jnp.int32) for column in numbers], axis=1)

    def prefill(self, *, params: Any, existing_prefix: Any = None, padded_tokens: Any, true_length: Any) -> decode.Prefix:
        """Caches prompts: `padded_tokens` [P] with an int, or [rows, P] with [rows] true lengths."""
        if existing_prefix is not None:
            raise NotImplementedError("prefixes cannot be extended; prefill the whole prompt")
        tokens = np.atleast_2d(np.asarray(padded_tokens, np.int32))
        lengths = np.atleast_1d(np.asarray(true_length, np.int32))
        if lengths.min() < 1 or lengths.max() > min(tokens.shape[1], self.max_prefill_length):
            raise ValueError(f"prompt lengths {lengths.min()}..{lengths.max()} must lie in 1.."
                             f"{min(tokens.shape[1], self.max_prefill_length)}")
        return self._prefill(params, tokens, lengths)

    def insert(self, prefix: decode.Prefix, decode_state: decode.DecodeState, slot: int) -> decode.DecodeState:
        """Starts the first prompt of `prefix` in `slot`, with the engine's limits and a key of its own."""
        self._requests += 1
        key = np.array([0, self._requests], np.uint32)
        return self.bulk_insert(prefix, decode_state, [slot], [0], key[None], self.max_tokens, self.temperature)

    def bulk_insert(self, prefix: decode.Prefix, decode_state: decode.DecodeState, slots: Any, rows: Any, keys: Any,
                    limit: int, temperature: float) -> decode.DecodeState:
        """Starts `len(slots)` sequences of at most `limit` tokens; see `decode.insert`."""
        return self._insert(decode_state, prefix, np.asarray(slots, np.int32), np.asarray(rows, np.int32),
                            np.asarray(keys, np.uint32), np.int32(limit), np.float32(temperature))

    def generate(self, params: Any, decode_state: decode.DecodeState, *, leave_at: int | None = None,
                 window: int | None = None) -> tuple[decode.DecodeState, Any]:
        """Up to `steps` tokens in every active slot; returns once `leave_at` slots are idle (default: all)."""
        leave_at = self.slots if leave_at is None else leave_at
        state, data = self._generate(params, decode_state, np.int32(leave_at), window=window or self.max_length)
        k = self.steps
        return state, engine_api.ResultTokens(data=data, tokens_idx=(0, k), valid_idx=(k, 2 * k),
                                              length_idx=(2 * k, 2 * k + 1), samples_per_slot=1)

    @staticmethod
    def read(result: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """A `ResultTokens` of `generate` on the host: token, log-prob, valid [slots, K], and still active [slots]."""
        data, active = np.asarray(result.data), result.length_idx[1]
        logp = np.ascontiguousarray(data[:, active + 1:]).view(np.float32)
        return data[:, slice(*result.tokens_idx)], logp, data[:, slice(*result.valid_idx)] > 0, data[:, active] > 0

    def init_decode_state(self, *args, **kwargs) -> decode.DecodeState:
        return self._init()

    def load_params(self, *args, **kwargs) -> Any:
        if self._load is None:
            raise ValueError("this engine was given no `load`; pass parameters to prefill and generate")
        return self._load()

    def get_prefix_destination_sharding(self) -> Any:
        return sharding.replicated(self._mesh)

    def get_tokenizer(self) -> Any:
        raise NotImplementedError("tokens go in and come out; text is the caller's (dcmdp_jax.tokenizer)")

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
