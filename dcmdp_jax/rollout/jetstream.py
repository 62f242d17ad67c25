"""The sampling engine as a JetStream `Engine`, and the `records.Sampler` around it.

Only this module and serving import `jetstream`. google-jetstream 0.2.2 imports seqio, which brings
TensorFlow, and tiktoken for tokenizers that are not used here; empty modules take their place while
the import runs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import sys
import types
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dcmdp_jax import sharding, sync
from dcmdp_jax.config import Config, Precision
from dcmdp_jax.distributed import processes
from dcmdp_jax.models.kernels import decode_attention
from dcmdp_jax.models.model_config import ModelConfig
from dcmdp_jax.records import Prompts, Rollout, Sampling, Weights
from dcmdp_jax.rollout import decode, generate
from dcmdp_jax.rollout.sampling import Drawn, Top
from dcmdp_jax.tokens.packing import power_of_two
from dcmdp_jax.tokens.tokenizer import Tokenizer


@contextlib.contextmanager
def stand_ins() -> Iterator[None]:
    """Puts empty modules in the place of what google-jetstream imports and this project does not
    use.

    Raises ImportError if google-jetstream is not installed.
    """
    try:
        importlib.metadata.version("google-jetstream")
    except importlib.metadata.PackageNotFoundError:
        raise ImportError(
            "sampling needs google-jetstream 0.2.2 "
            "(`pip install --no-deps google-jetstream==0.2.2`); "
            "the package called `jetstream` is an unrelated one"
        ) from None
    names = {
        name: types.ModuleType(name)
        for name in ("seqio", "seqio.vocabularies", "tiktoken", "tiktoken.load")
    }
    names["seqio.vocabularies"].Vocabulary = object
    names["seqio.vocabularies"].SentencePieceVocabulary = object
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


def sampler(
    config: Config, model: ModelConfig, tokenizer: Tokenizer, mesh: jax.sharding.Mesh
) -> JetStreamSampler:
    """Returns the library's own sampler, the default of `RolloutConfig.sampler`."""
    return JetStreamSampler(
        model,
        tokenizer,
        mesh,
        slots=config.rollout.slots // processes.num_engines(config.rollout),
        max_length=config.data.max_prompt_tokens + config.rollout.max_tokens,
        steps=config.rollout.tokens_per_dispatch,
        precision=config.rollout.precision,
        record_experts=config.algorithm.replay_routing,
        top_logprobs=config.rollout.top_logprobs,
        one_engine=config.rollout.one_engine,
    )


