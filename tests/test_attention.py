"""Attention in tiles against the whole matrix of scores: values, gradients, and what a padded or
ragged row may hold.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcmdp_jax.models.kernels import attention

pytestmark = pytest.mark.full

HEADS = 2
GROUP = 3
WIDTH = 8


def case(size, rows=2, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(size), 4)
    q, d_out = (jax.random.normal(k, (rows, HEADS, GROUP, size, WIDTH), dtype) for k in keys[:2])
    k, v = (jax.random.normal(k, (rows, HEADS, size, WIDTH), dtype) for k in keys[2:])
    return q, k, v, d_out


def segments(size, rows, kind):
    if kind == "one":
        return None
    rng = np.random.default_rng(size)
    ids = np.zeros((rows, size), np.int32)
    for row in ids:
        lengths = rng.integers(1, size // 2 + 1, 8)
        row[:] = np.append(np.repeat(np.arange(1, 9), lengths), np.zeros(size, np.int32))[:size]
    return jnp.asarray(ids)


def families(size, rows):
    """Segment and prefix ids of rows with shared prompts and their branches, plain segments between
    them and padding, all of random lengths.
    """
    rng = np.random.default_rng(size)
    ids = np.zeros((rows, size), np.int32)
    prefixes = np.zeros((rows, size), np.int32)
    for row, prefix in zip(ids, prefixes):
        column = 0
        number = 0
        while column < size - 2:
            prompt = 0
            for place in range(rng.integers(1, 5)):
                length = rng.integers(1, size // 3 + 2)
                number += 1
                row[column : column + length] = number
                prefix[column : column + length] = prompt
                prompt = number if place == 0 else prompt
                column += length
    return jnp.asarray(ids), jnp.asarray(prefixes)


def reference(q, k, v, ids, prefixes=None):
    """The definition, mask and all: for each token among those of its own segment and of that which
    this continues. Padding attends to itself alone.
    """
    size = q.shape[3]
    ids = np.ones((len(q), size), int) if ids is None else np.asarray(ids)
    same = (ids[:, :, None] == ids[:, None]) & (ids[:, :, None] > 0)
    same |= np.eye(size, dtype=bool)
    if prefixes is not None:
        prefixes = np.asarray(prefixes)[:, :, None]
        same |= (prefixes > 0) & (prefixes == ids[:, None])
    mask = (same & np.tril(np.ones((size, size), bool)))[:, None, None]
    scores = jnp.einsum("bkgsh,bkth->bkgst", q, k) / np.sqrt(WIDTH)
    return jnp.einsum("bkgst,bkth->bkgsh", jax.nn.softmax(jnp.where(mask, scores, -jnp.inf)), v)


def both(attend, q, k, v, d_out, *ids):
    out, pull = jax.vjp(lambda q, k, v: attend(q, k, v, *ids), q, k, v)
    return out, pull(d_out)


packed_by_4 = functools.partial(attention.packed, block=4)


@pytest.mark.parametrize("kind", ["one", "ragged"])
@pytest.mark.parametrize(("size", "block"), [(5, 128), (16, 4), (37, 8), (24, 24)])
def test_tiles_equal_the_matrix_of_scores(size, block, kind):
    ids = segments(size, 2, kind)
    given = case(size)
    attend = functools.partial(attention.packed, block=block)
    got = jax.jit(lambda *x: both(attend, *x, ids))(*given)
    want = jax.jit(lambda *x: both(reference, *x, ids))(*given)
    # results of padding are free, but it must not change others
    real = slice(None) if ids is None else np.asarray(ids) > 0
    np.testing.assert_allclose(
        np.moveaxis(got[0], 3, 1)[real], np.moveaxis(want[0], 3, 1)[real], atol=2e-6
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got[1], want[1])


def assert_equal_where_real(got, want, ids):
    """Outputs but for padding, whose results are free, and gradients."""
    real = np.asarray(ids) > 0
    np.testing.assert_allclose(
        np.moveaxis(got[0], 3, 1)[real], np.moveaxis(want[0], 3, 1)[real], atol=2e-6
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got[1], want[1])


@pytest.mark.parametrize("form", ["tiles", "matrix"])
@pytest.mark.parametrize(("size", "block"), [(5, 128), (16, 4), (37, 8), (61, 4), (24, 24)])
def test_branches_attend_to_their_prompt(size, block, form):
    """Eight rows of random families: boundaries fall inside and between the blocks."""
    ids, prefixes = families(size, 8)
    given = case(size, 8)

    def matrix(q, k, v, ids, prefixes):
        return attention._dense(q, k, v, attention.spans_of(ids, prefixes))

    attend = functools.partial(attention.packed, block=block) if form == "tiles" else matrix
    got = jax.jit(lambda *x: both(attend, *x))(*given, ids, prefixes)
    want = jax.jit(lambda *x: both(reference, *x, ids, prefixes))(*given)
    assert_equal_where_real(got, want, ids)


def test_tiles_of_siblings_are_not_read():
    """A prompt, a branch of NaN and its sibling, each of complete tiles."""
    q, k, v, d_out = case(32)
    ids = jnp.broadcast_to(jnp.repeat(jnp.arange(1, 5), 8), (2, 32))
    prefixes = jnp.broadcast_to(jnp.repeat(jnp.array([0, 1, 1, 0]), 8), (2, 32))
    v = v.at[:, :, 8:16].set(jnp.nan)
    out, (dq, _, dv) = jax.jit(lambda *x: both(packed_by_4, *x))(q, k, v, d_out, ids, prefixes)
    assert np.isnan(out[..., 8:16, :]).all() and np.isfinite(out[..., 16:, :]).all()
    assert np.isfinite(out[..., :8, :]).all() and np.isfinite(dq[..., 16:, :]).all()
    assert np.isfinite(dv[..., 16:, :]).all()


def test_without_branches_the_program_is_the_plain_one():
    q, k, v, _ = case(16)
    ids = segments(16, 2, "ragged")
    plain = jax.jit(lambda *x: packed_by_4(*x)).lower(q, k, v, ids).as_text()
    assert jax.jit(lambda *x: packed_by_4(*x, None)).lower(q, k, v, ids).as_text() == plain


def test_of_a_row_of_padding_the_diagonal_tiles_are_read():
    """Each row of padding has NaN in another tile of keys, which reaches its own queries alone."""
    q, k, v, d_out = case(16, rows=4)
    in_tile = np.repeat(np.eye(4, dtype=bool), 4, axis=1)
    v = jnp.where(in_tile[:, None, :, None], jnp.nan, v)
    ids = jnp.zeros((4, 16), jnp.int32)
    for rows in ((ids,), (ids, ids)):
        out, (dq, *_) = jax.jit(lambda *x: both(packed_by_4, *x))(q, k, v, d_out, *rows)
        for x in (out, dq):
            np.testing.assert_array_equal(np.isfinite(x).all(axis=(1, 2, 4)), ~in_tile)


def test_large_scores_neither_overflow_nor_vanish():
    """The first tile's scores are far above or below the others. The definition is computed in
    float64: in float32 its own error is as large as the tolerance.
    """
    q, k, v, d_out = case(16)
    k = k.at[:, :, :4].mul(300.0)
    got = jax.jit(lambda *x: both(packed_by_4, *x, None))(q, k, v, d_out)
    with jax.enable_x64(True):
        exact = (jnp.asarray(np.asarray(x), jnp.float64) for x in (q, k, v, d_out))
        want = jax.jit(lambda *x: both(reference, *x, None))(*exact)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4), got, want)


def test_bfloat16():
    given = case(16)
    ids = segments(16, 2, "ragged")
    got = both(packed_by_4, *(x.astype(jnp.bfloat16) for x in given), ids)
    want = both(reference, *(x.astype(jnp.bfloat16).astype(jnp.float32) for x in given), ids)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == jnp.bfloat16
        np.testing.assert_allclose(a.astype(jnp.float32), b, atol=2**-6 * np.abs(b).max())


def test_tiles_of_other_segments_are_not_read():
    """NaN in one segment does not reach the next one, which shares no tile with it."""
    q, k, v, d_out = case(16)
    ids = jnp.broadcast_to(jnp.repeat(jnp.arange(1, 5), 4), (2, 16))
    v = v.at[:, :, :8].set(jnp.nan)
    out, (dq, dk, dv) = jax.jit(lambda *x: both(packed_by_4, *x, ids))(q, k, v, d_out)
    assert np.isnan(out[..., :8, :]).all() and np.isfinite(out[..., 8:, :]).all()
    assert (
        np.isfinite(dq[..., 8:, :]).all()
        and np.isfinite(dk[..., 8:, :]).all()
        and np.isfinite(dv[..., 8:, :]).all()
    )


def test_no_array_grows_with_the_square_of_the_row():
    shapes = [jax.ShapeDtypeStruct((1, 2, 1, 4096, 8), jnp.float32)] + [
        jax.ShapeDtypeStruct((1, 2, 4096, 8), jnp.float32)
    ] * 2
    grad = jax.jit(jax.grad(lambda q, k, v: attention.packed(q, k, v, None).sum(), (0, 1, 2)))
    used = grad.lower(*shapes).compile().memory_analysis().temp_size_in_bytes
    assert used < 32 * 2 * 4096 * 8 * 4, (
        "a few arrays of the inputs' size; the scores would be 16 times that"
    )
