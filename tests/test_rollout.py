"""The slot loop's own duties: limits, stop strings, versions, supports."""

import jax
import numpy as np
import pytest

from dcmdp_jax import sharding, sync, tokenizer
from dcmdp_jax.config import Precision
from dcmdp_jax.models import decoder
from dcmdp_jax.records import Sampling
from dcmdp_jax.rollout import jetstream
from dcmdp_jax.rollout.generate import rollout
from dcmdp_jax.tools import parity
from support.engines import (
    DENSE,
    MOE,
    G,
    T,
    make_engine,
    make_params,
    make_prompts,
    make_weights,
    sample,
    scored,
)

pytestmark = pytest.mark.full

TEXT = tokenizer.CharacterTokenizer("".join(chr(ord("A") + i) for i in range(35)))


def spell(ids):
    return TEXT.decode([int(i) for i in ids])


def test_every_completion_keeps_its_own_limit():
    limits = np.random.default_rng(3).integers(1, T + 1, 7 * G)
    out = rollout(
        make_engine(DENSE),
        make_weights(DENSE),
        make_prompts(),
        samples=G,
        key=jax.random.key(1),
        max_tokens=limits,
        sampling=Sampling(0.8),
    )
    whole = sample(DENSE)
    np.testing.assert_array_equal(out.lengths, np.minimum(limits, whole.lengths))
    inside = np.arange(out.tokens.shape[1]) < out.lengths[:, None]
    np.testing.assert_array_equal(
        out.tokens[inside], whole.tokens[:, : out.tokens.shape[1]][inside]
    )


def test_a_stop_string_ends_a_completion_with_the_token_that_completes_it():
    """What was sampled up to there is what is sampled without it; the slot is free for the next at
    once.
    """
    whole = sample(DENSE)
    texts = [spell(row[:n]) for row, n in zip(whole.tokens, whole.text_lengths)]
    stop = next(text[5:7] for text in texts if len(text) > 8)
    out = rollout(
        make_engine(DENSE),
        make_weights(DENSE),
        make_prompts(),
        samples=G,
        key=jax.random.key(1),
        max_tokens=T,
        sampling=Sampling(0.8),
        stop_strings=(stop, "never there"),
        decode=spell,
    )
    for i, text in enumerate(texts):
        cut = stop in text
        n = (
            next(n for n in range(1, T + 1) if stop in spell(whole.tokens[i, :n]))
            if cut
            else whole.lengths[i]
        )
        assert (out.lengths[i], out.text_lengths[i]) == (n, n if cut else whole.text_lengths[i])
        assert out.stopped[i] == (cut or whole.stopped[i])
        for mine, theirs in (
            (out.tokens, whole.tokens),
            (out.rollout_logp, whole.rollout_logp),
            (out.support_mass, whole.support_mass),
        ):
            np.testing.assert_allclose(mine[i, :n], theirs[i, :n], atol=2e-5)
            assert not mine[i, n:].any()
    assert sum(stop in text for text in texts) < len(texts)
    ends = rollout(
        make_engine(DENSE),
        make_weights(DENSE),
        make_prompts(),
        samples=G,
        key=jax.random.key(1),
        max_tokens=T,
        sampling=Sampling(0.8),
        stop_strings=(spell([5]),),
        decode=spell,
    )
    # the text of a stop token is none
    np.testing.assert_array_equal(ends.text_lengths, whole.text_lengths)
    with pytest.raises(ValueError, match="every completion gets at least one token"):
        rollout(
            make_engine(DENSE),
            make_weights(DENSE),
            make_prompts(),
            samples=1,
            key=jax.random.key(0),
            max_tokens=0,
        )
    with pytest.raises(ValueError, match="stop_strings need `decode`"):
        rollout(
            make_engine(DENSE),
            make_weights(DENSE),
            make_prompts(),
            samples=1,
            key=jax.random.key(0),
            max_tokens=T,
            stop_strings=("x",),
        )


def test_every_token_carries_the_version_of_its_weights():
    out = rollout(
        make_engine(DENSE),
        make_weights(DENSE, version=7),
        make_prompts(),
        samples=1,
        key=jax.random.key(1),
        max_tokens=T,
    )
    np.testing.assert_array_equal(
        out.version, np.where(np.arange(out.tokens.shape[1]) < out.lengths[:, None], 7, 0)
    )