class JetStreamSampler:
    """A `records.Sampler`: an engine, its weights, and the loop that keeps its slots busy."""

    def __init__(
        self,
        model: ModelConfig,
        tokenizer: Tokenizer,
        mesh: jax.sharding.Mesh,
        *,
        slots: int,
        max_length: int,
        steps: int = 16,
        precision: Precision = Precision(),
        record_experts: bool = False,
        top_logprobs: int = 0,
        one_engine: bool = False,
    ):
        """Makes an engine without weights.

        Args:
            slots, max_length, steps, precision, record_experts, top_logprobs: see `Engine`.
            one_engine: all processes decode in lockstep over `mesh`, which spans their devices, and
                all call `sample` and `update_weights` with the same arguments.
        """
        self.engine = Engine(
            model,
            slots=slots,
            max_length=max_length,
            stop_ids=tokenizer.eos_ids,
            steps=steps,
            precision=precision,
            record_experts=record_experts,
            top_logprobs=top_logprobs,
            mesh=mesh,
        )
        self.weights: Weights | None = None
        self._to_engine = sync.converter(model, precision, mesh)
        self._tokenizer = tokenizer
        self._one_engine = one_engine

    def update_weights(self, params: Any, version: int) -> None:
        """Converts `params` to the engine's weights; see `records.Sampler`.

        The previous weights are freed first. Raises NotFinite if a parameter is not finite; the
        sampler then has no weights.
        """
        self.weights = None
        weights = self._to_engine(params, version)
        generate.check_finite(weights)
        self.weights = weights

    def release_weights(self) -> None:
        """Frees the weights until the next `update_weights`."""
        self.weights = None

    def sample(
        self,
        prompts: Prompts,
        *,
        samples: int,
        max_tokens: int | np.ndarray,
        sampling: Sampling,
        stop_strings: tuple[str, ...] = (),
        seed: int = 0,
        offset: int = 0,
        keys: np.ndarray | None = None,
        should_stop: Callable[[], bool] = lambda: False,
        on_end: Callable[[int, np.ndarray, bool], None] = lambda index, text_ids, stopped: None,
    ) -> Rollout:
        """Samples `samples` completions of every prompt; see `records.Sampler`.

        Args:
            max_tokens: one bound, or [N].
            keys: [N, 2] uint32, a random key for each completion, instead of `seed` and `offset`.
            on_end: called with a completion's index, the ids of its text, and whether it stopped,
                as soon as it has ended.

        Raises ValueError if a prompt and its new tokens do not fit the engine, or if a log-prob is
        not finite.
        """
        if self.weights is None:
            raise ValueError("the sampler has no weights; call update_weights first")
        if self._one_engine:
            # All processes leave the loop after the same dispatch. The vote's collective must not
            # interleave with those of the engine or of the conversion.
            jax.block_until_ready(self.weights)

        def stop() -> bool:
            return processes.any_process(should_stop()) if self._one_engine else should_stop()

        # make the keys on a sampling device, so that they do not queue behind the training step
        with jax.default_device(self.engine.mesh.local_devices[0]):
            if keys is None:
                count = len(prompts.lengths) * samples
                keys = generate.completion_keys(jax.random.key(seed), count, offset)
            return generate.rollout(
                self.engine,
                self.weights,
                prompts,
                samples=samples,
                key=keys,
                max_tokens=max_tokens,
                sampling=sampling,
                stop_strings=stop_strings,
                decode=self._tokenizer.decode,
                should_stop=stop,
                on_end=on_end,
            )


