"""The engine against what bounds it, and against itself: `python -m benchmarks.inference`.

The programs of a part alternate in one run. Seconds are the process's CPU seconds where the device
is a CPU, and wall seconds elsewhere.

  loop      a rollout of equal lengths through the engine, against one compiled prefill and
            while_loop that does nothing else
  products  the same rollout, of a dense and of a sparse model, against its products of activations
            and weights alone: the least that an engine with these products can take
  slots     occupancy of the slots, tokens over decode steps x slots, on long-tailed lengths, beside
            that of static batches
  ragged    64 requests of those lengths, of a dense and of a sparse model: where the time goes, and
            what it is if few occupied slots are decoded among all
  prefix    prefill and start of 8 samples of one 512-token prompt, against 1
  sampler   a draw and its log-prob from 16 rows of 151,936 logits, against `jax.random.categorical`
            and log_softmax
  weights   a decode dispatch by the weights' format: seconds against float32, and bytes
  peers     other engines beside this one, as `benchmarks.peers.compare` prints them where PEERS
            names the harness
  roof      tokens a second against the least time in which the parameters and the live cache can be
            read (needs --bandwidth)

    python -m benchmarks.inference
    taskset -c 0 python -m benchmarks.inference loop slots prefix weights
    python -m benchmarks.inference roof --shape 0.6B --batch 64 256 --bandwidth 3350  # an H100's
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.measure import SHAPES, SMALL, make_prompts, measure
from benchmarks.peers.compare import compare
from dcmdp_jax import sharding, sync
from dcmdp_jax.config import Precision
from dcmdp_jax.models import decoder
from dcmdp_jax.models.model_config import ModelConfig
from dcmdp_jax.records import Sampling
from dcmdp_jax.rollout import decode, sampling
from dcmdp_jax.rollout.generate import rollout
from dcmdp_jax.rollout.jetstream import Engine
from dcmdp_jax.tokens.packing import power_of_two

SPARSE = dataclasses.replace(SMALL, num_experts=16, experts_per_token=4, expert_size=192)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "parts",
        nargs="*",
        default=["loop", "products", "slots", "ragged", "prefix", "sampler", "weights", "peers"],
    )
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--batch", type=int, nargs="+", default=[16], help="slots of `roof`")
    parser.add_argument("--bandwidth", type=float, help="memory bandwidth in GB/s")
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    parts = {
        "loop": loop,
        "products": products,
        "slots": slots,
        "ragged": ragged,
        "prefix": prefix,
        "sampler": sampler,
        "weights": weights,
        "peers": lambda repeats: compare(["T3", "T4"], rounds=repeats, cpu="0"),
    }
    for part in args.parts:
        if part == "roof":
            for batch in args.batch:
                roof(SHAPES[args.shape], batch, args.bandwidth, args.repeats)
        elif part in parts:
            parts[part](args.repeats)
        else:
            raise SystemExit(f"{part!r} is none of {', '.join(parts)}, roof")


def loop(repeats: int) -> None:
    """16 prompts of 64 tokens, 64 new ones each."""
    count = 16
    new = 64
    prompts = make_prompts(np.full(count, 64))
    policy = make_weights(SMALL)
    engine = make_engine(SMALL, slots=count, max_length=128)

    @jax.jit
    def alone(weights, tokens, lengths, keys):
        state = decode.init_state(SMALL, count, 128, "")
        first = decode.prefill(weights.params, tokens, lengths, SMALL)
        ones = jnp.ones((count,))
        how = Sampling(ones, jnp.zeros((count,), jnp.int32), ones, jnp.zeros((count,)))
        everyone = jnp.arange(count)
        state = decode.insert(
            state, first, everyone, everyone, keys, jnp.full((count,), new), how, positions=128
        )
        return decode.generate(
            weights,
            state,
            jnp.int32(count),
            config=SMALL,
            stop_ids=(),
            steps=new,
            window=128,
            record_experts=False,
        )[1]

    keys = np.asarray(jax.random.bits(jax.random.key(0), (count, 2), "uint32"))
    ours, bare = measure(
        [
            lambda: rollout(
                engine, policy, prompts, samples=1, key=jax.random.key(0), max_tokens=new
            ),
            lambda: jax.block_until_ready(alone(policy, prompts.tokens, prompts.lengths, keys)),
        ],
        repeats,
    )
    print(
        f"loop     engine {ours * 1e3:.0f} ms, one compiled loop {bare * 1e3:.0f} ms: "
        f"{ours / bare:.2f}x ({count * new / ours:.0f} tokens/s)"
    )


def products(repeats: int) -> None:
    """As `loop`; in the sparse model every expert gets as many tokens at every step."""
    count = 16
    new = 64
    prompts = make_prompts(np.full(count, 64))

    @jax.jit
    def alone(params, rows):
        def step(_, x):
            for layer in params["stacks"]:
                x = layer_products(x, layer, SPARSE.experts_per_token)
            return x + (x @ params["head"])[:, : x.shape[1]]

        first = rows
        for layer in params["stacks"]:
            first = layer_products(first, layer, SPARSE.experts_per_token)
        return first, jax.lax.fori_loop(0, new, step, rows[:count])

    for name, shape in (("dense", SMALL), ("sparse", SPARSE)):
        policy = make_weights(shape)
        small = jax.tree.map(lambda x: x * 0.01, policy.params)  # the rows grow at every step
        engine = make_engine(shape, slots=count, max_length=128)
        rows = jax.random.normal(jax.random.key(1), (count * 64, shape.hidden_size))
        ours, bare = measure(
            [
                partial(
                    rollout,
                    engine,
                    policy,
                    prompts,
                    samples=1,
                    key=jax.random.key(0),
                    max_tokens=new,
                ),
                lambda params=small, rows=rows: jax.block_until_ready(alone(params, rows)),
            ],
            repeats,
        )
        print(
            f"products {name}: engine {ours * 1e3:.0f} ms, products alone {bare * 1e3:.0f} ms: "
            f"{bare / ours:.0%}"
        )


def layer_products(x: jax.Array, layer: dict, each: int) -> jax.Array:
    """Returns `x` [n, D] after the products of a layer with its weights, those of `each` experts a
    token among them, and nothing between them but sums.
    """
    width = x.shape[1]
    attention = layer["attention"]
    q, k, v = (x @ attention[f"{name}_proj"].reshape(width, -1) for name in "qkv")
    x = x + q.at[:, : k.shape[1]].add(k + v) @ attention["o_proj"].reshape(-1, width)
    if "mlp" in layer:
        mlp = layer["mlp"]
        return x + (x @ mlp["gate_proj"] + x @ mlp["up_proj"]) @ mlp["down_proj"]
    moe = layer["moe"]
    taken = jnp.repeat(x, each, axis=0).reshape(len(moe["up_proj"]), -1, width)
    taken = taken + jnp.sum(x @ moe["router"])
    made = (taken @ moe["gate_proj"] + taken @ moe["up_proj"]) @ moe["down_proj"]
    return x + made.reshape(len(x), each, width).sum(axis=1)


def slots(repeats: int) -> None:
    """Requests on 16 slots, lengths log-normal, median 23, at most 128; the loop does not know a
    length before it is reached.
    """
    del repeats
    policy = make_weights(SMALL)
    engine = make_engine(SMALL, slots=16, max_length=192)
    steps = []
    read = engine.read
    engine.read = lambda result: (
        steps.append(int((out := read(result)).valid.any(axis=0).sum())) or out
    )
    for count in (64, 512):
        limits = ragged_lengths(count)
        steps.clear()
        rollout(
            engine,
            policy,
            make_prompts(np.full(count, 64)),
            samples=1,
            key=jax.random.key(0),
            max_tokens=limits,
        )
        tokens = int(limits.sum())
        static = int(limits.reshape(-1, 16).max(axis=1).sum())
        bound = fifo(limits, 16)
        print(
            f"slots    {count} requests: {tokens / (16 * sum(steps)):.0%} of 16 slots occupied "
            f"over {sum(steps)} steps; at best {tokens / (16 * bound):.0%} in this order; "
            f"in static batches {tokens / (16 * static):.0%}"
        )


def ragged_lengths(count: int) -> np.ndarray:
    drawn = np.exp(np.random.default_rng(0).normal(np.log(23), 0.8, count))
    return np.clip(drawn, 8, 128).astype(np.int32)


def ragged(repeats: int) -> None:
    """64 requests on 16 slots, lengths as in `slots`."""
    limits = ragged_lengths(64)
    prompts = make_prompts(np.full(64, 64))
    for name, shape in (("dense", SMALL), ("sparse", SPARSE)):
        policy = make_weights(shape)
        engine = make_engine(shape, slots=16, max_length=192)

        def run(few: int, engine=engine, policy=policy) -> None:
            engine.few = few
            rollout(engine, policy, prompts, samples=1, key=jax.random.key(0), max_tokens=limits)

        few = engine.few
        ours, plain = measure([partial(run, few), partial(run, 0)], repeats)
        print(
            f"ragged   {name}: {ours * 1e3:.0f} ms; with every slot decoded always "
            f"{plain * 1e3:.0f} ms: {ours / plain:.2f}x"
        )
        seconds: collections.Counter[str] = collections.Counter()
        steps: collections.Counter[str] = collections.Counter()
        prefill = engine.prefill
        generate = engine.generate

        def timed_prefill(seconds=seconds, prefill=prefill, **options):
            start = time.process_time()
            out = jax.block_until_ready(prefill(**options))
            seconds["prompts"] += time.process_time() - start
            return out

        def timed_generate(
            *args, seconds=seconds, steps=steps, engine=engine, generate=generate, **options
        ):
            part = "few" if len(options["occupied"]) <= engine.few else "more"
            start = time.process_time()
            state, result = jax.block_until_ready(generate(*args, **options))
            seconds[part] += time.process_time() - start
            steps[part] += int(engine.read(result).valid.any(axis=0).sum())
            return state, result

        engine.prefill = timed_prefill
        engine.generate = timed_generate
        start = time.process_time()
        run(few)
        whole = time.process_time() - start
        print(
            f"ragged   {name}: prompts {seconds['prompts'] / whole:.0%}; {steps['more']} steps of "
            f"more than {few} sequences {seconds['more'] / whole:.0%}, {steps['few']} of at most "
            f"{few} {seconds['few'] / whole:.0%}"
        )


def fifo(limits: np.ndarray, slots: int) -> int:
    """Returns the steps of the schedule that refills every slot the moment it is idle."""
    busy = np.zeros(slots, int)
    for length in limits:
        busy[busy.argmin()] += length
    return int(busy.max())


def prefix(repeats: int) -> None:
    prompts = make_prompts(np.full(1, 512))
    policy = make_weights(SMALL)
    engine = make_engine(SMALL, slots=8, max_length=576)
    keys = np.zeros((8, 2), np.uint32)

    def start(samples: int):
        first = engine.prefill(
            params=policy, padded_tokens=prompts.tokens, true_length=prompts.lengths
        )
        rows = np.zeros(samples, np.int32)
        return jax.block_until_ready(
            engine.bulk_insert(
                first,
                engine.init_decode_state(),
                np.arange(samples),
                rows,
                keys[:samples],
                64,
                Sampling(),
            )
        )

    one, eight = measure([partial(start, 1), partial(start, 8)], repeats)
    print(
        f"prefix   8 samples of one 512-token prompt {eight * 1e3:.1f} ms, "
        f"1 sample {one * 1e3:.1f} ms: {eight / one:.2f}x"
    )


def sampler(repeats: int) -> None:
    rows = 16
    size = 151_936
    logits = jax.random.normal(jax.random.key(0), (rows, size)) * 3
    keys = jax.random.bits(jax.random.key(1), (rows, 2), "uint32")
    one = jnp.ones((rows,))
    plain = Sampling(one, jnp.zeros((rows,), jnp.int32), one, jnp.zeros((rows,)))

    @jax.jit
    def categorical(key, logits):
        token = jax.random.categorical(key, logits)
        return token, jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], axis=-1)

    draw = jax.jit(sampling.sample)
    ours, library, nucleus = measure(
        [
            lambda: jax.block_until_ready(draw(logits, keys, plain)),
            lambda: jax.block_until_ready(categorical(jax.random.key(2), logits)),
            lambda: jax.block_until_ready(
                draw(logits, keys, plain._replace(top_k=plain.top_k + 50, top_p=one * 0.9))
            ),
        ],
        repeats,
    )
    print(
        f"sampler  16 x {size}: {ours * 1e3:.1f} ms, "
        f"jax.random.categorical {library * 1e3:.1f} ms: {library / ours:.0f}x; "
        f"with top-k 50 and top-p 0.9 {nucleus * 1e3:.1f} ms"
    )


def weights(repeats: int) -> None:
    """64 decode steps of 16 slots; only the projections change their format. Bytes are those of an
    accelerator, which packs two 4-bit numbers into one.
    """
    names = ("float32", "bfloat16", "int8", "int4", "float8_e4m3fn", "float8_e5m2", "nf4")
    policies = [make_weights(SMALL, Precision(weights=name)) for name in names]
    engine = make_engine(SMALL, slots=16, max_length=128)
    times = measure(
        [partial(decoded, engine, policy) for policy in policies],
        repeats,
        partial(started, engine, policies[0], 16, 64, 64),
    )
    sizes_of = [
        sum(
            x.size * (4 if x.dtype.name.endswith("int4") else 8 * x.dtype.itemsize) // 8
            for x in jax.tree.leaves(policy.params["stacks"])
        )
        for policy in policies
    ]
    for name, seconds, size in zip(names, times, sizes_of):
        print(
            f"weights  {name:14} {seconds * 1e3:6.0f} ms {seconds / times[0]:.2f}x, "
            f"layers {size / 1e6:6.2f} MB {size / sizes_of[0]:.2f}x"
        )


def roof(shape: ModelConfig, batch: int, bandwidth: float | None, repeats: int) -> None:
    """128 decode steps from 512 live positions on, bfloat16 throughout, random weights."""
    if not bandwidth:
        raise SystemExit("roof needs --bandwidth, the device's memory bandwidth in GB/s")
    policy = make_weights(
        shape, Precision(weights="bfloat16", embed="bfloat16", head="bfloat16", norms="bfloat16")
    )
    engine = Engine(
        shape,
        slots=batch,
        max_length=1024,
        stop_ids=(),
        steps=64,
        precision=Precision(cache="bfloat16"),
    )
    start = partial(started, engine, policy, batch, 512, 128)
    seconds = measure([partial(decoded, engine, policy)], repeats, start)[0] / 128
    looked_up = 0 if shape.tie_word_embeddings else policy.params["embed"].nbytes
    read = sum(x.nbytes for x in jax.tree.leaves(policy.params)) - looked_up
    live = 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * 2 * batch * 576
    least = (read + live) / (bandwidth * 1e9)
    print(
        f"roof     batch {batch}: {seconds * 1e3:.2f} ms a step, {batch / seconds:.0f} tokens/s; "
        f"{read / 1e9:.2f} GB of parameters and {live / 1e9:.2f} GB of cache take "
        f"{least * 1e3:.2f} ms: {least / seconds:.0%} of the roof"
    )


def started(engine: Engine, policy, count: int, prompt: int, new: int):
    """Returns a state in which `count` sequences have `new` tokens to make."""
    prompts = make_prompts(np.full(1, prompt))
    first = engine.prefill(params=policy, padded_tokens=prompts.tokens, true_length=prompts.lengths)
    return jax.block_until_ready(
        engine.bulk_insert(
            first,
            engine.init_decode_state(),
            np.arange(count),
            np.zeros(count, np.int32),
            np.zeros((count, 2), np.uint32),
            new,
            Sampling(),
        )
    )


def decoded(engine: Engine, policy, state) -> None:
    """Decodes until every sequence of `state` has reached its limit."""
    length = int(state.length.max()) + 1
    left = int(state.limit.max())
    for made in range(0, left, engine.steps):
        state, result = engine.generate(
            policy, state, window=power_of_two(length + made + engine.steps, engine.max_length)
        )
    jax.block_until_ready(result.data)


def make_weights(shape: ModelConfig, precision: Precision = Precision()):
    params = jax.jit(partial(decoder.init, config=shape))(jax.random.key(0))
    return sync.converter(shape, precision, sharding.single_device_mesh())(params, 0)


def make_engine(shape: ModelConfig, slots: int, max_length: int) -> Engine:
    return Engine(shape, slots=slots, max_length=max_length, stop_ids=())


if __name__ == "__main__":
    main()