def test_log_probs_over_a_support_are_the_trainers_less_the_mass_kept():
    """rollout_logp = log softmax(logits / T)[token] - log support_mass."""
    out = sample(DENSE, top_p=0.8, top_k=12)
    inside = np.arange(out.tokens.shape[1]) < out.lengths[:, None]
    assert 0.2 < out.support_mass[inside].min() < out.support_mass[inside].max() < 1
    for i, (exact, tokens, reported) in enumerate(scored(DENSE, out, 0.8)):
        at = np.arange(len(tokens))
        np.testing.assert_allclose(
            reported + np.log(out.support_mass[i, : len(tokens)]), exact[at, tokens], atol=1e-5
        )


def test_prompts_are_prefilled_by_length_bucket(monkeypatch):
    """Lengths of one power of two share a call, and a call holds a bounded number of positions."""
    engine = make_engine(DENSE)
    calls = []
    prefill = engine.prefill
    monkeypatch.setattr(
        engine, "prefill", lambda **kw: calls.append(kw["padded_tokens"].shape) or prefill(**kw)
    )
    prompts = make_prompts()
    out = rollout(
        engine,
        make_weights(DENSE),
        prompts,
        samples=G,
        key=jax.random.key(1),
        max_tokens=T,
        sampling=Sampling(0.8),
        smallest_bucket=2,
        prefill_tokens=16,
    )
    np.testing.assert_array_equal(out.tokens, sample(DENSE).tokens)
    assert all(rows * positions <= 16 for rows, positions in calls)
    widths = [
        min(max(2, 1 << int(n - 1).bit_length()), prompts.tokens.shape[1]) for n in prompts.lengths
    ]
    assert sorted({positions for _, positions in calls}) == sorted(set(widths))


def test_weights_that_are_not_finite_sample_nothing():
    """Refused at the engine's door, also where a caller made them without `sync`."""
    good = make_weights(DENSE)
    assert good.finite
    damaged = good._replace(params=jax.tree.map(lambda w: w * np.nan, good.params))
    for given, message in (
        (damaged._replace(finite=np.False_), "given weights that hold NaN"),
        (damaged, "log-prob is not finite"),
    ):
        with pytest.raises(ValueError, match=message):
            rollout(
                make_engine(DENSE),
                given,
                make_prompts(),
                samples=1,
                key=jax.random.key(1),
                max_tokens=T,
            )
    convert = sync.converter(DENSE, Precision(weights="int8"), sharding.single_device_mesh())
    params = make_params(DENSE)
    for chosen in jax.tree.leaves(params):

        def broken(w, chosen=chosen):
            return w.at[(0,) * w.ndim].set(np.inf) if w is chosen else w

        assert not convert(jax.tree.map(broken, params), 0).finite
    assert convert(params, 0).finite


@pytest.mark.slow
@pytest.mark.parametrize("model", [DENSE, MOE], ids=["dense", "moe"])
def test_the_gate_holds_in_every_length_bucket(model):
    """Two sequences of 4,300 positions in float32: 1e-5 on every token of every bucket up to 4k and
    beyond.
    """
    new = 4_290
    prompts = make_prompts(2)
    engine = jetstream.Engine(model, slots=2, max_length=4_300, stop_ids=(), steps=64)
    out = rollout(
        engine, make_weights(model), prompts, samples=1, key=jax.random.key(1), max_tokens=new
    )
    rows = np.zeros((2, 4_300), np.int32)
    place = prompts.lengths[:, None] + np.arange(new)
    rows[:, : prompts.tokens.shape[1]] = prompts.tokens
    np.put_along_axis(rows, place, out.tokens, axis=1)
    logp = np.asarray(
        jax.jit(lambda params: jax.nn.log_softmax(decoder.logits(params, rows, model)))(
            make_params(model)
        )
    )
    exact = np.take_along_axis(
        np.take_along_axis(logp, place[..., None] - 1, axis=1), out.tokens[..., None], axis=-1
    )[..., 0]
    gaps = parity.by_position(exact, out.rollout_logp, np.ones_like(exact, bool), place + 1)
    assert list(gaps) == ["<= 64", "<= 256", "<= 1024", "<= 4096", "> 4096", "all"]
    assert all(gap.tokens and gap.logp_diff_max <= 1e-5 for gap in gaps.values()), gaps