class Engine(engine_api.Engine):
    """Continuous-batching decoder behind JetStream's `prefill`, `insert` and `generate`.

    `prefill` takes one prompt, as in JetStream, or several; `bulk_insert` starts several slots from
    one prefix; `evict` ends sequences. Decode states are donated: use the returned one. `params`
    are `records.Weights`, as `sync.converter` makes them. `generate` returns `ResultTokens`, which
    `read` turns into `decode.Tokens`.
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
        top_logprobs: int = 0,
        max_tokens: int | None = None,
        sampling: Sampling = Sampling(),
        mesh: jax.sharding.Mesh | None = None,
        load: Callable[[], Weights] | None = None,
    ):
        """Compiles nothing until it is used.

        Args:
            slots: sequences decoded together.
            max_length: positions of a slot, prompt and completion together.
            stop_ids: token ids that end a sequence; the stop token is part of it.
            steps: K, tokens per dispatch.
            precision: the cache's format and the router's top-k. The formats of the weights are
                those of the weights that are passed in.
            record_experts: return the experts that each sampled token's distribution came from.
            top_logprobs: k, the likeliest tokens to return at each place, with their log-probs.
            max_tokens, sampling: of sequences started by `insert`; `bulk_insert` takes its own.
            load: returns the weights for `load_params`.
        """
        self.slots = slots
        self.max_length = max_length
        self.stop_ids = stop_ids
        self.steps = steps
        self._mesh = mesh if mesh is not None else sharding.single_device_mesh()
        self.config = config = dataclasses.replace(
            config,
            experts_per_token=precision.experts_per_token or config.experts_per_token,
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
        self._top_logprobs = top_logprobs
        self._jit(precision.cache, record_experts)

    def _jit(self, cache: str, record_experts: bool) -> None:
        """Makes the functions that are compiled when they are first called."""
        empty = partial(decode.init_state, self.config, self.slots, self.max_length, cache)
        shardings = sharding.decode_state_shardings(jax.eval_shape(empty), self._mesh)
        self._init = jax.jit(empty, out_shardings=shardings)
        self._prefill = jax.jit(
            partial(decode.prefill, config=self.config, mesh=self._mesh),
            keep_unused=True,  # so that plans count the weights after the last keys and values
        )
        self._insert = jax.jit(
            partial(decode.insert, positions=self.max_length),
            donate_argnums=0,
            out_shardings=shardings,
        )
        self._evict = jax.jit(decode.evict, donate_argnums=0, out_shardings=shardings)
        platform = self._mesh.devices.flat[0].platform
        # A CPU slices the window out of the cache at every step. From four steps on, copying it
        # once and back costs less.
        copy_window = self.steps >= 4 and platform == "cpu"
        # The kernel reads what each slot holds, whatever the window: one program serves them all.
        self._has_window = platform != "tpu" or not decode_attention.is_supported(
            self.config.head_dim
        )
        options = {
            "config": self.config,
            "stop_ids": self.stop_ids,
            "steps": self.steps,
            "record_experts": record_experts,
            "top_logprobs": self._top_logprobs,
            "mesh": self._mesh,
        }

        def compiled(generate: Callable) -> Callable:
            return jax.jit(
                partial(_generate_packed, partial(generate, **options)),
                donate_argnums=1,
                static_argnames="window",
                out_shardings=(shardings, sharding.replicated(self._mesh)),
            )

        self._generate = compiled(partial(decode.generate, copy_window=copy_window))
        # On a CPU a step of fewer rows is cheaper, if products take most of it: worth a program
        # more for each window. Elsewhere a step reads the same weights whatever the rows. To write
        # into a few slots of a float8 cache, a CPU converts all of it.
        is_one_cpu = platform == "cpu" and self._mesh.size == 1
        has_few = is_one_cpu and self.config.hidden_size >= 256 and cache != "float8_e4m3fn"
        self.few = self.slots // 4 if has_few else 0
        self._generate_few = compiled(decode.generate_few)

    def state_shapes(self) -> decode.DecodeState:
        """Returns shapes and shardings of the decode state."""
        shapes = jax.eval_shape(self._init)
        return sharding.abstract_arrays(shapes, sharding.decode_state_shardings(shapes, self._mesh))

    def lower(
        self, weights: Any, prompts: int, width: int
    ) -> tuple[jax.stages.Lowered, jax.stages.Lowered]:
        """Lowers a prefill of `prompts` prompts of `width` tokens, and a dispatch over the full
        cache; `weights` may be shapes alone.
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
        """Caches prompts `padded_tokens`, [P] or [rows, P], of `true_length`, an int or [rows]."""
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
        """Starts the first prompt of `prefix` in `slot`, with the engine's limits and a new key."""
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
        """Starts g = `len(slots)` sequences; see `decode.insert`.

        `limit` and the fields of `sampling` are one number or [g].
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
        """Ends the sequences in `slots`."""
        # padded to one size, with a number past the last slot, which is dropped
        padded = np.full(self.slots, self.slots, np.int32)
        padded[: len(slots)] = slots
        return self._evict(decode_state, padded)

    def window(self, positions: int) -> int:
        """Returns the window of a dispatch in which no sequence has more than `positions`."""
        return power_of_two(positions, self.max_length) if self._has_window else self.max_length

    def generate(
        self,
        params: Weights,
        decode_state: decode.DecodeState,
        *,
        leave_at: int | None = None,
        window: int | None = None,
        occupied: np.ndarray | None = None,
    ) -> tuple[decode.DecodeState, Any]:
        """Samples up to `steps` tokens in every active slot; see `decode.generate`.

        Returns early once `leave_at` slots are idle (default: all). `occupied` holds the numbers of
        all slots that may be active (default: every slot); `few` or fewer cost less.
        """
        leave_at = self.slots if leave_at is None else leave_at
        if window is None or not self._has_window:
            window = self.max_length
        is_few = occupied is not None and len(occupied) <= self.few
        if is_few and leave_at > self.slots - self.few:
            idle = np.setdiff1d(np.arange(self.slots), occupied)
            chosen = np.concatenate([occupied, idle])[: self.few].astype(np.int32)
            generate = partial(self._generate_few, params, decode_state, chosen)
        else:
            generate = partial(self._generate, params, decode_state)
        state, data = generate(np.int32(leave_at), window=window)
        k = self.steps
        return state, engine_api.ResultTokens(
            data=data,
            tokens_idx=(0, k),
            valid_idx=(k, 2 * k),
            length_idx=(2 * k, 2 * k + 1),
            samples_per_slot=1,
        )

    def read(self, result: Any) -> decode.Tokens:
        """Returns on the host what `generate` sampled.

        Raises ValueError if a log-prob is not finite.
        """
        tokens = _unpack(np.asarray(result.data), self.steps, self._experts, self._top_logprobs)
        if not np.isfinite(tokens.drawn.rollout_logp[tokens.valid]).all():
            raise ValueError(
                "the engine sampled a token whose log-prob is not finite: its logits "
                "overflow or hold NaN; take other weights, or a more exact precision "
                "of the engine"
            )
        return tokens

    def init_decode_state(self, *args, **kwargs) -> decode.DecodeState:
        """Returns empty slots."""
        return self._init()

    def load_params(self, *args, **kwargs) -> Weights:
        """Returns what `load` returns. Raises ValueError if the engine was given none."""
        if self._load is None:
            raise ValueError(
                "this engine was given no `load`; pass weights to prefill and generate"
            )
        return self._load()

    def get_prefix_destination_sharding(self) -> Any:
        """Returns the sharding of a prefix: every device holds all of it."""
        return sharding.replicated(self._mesh)

    def get_tokenizer(self) -> Any:
        """Raises NotImplementedError: the engine handles token ids only."""
        raise NotImplementedError(
            "the engine takes and returns token ids; make text with dcmdp_jax.tokens.tokenizer"
        )

    @property
    def max_concurrent_decodes(self) -> int:
        """The number of slots."""
        return self.slots

    @property
    def samples_per_slot(self) -> int:
        """One sequence per slot."""
        return 1

    @property
    def max_prefill_length(self) -> int:
        """The longest prompt: one position is left for a new token."""
        return self.max_length - 1

    @property
    def mesh(self) -> jax.sharding.Mesh:
        """The devices of the engine."""
        return self._mesh

    @property
    def colocated_cpus(self) -> None:
        """None: the engine uses no host devices of its own."""
        return None


def _generate_packed(
    generate: Callable,
    weights: Weights,
    state: decode.DecodeState,
    *arguments: jax.Array,
    window: int,
) -> tuple[decode.DecodeState, jax.Array]:
    """Returns what `generate` does, its tokens as one int32 array [slots, columns].

    One array is one copy to the host. JetStream reads the first 2 K + 1 columns.
    """
    state, tokens = generate(weights, state, *arguments, window=window)
    slots = tokens.active.shape[0]
    columns = [
        tokens.drawn.token,
        tokens.valid.astype(jnp.int32),
        tokens.generated[:, None],
        tokens.active[:, None].astype(jnp.int32),
        jnp.full((slots, 1), tokens.version, jnp.int32),
        jax.lax.bitcast_convert_type(tokens.drawn.rollout_logp, jnp.int32),
        jax.lax.bitcast_convert_type(tokens.drawn.support_mass, jnp.int32),
    ]
    if tokens.experts.size:  # an empty array would be gathered by some processes and not others
        columns.append(tokens.experts.reshape(slots, -1))
    if tokens.top is not None:
        columns.append(tokens.top.token.reshape(slots, -1))
        columns.append(jax.lax.bitcast_convert_type(tokens.top.logp, jnp.int32).reshape(slots, -1))
    return state, jnp.concatenate(columns, axis=1)


def _unpack(data: np.ndarray, k: int, experts: tuple[int, int], top: int) -> decode.Tokens:
    """Returns the tokens that `_generate_packed` put into `data`.

    `experts` is (sparse layers, experts per token), and `top` the likeliest tokens of each place.
    """

    def floats(bits: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(bits).view(np.float32)

    sizes = [k, k, 1, 1, 1, k, k, k * experts[0] * experts[1], k * top]
    token, valid, generated, active, version, logp, mass, chosen, top_token, top_logp = np.split(
        data, np.cumsum(sizes), axis=1
    )
    likeliest = Top(
        top_token.reshape(len(data), k, top), floats(top_logp).reshape(len(data), k, top)
    )

    return decode.Tokens(
        Drawn(token, floats(logp), floats(mass)),
        chosen.reshape(len(data), k, *experts),
        valid > 0,
        generated[:, 0],
        active[:, 0] > 0,
        version[0, 0],
        likeliest if top else None,
    )
