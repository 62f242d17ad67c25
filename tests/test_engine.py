"""The engine agrees with the forward pass: what it samples, and the log-probs that it reports."""

import dataclasses
import logging
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcmdp_jax import sharding, sync
from dcmdp_jax.config import MeshConfig, Precision
from dcmdp_jax.models import decoder, inference, layers, rope, scoring
from dcmdp_jax.models.kernels import attention
from dcmdp_jax.records import Example, Prompts, Sampling, Scored
from dcmdp_jax.rollout import jetstream
from dcmdp_jax.rollout.generate import completion_keys, rollout
from dcmdp_jax.tokens import packing
from support.engines import (
    DENSE,
    MOE,
    STOP,
    G,
    P,
    T,
    make_engine,
    make_params,
    make_prompts,
    make_weights,
    sample,
    scored,
)

pytestmark = pytest.mark.full

MODELS = pytest.mark.parametrize("model", [DENSE, MOE], ids=["dense", "moe"])


@MODELS
def test_log_probs_are_the_trainers(model):
    """Ragged prompts, slots reused, early leaving; 1e-5 on every sampled token in float32."""
    out = sample(model)
    assert len(set(out.lengths)) > 3
    for exact, tokens, reported in scored(model, out, 0.8):
        np.testing.assert_allclose(
            reported, exact[np.arange(len(tokens)), tokens], atol=1e-5, rtol=0
        )


@pytest.mark.parametrize(
    "weights, least", [("int4", 1e-2), ("int8", 1e-3), ("float8_e4m3fn", 1e-3), ("bfloat16", 1e-4)]
)
def test_a_coarser_engine_is_not_the_trainer(weights, least):
    gaps = [
        abs(reported - exact[np.arange(len(tokens)), tokens]).mean()
        for exact, tokens, reported in scored(DENSE, sample(DENSE, weights), 0.8)
    ]
    assert least < np.mean(gaps) < 5


