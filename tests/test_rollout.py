"""The slot loop's own duties: limits, stop strings, versions, supports, prefills."""

import jax
import numpy as np
import pytest

from dcmdp_jax import sharding, sync
from dcmdp_jax.config import Precision
from dcmdp_jax.models import decoder
from dcmdp_jax.records import NotFinite, Sampling
from dcmdp_jax.rollout import jetstream
from dcmdp_jax.rollout.generate import rollout
from dcmdp_jax.tokens import tokenizer
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


def run(weights=None, **options):
    """What `sample(DENSE)` samples, but for `options`."""
    options = {"samples": G, "max_tokens": T, "sampling": Sampling(0.8)} | options
    return rollout(
        make_engine(DENSE),
        weights or make_weights(DENSE),
        make_prompts(),
        key=jax.random.key(1),
        **options,
    )


def sampled_mask(out):
    return np.arange(out.tokens.shape[1]) < out.lengths[:, None]


def test_every_completion_keeps_its_own_limit():
    limits = np.random.default_rng(3).integers(1, T + 1, 7 * G)
    out = run(max_tokens=limits)
    unlimited = sample(DENSE)
    np.testing.assert_array_equal(out.lengths, np.minimum(limits, unlimited.lengths))
    mask = sampled_mask(out)
    np.testing.assert_array_equal(
        out.tokens[mask], unlimited.tokens[:, : out.tokens.shape[1]][mask]
    )


def test_a_limit_below_one_token_is_refused():
    with pytest.raises(ValueError, match="every completion gets at least one token"):
        run(max_tokens=0)


@pytest.fixture(scope="module")
def uncut():
    """What is sampled without stop strings."""
    return sample(DENSE)


@pytest.fixture(scope="module")
def stop_string(uncut):
    """Two characters that stand in some completions and not in others."""
    texts = [spell(row[:n]) for row, n in zip(uncut.tokens, uncut.text_lengths)]
    chosen = next(text[5:7] for text in texts if len(text) > 8)
    assert sum(chosen in text for text in texts) < len(texts)
    return chosen


@pytest.fixture(scope="module")
def cut(stop_string):
    return run(stop_strings=(stop_string, "never there"), decode=spell)


@pytest.fixture(scope="module")
def first_stops(uncut, stop_string):
    """For each completion the number of tokens that complete the stop string; None: none do."""
    return [
        next((n for n in range(1, length + 1) if stop_string in spell(row[:n])), None)
        for row, length in zip(uncut.tokens, uncut.text_lengths)
    ]


def test_a_completion_ends_with_the_token_that_completes_a_stop_string(uncut, cut, first_stops):
    lengths = [end or length for end, length in zip(first_stops, uncut.lengths)]
    assert cut.lengths.tolist() == lengths


def test_the_text_of_a_completion_has_its_stop_string(uncut, cut, first_stops):
    text_lengths = [end or length for end, length in zip(first_stops, uncut.text_lengths)]
    assert cut.text_lengths.tolist() == text_lengths


def test_a_stop_string_counts_as_stopping(uncut, cut, first_stops):
    stopped = [end is not None or ended for end, ended in zip(first_stops, uncut.stopped)]
    assert cut.stopped.tolist() == stopped


@pytest.mark.parametrize("name", ["tokens", "rollout_logp", "support_mass"])
def test_up_to_a_stop_string_nothing_changes_and_past_it_all_is_zero(uncut, cut, name):
    expected = np.where(sampled_mask(cut), getattr(uncut, name), 0)
    np.testing.assert_allclose(getattr(cut, name), expected, atol=2e-5)


def test_the_text_of_a_stop_token_is_not_searched(uncut):
    out = run(stop_strings=(spell([5]),), decode=spell)
    np.testing.assert_array_equal(out.text_lengths, uncut.text_lengths)


@pytest.mark.parametrize("options", [{"stop_strings": ("x",)}, {"stop_strings": ("",)}], ids=str)
def test_stop_strings_need_a_decoder_and_characters(options):
    decode = spell if options["stop_strings"] == ("",) else None
    with pytest.raises(ValueError, match="stop_strings need `decode`, and none may be empty"):
        run(decode=decode, **options)


def test_every_token_carries_the_version_of_its_weights():
    out = run(make_weights(DENSE, version=7), samples=1)
    np.testing.assert_array_equal(out.version, np.where(sampled_mask(out), 7, 0))


def test_log_probs_over_a_support_are_the_trainers_less_the_log_of_its_mass():
    """rollout_logp = log softmax(logits / T)[token] - log support_mass."""
    out = sample(DENSE, top_p=0.8, top_k=12)
    mass = out.support_mass[sampled_mask(out)]
    assert 0.2 < mass.min() < mass.max() < 1
    for i, (exact, tokens, reported) in enumerate(scored(DENSE, out, 0.8)):
        at = np.arange(len(tokens))
        np.testing.assert_allclose(
            reported + np.log(out.support_mass[i, : len(tokens)]), exact[at, tokens], atol=1e-5
        )


@pytest.fixture
def prefills(monkeypatch):
    """The shapes of the prefills of a rollout with buckets from 2 on and 16 positions at most."""
    engine = make_engine(DENSE)
    shapes = []
    prefill = engine.prefill
    monkeypatch.setattr(
        engine, "prefill", lambda **kw: shapes.append(kw["padded_tokens"].shape) or prefill(**kw)
    )
    out = run(smallest_bucket=2, prefill_tokens=16)
    return shapes, out


def test_a_prefill_holds_a_bounded_number_of_positions(prefills):
    shapes, _ = prefills
    assert all(rows * positions <= 16 for rows, positions in shapes)


def test_prompts_of_one_length_bucket_are_prefilled_together(prefills):
    shapes, _ = prefills
    prompts = make_prompts()
    widths = [
        min(max(2, 1 << int(n - 1).bit_length()), prompts.tokens.shape[1]) for n in prompts.lengths
    ]
    assert sorted({positions for _, positions in shapes}) == sorted(set(widths))


def test_buckets_do_not_change_what_is_sampled(prefills):
    _, out = prefills
    np.testing.assert_array_equal(out.tokens, sample(DENSE).tokens)


def test_weights_marked_as_not_finite_are_refused():
    with pytest.raises(NotFinite, match="given weights that hold NaN"):
        run(make_weights(DENSE)._replace(finite=np.False_))


def test_a_log_prob_that_is_not_finite_is_refused():
    weights = make_weights(DENSE)
    damaged = weights._replace(params=jax.tree.map(lambda w: w * np.nan, weights.params))
    with pytest.raises(ValueError, match="log-prob is not finite"):
        run(damaged)


def test_sync_marks_every_parameter_that_is_not_finite():
    convert = sync.converter(DENSE, Precision(weights="int8"), sharding.single_device_mesh())
    params = make_params(DENSE)
    assert convert(params, 0).finite
    leaves, tree = jax.tree.flatten(params)
    for i, leaf in enumerate(leaves):
        damaged = [*leaves[:i], leaf.at[(0,) * leaf.ndim].set(np.inf), *leaves[i + 1 :]]
        assert not convert(jax.tree.unflatten(tree, damaged), 0).finite


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
    gaps = parity.by_context(exact, out.rollout_logp, np.ones_like(exact, bool), place + 1)
    assert list(gaps) == ["<= 64", "<= 256", "<= 1024", "<= 4096", "> 4096", "all"]
    assert all(gap.tokens and gap.logp_diff_max <= 1e-5 for gap in gaps.values()), gaps
