"""Log-probs in tiles, of wanted positions alone, against all logits: values and gradients."""

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcmdp_jax.models import decoder, scoring, sizes
from dcmdp_jax.models.kernels import head, tiles
from dcmdp_jax.models.model_config import Compute
from support.accelerators import accelerator_programs
from support.random_params import random_params
from support.tiny_models import TINY, TINY_MOE

pytestmark = pytest.mark.full

ROWS = 3
COLUMNS = 7  # 21 positions, no multiple of any tile


def case(config, wanted_share=0.6):
    keys = jax.random.split(jax.random.key(0), 4)
    hidden = jax.random.normal(keys[0], (ROWS, COLUMNS, config.hidden_size))
    targets = jax.random.randint(keys[1], (ROWS, COLUMNS), 0, config.vocab_size)
    wanted = jax.random.uniform(keys[2], (ROWS, COLUMNS)) < wanted_share
    return hidden, targets, wanted, jax.random.normal(keys[3], (ROWS, COLUMNS))


def run(score, params, config, given, entropy_weight=0.0):
    """Returns (logp, entropy), and a weighted sum's gradients by parameters and hidden states."""
    hidden, targets, wanted, weight = given

    def loss(params, hidden):
        logp, entropy = score(params, hidden, targets, wanted, config, 0.7)
        terms = weight * logp + entropy_weight * jnp.flip(weight) * entropy
        return jnp.sum(jnp.where(wanted, terms, 0)), (logp, entropy)

    (_, values), grads = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(params, hidden)
    return values, grads


def plain(params, hidden, targets, wanted, config, temperature):
    """log_softmax of all the logits at once."""
    logp = jax.nn.log_softmax(decoder.head(params, hidden, config) / temperature)
    entropy = -jnp.sum(jnp.exp(logp) * logp, axis=-1)
    logp = jnp.take_along_axis(logp, targets[..., None], axis=-1)[..., 0]
    return jnp.where(wanted, logp, 0), jnp.where(wanted, entropy, 0)


def with_entropy(*args, **sizes_of_tiles):
    return head.token_logp(*args, entropy=True, **sizes_of_tiles)


def assert_close(got, want):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5), got, want)


def assert_equals_plain(config, given, entropy_weight=0.0, **options):
    params = random_params(config, 0.3, norms=1.0)
    score = functools.partial(with_entropy, **options)
    got = run(score, params, config, given, entropy_weight)
    assert_close(got, run(plain, params, config, given, entropy_weight))


VOCAB_500 = {
    "tied": dataclasses.replace(TINY, vocab_size=500),
    "untied": dataclasses.replace(TINY_MOE, vocab_size=500),
}


@pytest.mark.parametrize("head", VOCAB_500)
@pytest.mark.parametrize(
    ("tokens", "vocab"),
    [((1,), 500), ((5,), 500), ((8, 4, 1), 200), ((512,), 200)],  # blocks of 200 overlap
)
def test_tiles_equal_the_logits_at_once(head, tokens, vocab):
    config = VOCAB_500[head]
    assert_equals_plain(config, case(config), cpu_tokens=tokens, cpu_vocab=vocab)


@pytest.mark.parametrize("head", VOCAB_500)
def test_the_program_of_accelerators_equals_the_logits_at_once(head):
    config = VOCAB_500[head]
    with accelerator_programs():
        assert_equals_plain(config, case(config), max_logits=2 * ROWS * config.vocab_size)


@pytest.mark.parametrize("head", VOCAB_500)
@pytest.mark.parametrize(
    "programs", [contextlib.nullcontext, accelerator_programs], ids=["cpu", "accelerator"]
)
def test_the_entropy_has_a_gradient_where_it_is_asked_for(head, programs):
    config = VOCAB_500[head]
    with programs():
        assert_equals_plain(
            config,
            case(config),
            entropy_weight=0.5,
            entropy_gradient=True,
            cpu_tokens=(8, 4, 1),
            cpu_vocab=200,
        )


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_none_or_all_wanted(share):
    assert_equals_plain(TINY, case(TINY, share))


def test_positions_that_are_not_wanted_are_not_computed():
    """NaN at such positions reaches nothing outside the tiles of the wanted ones."""
    params = random_params(TINY, 0.3, norms=1.0)
    hidden, *others = case(TINY)
    wanted = others[1][..., None]
    by_one = functools.partial(with_entropy, cpu_tokens=(1,))
    zeroed = jnp.where(wanted, hidden, 0)
    clean = run(with_entropy, params, TINY, (zeroed, *others))
    dirty = run(by_one, params, TINY, (jnp.where(wanted, hidden, jnp.nan), *others))
    assert_close(dirty, clean)