@pytest.mark.parametrize("steps", [1, 8])
@MODELS
def test_greedy_decoding_is_the_argmax_of_the_forward_pass(model, steps):
    """200 ragged prompts through 16 slots; where two logits tie within round-off, either is the
    argmax.
    """
    prompts = make_prompts(200)
    out = rollout(
        make_engine(model, 16, steps),
        make_weights(model),
        prompts,
        samples=1,
        key=jax.random.key(0),
        max_tokens=T,
        sampling=Sampling(0.0),
    )
    rows = np.zeros((200, P + T), np.int32)
    place = prompts.lengths[:, None] + np.arange(T)
    rows[:, :P] = prompts.tokens
    np.put_along_axis(rows, place, out.tokens, axis=1)
    logp = np.asarray(
        jax.jit(lambda params: jax.nn.log_softmax(decoder.logits(params, rows, model)))(
            make_params(model)
        )
    )
    logp = np.take_along_axis(logp, place[..., None] - 1, axis=1)
    sampled = np.arange(T) < out.lengths[:, None]
    chosen = np.take_along_axis(logp, out.tokens[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(chosen[sampled], logp.max(-1)[sampled], atol=1e-6)
    np.testing.assert_allclose(out.rollout_logp[sampled], chosen[sampled], atol=1e-5)
    assert len(set(out.lengths)) > 3 and (logp.argmax(-1) == out.tokens)[sampled].mean() > 0.999


@pytest.fixture(scope="module")
def recorded():
    """A rollout of MOE with the experts of every token."""
    return rollout(
        make_engine(MOE, record_experts=True),
        make_weights(MOE),
        make_prompts(),
        samples=G,
        key=jax.random.key(1),
        max_tokens=T,
        sampling=Sampling(0.8),
    )


def test_recording_experts_does_not_change_what_is_sampled(recorded):
    np.testing.assert_array_equal(recorded.tokens, sample(MOE).tokens)


def test_recorded_experts_are_those_of_the_trainers_router(recorded):
    """Ids of every layer for every token; the trainer's router picks the same from the same
    weights.
    """
    out = recorded
    assert out.experts.shape == (*out.tokens.shape, MOE.num_layers, MOE.experts_per_token)
    for i in range(3):
        prompt = out.prompts.tokens[0, : out.prompts.lengths[0]]
        n = out.lengths[i]
        row = np.concatenate([prompt, out.tokens[i, : n - 1]])[None]
        # the token fed stands one place before the token sampled
        chosen = routed(row)[:, len(prompt) - 1 :]
        for layer in range(MOE.num_layers):
            np.testing.assert_array_equal(
                np.sort(out.experts[i, :n, layer]), np.sort(chosen[layer])
            )
        assert (out.experts[i, n:] == -1).all()


def test_the_engine_may_use_fewer_experts():
    fewer = rollout(
        make_engine(MOE, record_experts=True, precision=Precision(experts_per_token=1)),
        make_weights(MOE),
        make_prompts(),
        samples=1,
        key=jax.random.key(1),
        max_tokens=T,
    )
    assert fewer.experts.shape[-1] == 1


TIED = dataclasses.replace(MOE, experts_per_token=1)


def tied(params):
    """Columns of each router in pairs that differ by less than bfloat16 tells apart: which of a
    pair wins is round-off's choice, and with one expert a token and gates that sum to one nothing
    else differs.
    """

    def leaf(path, w):
        if path[-1].key != "router":
            return w
        w = jnp.repeat(w[..., ::2].astype(jnp.bfloat16).astype(jnp.float32), 2, axis=-1)
        return w * (1 + 1e-3 * jnp.array([0.0, 1.0, 0.0, -1.0]))

    return jax.tree_util.tree_map_with_path(leaf, params)


@pytest.mark.parametrize(
    "model, precision, atol",
    [
        (MOE, Precision(), None),
        (MOE, Precision(experts_per_token=1), 1e-2),
        (TIED, Precision(router="bfloat16"), 1e-2),
    ],
    ids=["exact", "fewer experts", "near ties"],
)
def test_a_trainer_that_replays_the_experts_is_the_engine(model, precision, atol):
    """Where the choice of experts is all that differs: prompts of one token, for longer ones are
    not recorded before their last. `atol` is exceeded without the replay; an exact engine needs
    none.
    """
    prompts = Prompts(
        np.arange(7, dtype=np.int32)[:, None] + 20, np.ones(7, np.int32), (Example("", ""),) * 7
    )
    params = tied(make_params(model)) if model is TIED else make_params(model)
    engine = make_engine(model, record_experts=True, precision=precision)
    out = rollout(
        engine,
        sync.converter(model, precision, sharding.single_device_mesh())(params, 0),
        prompts,
        samples=G,
        key=jax.random.key(1),
        max_tokens=T,
        sampling=Sampling(0.8),
    )
    packed = packing.pack(
        Scored(out, np.zeros(len(out.tokens))),
        minibatches=1,
        microbatches=1,
        row_length=2 * (1 + T),
    )
    batch = jax.tree.map(lambda x: x[0, 0], packed)

    @jax.jit
    def error(replayed):
        logp, _ = scoring.packed_logp(
            params,
            batch.tokens,
            batch.positions,
            batch.segment_ids,
            batch.index,
            model,
            0.8,
            replayed=replayed,
        )
        return jnp.max(jnp.where(batch.mask, jnp.abs(logp - batch.rollout_logp), 0))

    assert batch.mask.sum() > 50 and error(batch.replayed) < 5e-6
    assert error(None) < 5e-6 if atol is None else error(None) > atol
    assert abs(error(np.full_like(batch.replayed, -1)) - error(None)) < 1e-6


def routed(row):
    """[layers, S, k]: the router's choice in the forward pass of one row of MOE, layer by layer."""
    params = inference.unstack(make_params(MOE), MOE)
    cos, sin = rope.rotary(np.arange(row.shape[1])[None], MOE)
    x = params["embed"][row]
    chosen = []
    causal = np.tri(row.shape[1], dtype=bool)
    for tree in params["stacks"]:
        x, _, experts = layers.Layer(MOE, True).apply(
            {"params": tree},
            x,
            cos,
            sin,
            lambda q, k, v: (attention.attention(q, k, v, causal), None),
        )
        chosen.append(experts[0])
    return np.stack(chosen)


@MODELS
def test_samples_do_not_depend_on_slots_or_dispatches(model):
    reference = sample(model, slots=4, steps=3)
    for slots, steps in ((32, 8), (7, 1)):
        other = sample(model, slots=slots, steps=steps)
        np.testing.assert_array_equal(other.tokens, reference.tokens)
        np.testing.assert_allclose(other.rollout_logp, reference.rollout_logp, atol=2e-5)
    assert (sample(model, key=2).tokens != reference.tokens).any()


@pytest.mark.parametrize("precision", [Precision(), Precision(cache="int8")], ids=["", "int8"])
def test_few_occupied_slots_sample_what_they_do_among_all(monkeypatch, precision):
    """Two of eight slots alone, then five with those that were started beside them."""
    weights = make_weights(MOE)
    prompts = make_prompts(5)
    keys = completion_keys(jax.random.key(1), 5)
    engine = make_engine(
        MOE, slots=8, steps=4, record_experts=True, top_logprobs=2, precision=precision
    )
    monkeypatch.setattr(engine, "few", 2)
    prefix = engine.prefill(
        params=weights, padded_tokens=prompts.tokens, true_length=prompts.lengths
    )

    def sampled(alone):
        state = engine.init_decode_state()
        state = engine.bulk_insert(prefix, state, [6, 1], [0, 1], keys[:2], T, Sampling(0.8))
        dispatches = []
        for window in (16, None):
            state, result = engine.generate(weights, state, window=window, occupied=alone)
            dispatches.append(engine.read(result))
        state = engine.bulk_insert(prefix, state, [0, 3, 7], [2, 3, 4], keys[2:], T, Sampling(0.8))
        for _ in range(2):
            state, result = engine.generate(weights, state)
            dispatches.append(engine.read(result))
        return dispatches

    programs = []
    for name in ("_generate", "_generate_few"):
        monkeypatch.setattr(engine, name, recorded_call(programs, name, getattr(engine, name)))
    expected = sampled(None)
    assert [out.valid.any(axis=1).sum() for out in expected] == [2, 2, 5, 4]
    assert programs == ["_generate"] * 4
    for occupied in ([6, 1], [1, 6]):
        for out, whole in zip(sampled(occupied), expected, strict=True):
            valid = whole.valid
            np.testing.assert_array_equal(out.valid, valid)
            np.testing.assert_array_equal(out.active, whole.active)
            np.testing.assert_array_equal(out.drawn.token[valid], whole.drawn.token[valid])
            np.testing.assert_array_equal(out.experts[valid], whole.experts[valid])
            np.testing.assert_array_equal(out.top.token[valid], whole.top.token[valid])
            np.testing.assert_allclose(
                out.drawn.rollout_logp[valid], whole.drawn.rollout_logp[valid], atol=2e-5
            )
            np.testing.assert_allclose(out.top.logp[valid], whole.top.logp[valid], atol=2e-5)
    assert programs[4:] == ["_generate_few", "_generate_few", "_generate", "_generate"] * 2


def recorded_call(calls, name, function):
    """`function`, which writes `name` into `calls`."""

    def call(*arguments, **options):
        calls.append(name)
        return function(*arguments, **options)

    return call


@pytest.mark.parametrize("leave_at", [1, 6, 7, 8])
def test_few_slots_leave_where_all_do(monkeypatch, leave_at):
    """Two of eight slots are active, so that six are idle from the start."""
    engine = make_engine(DENSE, slots=8, steps=4)
    weights = make_weights(DENSE)
    prompts = make_prompts(2)
    keys = completion_keys(jax.random.key(4), 2)
    prefix = engine.prefill(
        params=weights, padded_tokens=prompts.tokens, true_length=prompts.lengths
    )
    valid = {}
    for few in (0, 2):
        monkeypatch.setattr(engine, "few", few)
        state = engine.bulk_insert(
            prefix, engine.init_decode_state(), [5, 2], [0, 1], keys, T, Sampling(0.8)
        )
        _, result = engine.generate(weights, state, leave_at=leave_at, occupied=[2, 5])
        valid[few] = engine.read(result).valid
    np.testing.assert_array_equal(valid[2], valid[0])
    assert valid[0].any(axis=0).sum() == 1 if leave_at <= 6 else valid[0].any(axis=0).sum() > 1


def test_the_last_completions_are_decoded_alone(monkeypatch):
    """Six of eight end after six tokens, in the middle of a dispatch of four."""
    engine = make_engine(DENSE, slots=8, steps=4)
    limits = np.array([6, 6, 6, 6, 6, 6, T, T], np.int32)
    calls = {2: [], 0: []}
    generate = engine.generate

    def counted(*arguments, **options):
        state, result = generate(*arguments, **options)
        steps = int(engine.read(result).valid.any(axis=0).sum())
        calls[engine.few].append((len(options["occupied"]), steps))
        return state, result

    monkeypatch.setattr(engine, "generate", counted)
    options = {"samples": 1, "key": jax.random.key(4), "max_tokens": limits}
    outs = []
    for few in calls:
        monkeypatch.setattr(engine, "few", few)
        outs.append(rollout(engine, make_weights(DENSE), make_prompts(8), **options))
    assert calls[2][:3] == [(8, 4), (5, 2), (2, 4)], "it leaves once two go on"
    assert calls[0][:2] == [(8, 4), (5, 4)]
    np.testing.assert_array_equal(outs[0].tokens, outs[1].tokens)
    np.testing.assert_allclose(outs[0].rollout_logp, outs[1].rollout_logp, atol=2e-5)


def test_a_wide_model_has_a_program_for_few_slots_on_a_cpu():
    wide = dataclasses.replace(DENSE, hidden_size=256)
    assert make_engine(wide, slots=8).few == 2
    assert make_engine(DENSE, slots=8).few == 0
    assert make_engine(wide, slots=8, precision=Precision(cache="float8_e4m3fn")).few == 0
    mesh = sharding.make_mesh(MeshConfig(data=2), jax.devices()[:2])
    assert make_engine(wide, slots=8, mesh=mesh).few == 0


def test_samples_of_one_prompt_differ():
    assert len({tuple(row) for row in sample(DENSE).tokens[:G]}) == G


def test_a_prompt_alone_samples_what_it_does_in_a_batch():
    out = sample(DENSE)
    prompts = make_prompts()
    first = Prompts(prompts.tokens[:1], prompts.lengths[:1], prompts.examples[:1])
    keys = completion_keys(jax.random.key(1), len(out.lengths))
    engine = make_engine(DENSE, slots=1)
    weights = make_weights(DENSE)
    prefix = engine.prefill(params=weights, padded_tokens=first.tokens, true_length=first.lengths)
    state = engine.bulk_insert(
        prefix, engine.init_decode_state(), [0], [0], keys[2:3], T, Sampling(0.8)
    )
    tokens = []
    for _ in range(T):  # dispatches, of at least one token while the completion lasts
        state, result = engine.generate(weights, state)
        read = engine.read(result)
        tokens += read.drawn.token[0, read.valid[0]].tolist()
    assert tokens == out.tokens[2, : out.lengths[2]].tolist()


def test_a_completion_ends_with_a_stop_token_or_at_its_limit():
    out = sample(DENSE)
    assert out.stopped.any() and not out.stopped.all()
    for tokens, n, stopped in zip(out.tokens, out.lengths, out.stopped):
        assert stopped == (tokens[n - 1] in STOP)
        assert not set(tokens[: n - 1]) & set(STOP)
        assert stopped or n == T


def test_past_its_length_a_completion_is_zero():
    out = sample(DENSE)
    assert not out.tokens[np.arange(T) >= out.lengths[:, None]].any()


def test_token_id_0_is_an_ordinary_token():
    out = sample(DENSE)
    assert (out.tokens[np.arange(T) < out.lengths[:, None]] == 0).any()


def test_a_prompt_is_prefilled_once(monkeypatch):
    engine = make_engine(DENSE, slots=4)
    prompts = make_prompts()
    weights = make_weights(DENSE)
    rows = []
    prefill = engine.prefill
    monkeypatch.setattr(
        engine, "prefill", lambda **kw: rows.append(kw["true_length"]) or prefill(**kw)
    )
    rollout(engine, weights, prompts, samples=G, key=jax.random.key(0), max_tokens=T)
    assert sorted(n for part in rows for n in part if n > 1) == sorted(
        n for n in prompts.lengths if n > 1
    )


def test_insert_donates_the_decode_state():
    engine = make_engine(DENSE, slots=4)
    tokens = make_prompts().tokens[0]
    prefix = engine.prefill(params=make_weights(DENSE), padded_tokens=tokens, true_length=1)
    state = engine.init_decode_state()
    engine.insert(prefix, state, 2)
    assert state.cache.keys[0].is_deleted()


def greedy_engine():
    return make_engine(DENSE, slots=2, sampling=Sampling(0.0), max_tokens=6, load=dict)


def test_it_is_a_jetstream_engine():
    assert isinstance(greedy_engine(), jetstream.engine_api.Engine)


def test_jetstreams_properties():
    engine = greedy_engine()
    assert engine.load_params() == {}
    assert engine.max_concurrent_decodes == 2
    assert engine.samples_per_slot == 1
    assert engine.max_prefill_length == P + T - 1


def test_jetstreams_interface_alone_gives_the_argmax_path():
    """One prompt and one slot at a time."""
    engine = greedy_engine()
    weights = make_weights(DENSE)
    prompts = make_prompts()
    state = engine.init_decode_state()
    prefix = engine.prefill(
        params=weights, padded_tokens=prompts.tokens[1], true_length=int(prompts.lengths[1])
    )
    state, result = engine.generate(weights, engine.insert(prefix, state, 1))
    state, more = engine.generate(weights, state)
    data = [part.convert_to_numpy().get_result_at_slot(1) for part in (result, more)]
    tokens = np.concatenate([d.tokens[d.valid > 0] for d in data])
    reference = sample(DENSE, temperature=0.0).tokens[G]
    np.testing.assert_array_equal(tokens, reference[: len(tokens)])
    assert data[-1].lengths[0] == len(tokens) and data[0].valid.dtype.kind != "f"


def test_a_prompt_without_tokens_is_refused():
    with pytest.raises(ValueError, match="must lie in 1"):
        make_engine(DENSE).prefill(
            params=None, padded_tokens=make_prompts().tokens[0], true_length=0
        )


def test_a_completion_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="up to 30 positions and do not fit the engine's 29"):
        rollout(
            make_engine(DENSE),
            None,
            make_prompts(),
            samples=1,
            key=jax.random.key(0),
            max_tokens=T + 1,
        )


@MODELS
def test_a_sharded_engine_samples_the_same(model):
    """Slots over four devices; heads, FFN and vocabulary, or experts, over two."""
    model = dataclasses.replace(model, vocab_size=38)
    axes = MeshConfig(expert=2) if model.num_experts else MeshConfig(tensor=2)
    outs = []
    for mesh in (sharding.make_mesh(axes, jax.devices()[:8]), sharding.single_device_mesh()):
        engine = make_engine(model, slots=8, mesh=mesh)
        weights = sync.converter(model, Precision(weights="int8"), mesh)(make_params(model), 0)
        outs.append(
            rollout(
                engine,
                weights,
                make_prompts(),
                samples=G,
                key=jax.random.key(1),
                max_tokens=T,
                sampling=Sampling(0.8),
            )
        )
    np.testing.assert_array_equal(outs[0].tokens, outs[1].tokens)
    np.testing.assert_allclose(outs[0].rollout_logp, outs[1].rollout_logp, atol=2e-5)


def test_importing_the_engine_brings_no_tensorflow_and_touches_no_logger():
    code = """
import logging, sys
before = logging.getLogger().level, list(logging.getLogger().handlers)
import dcmdp_jax.rollout.jetstream
assert before == (logging.getLogger().level, list(logging.getLogger().handlers))
print([m for m in ("tensorflow", "seqio", "tiktoken", "torch", "transformers") if m in sys.modules])
"""
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "[]"
    )
    assert logging.getLogger("jetstream").level == logging.NOTSET


def test_without_the_distribution_the_message_names_it(monkeypatch):
    def missing(name):
        raise jetstream.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(jetstream.importlib.metadata, "version", missing)
    with pytest.raises(ImportError, match="google-jetstream 0.2.2"), jetstream.stand_ins():
        pass