def test_places_after_the_last_position_reach_no_gradient():
    """The tile that holds the last positions is longer than they are; exp of logits overflows."""
    params = random_params(TINY, 0.3, norms=1.0)
    hidden, targets, _, _ = case(TINY)
    wanted = jnp.ones(targets.shape, bool)
    tiles = {"entropy_gradient": True, "cpu_tokens": (4,)}

    def gradient(score):
        def total(params):
            logp, entropy = score(params, hidden, targets, wanted, TINY, 0.02)
            return jnp.sum(logp) + jnp.sum(entropy)

        return jax.grad(total)(params)["embed"]

    assert jnp.max(decoder.head(params, hidden[0, 0], TINY)) > 2  # exp(2 / 0.02) is infinite
    got = gradient(functools.partial(with_entropy, **tiles))
    np.testing.assert_allclose(got, gradient(plain), rtol=1e-3, atol=2e-3)


def test_nan_in_hidden_states_reaches_the_log_probs():
    params = random_params(TINY, 0.3, norms=1.0)
    hidden, targets, wanted, _ = case(TINY)
    hidden = hidden.at[0].set(jnp.nan)
    logp, _ = head.token_logp(params, hidden, targets, wanted, TINY, 1.0)
    np.testing.assert_array_equal(np.isnan(logp), wanted & (jnp.arange(ROWS) == 0)[:, None])


def test_bfloat16_rounds_operands_only():
    config = dataclasses.replace(TINY, compute=Compute(bfloat16=True))
    params = random_params(config, 0.3, norms=1.0)
    given = case(config)
    values, grads = run(with_entropy, params, config, given)
    expected, expected_grads = run(plain, params, config, given)
    assert_close(values, expected)
    for got, want in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True):
        assert got.dtype == want.dtype
        np.testing.assert_allclose(got, want, atol=2**-8 * max(np.abs(want).max(), 1e-30))


def largest_array(jaxpr, but):
    """Returns the size of the program's largest array, those of shape `but` aside."""
    sizes = [1]
    for equation in jaxpr.eqns:
        shapes = (variable.aval.shape for variable in equation.outvars)
        sizes += [int(np.prod(shape)) for shape in shapes if shape != but]
        inner = jax.tree.leaves(
            equation.params, is_leaf=lambda v: hasattr(v, "jaxpr") or hasattr(v, "eqns")
        )
        inner = (getattr(value, "jaxpr", value) for value in inner)
        sizes += [largest_array(value, but) for value in inner if hasattr(value, "eqns")]
    return max(sizes)


@pytest.mark.parametrize(
    "programs", [contextlib.nullcontext, accelerator_programs], ids=["cpu", "accelerator"]
)
def test_a_long_batch_has_no_array_of_all_its_logits(programs):
    config = sizes.QWEN3_0_6B
    params = {"embed": jax.ShapeDtypeStruct((config.vocab_size, config.hidden_size), jnp.float32)}
    hidden = jax.ShapeDtypeStruct((2, 2048, config.hidden_size), jnp.float32)
    targets = jax.ShapeDtypeStruct((2, 2048), jnp.int32)
    wanted = jax.ShapeDtypeStruct((2, 2048), bool)
    grad = jax.grad(lambda p, h, t, w: jnp.sum(head.token_logp(p, h, t, w, config, 1.0)[0]), (0, 1))
    with programs():
        jaxpr = jax.make_jaxpr(grad)(params, hidden, targets, wanted)
    assert 1 < largest_array(jaxpr.jaxpr, params["embed"].shape) <= tiles.LOGITS


TOKENS = np.random.default_rng(0).integers(0, TINY.vocab_size, (1, 12)).astype(np.int32)
SEGMENT_IDS = np.array([[1] * 7 + [2] * 5], np.int32)
POSITIONS = np.array([[*range(7), *range(5)]], np.int32)
INDEX = np.array([[2, 3, 4, 5], [8, 9, 10, 0]], np.int32)
MASK = np.array([[1, 1, 1, 1], [1, 1, 1, 0]], bool)


def packed_loss(params):
    """Scores the two segments in one row: (sum of the log-probs, log-probs)."""
    logp, _ = scoring.packed_logp(params, TOKENS, POSITIONS, SEGMENT_IDS, INDEX, TINY, 0.7)
    logp = jnp.where(MASK, logp, 0)
    return jnp.sum(logp), logp


def separate_loss(params):
    """The same of each segment in a row of its own."""
    parts = []
    for begin, end, first in ((0, 7, 2), (7, 12, 1)):
        z = decoder.logits(params, TOKENS[:, begin:end], TINY)[0] / 0.7
        places = jnp.arange(first, end - begin - 1), TOKENS[0, begin + first + 1 : end]
        parts.append(jax.nn.log_softmax(z)[places])
    logp = jnp.stack([parts[0], jnp.append(parts[1], 0)])
    return jnp.sum(logp), logp


@pytest.fixture(scope="module")
def packed_and_separate():
    params = random_params(TINY, 0.3, norms=1.0)
    return [
        jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
        for loss in (packed_loss, separate_loss)
    ]


def test_packed_segments_score_as_separate_rows(packed_and_separate):
    ((_, got), _), ((_, want), _) = packed_and_separate
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_gradients_of_packed_segments_are_those_of_separate_rows(packed_and_separate):
    """Among them the gradient of the tied table, which is read twice."""
    (_, grads), (_, expected) = packed_and_separate
    scale = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(expected))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * scale), grads, expected)
