"""The TPU kernel with shared prompts, interpreted, against plain attention; and compiled for a TPU.

A row is written as its segments' (length, id, prefix id).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcmdp_jax import sharding
from dcmdp_jax.config import MeshConfig
from dcmdp_jax.models.kernels import splash
from dcmdp_jax.models.kernels.attention import attention
from dcmdp_jax.tools import slices

pytestmark = pytest.mark.full

LENGTH = 768  # in blocks of 256 keys and 256 queries, or 128 where two devices share them
# prompts and branches that cross blocks, padding
FAMILIES = [(300, 1, 0), (90, 2, 1), (130, 3, 1), (60, 4, 0), (90, 5, 4), (3, 6, 4), (95, 0, 0)]
# segments that share nothing before and behind a family, branches of one token, no padding
MIXED = [(100, 1, 0), (257, 2, 0), (1, 3, 2), (1, 4, 2), (300, 5, 2), (109, 6, 0)]
ALONE = [(300, 1, 0), (200, 2, 0), (268, 0, 0)]
LAYOUTS = {"families": [FAMILIES, MIXED], "alone": [ALONE, [(LENGTH, 1, 0)]]}


def ids(rows):
    """Returns segment_ids and prefix_ids [R, S]."""
    lengths, segments, prefixes = zip(*(zip(*row, strict=True) for row in rows), strict=True)
    return tuple(
        jnp.asarray([np.repeat(row, n) for row, n in zip(of, lengths, strict=True)], jnp.int32)
        for of in (segments, prefixes)
    )


def random_row(rng):
    """Families of a prompt and up to four branches, until the row is full."""
    row = []
    left = LENGTH
    while left:
        prompt = len(row) + 1
        for branch in range(rng.integers(0, 5) + 1):
            length = min(left, int(rng.integers(1, 150)))
            if length:
                row.append((length, len(row) + 1, prompt if branch else 0))
            left -= length
    return row


def inputs(dtype=jnp.float32, rows=2, length=LENGTH):
    keys = jax.random.split(jax.random.key(0), 4)
    q = jax.random.normal(keys[0], (rows, 2, 2, length, 128), dtype)
    k, v = (jax.random.normal(key, (rows, 2, length, 128), dtype) for key in keys[1:3])
    return (q, k, v), jax.random.normal(keys[3], q.shape, dtype)


def may_attend(segment_ids, prefix_ids):
    """The rule, [R, S, S]. Padding attends to itself alone."""
    index = jnp.arange(segment_ids.shape[1])
    own = (segment_ids[:, :, None] == segment_ids[:, None]) & (segment_ids[:, :, None] > 0)
    own |= jnp.eye(len(index), dtype=bool)
    prefix = (prefix_ids[:, :, None] > 0) & (prefix_ids[:, :, None] == segment_ids[:, None])
    return (own | prefix) & (index[:, None] >= index)


def plain(q, k, v, segment_ids, prefix_ids):
    return attention(q, k, v, may_attend(segment_ids, prefix_ids)[:, None, None])


def output_and_gradients(attend, arrays, d_out, rows):
    out, gradients_of = jax.vjp(lambda *arrays: attend(*arrays, *rows), *arrays)
    return out, *gradients_of(d_out)


def interpreted(arrays, d_out, rows, axes=None):
    kernel = functools.partial(
        output_and_gradients, functools.partial(splash.attention, interpret=True)
    )
    if axes is not None:
        mesh = sharding.make_mesh(axes, jax.devices()[:8])
        kernel = sharding.with_mesh(mesh, kernel)
        arrays = jax.device_put(arrays, sharding.replicated(mesh))
    return jax.jit(kernel)(arrays, d_out, rows)


def assert_equals_plain(rows, axes=None):
    arrays, d_out = inputs(rows=len(rows))
    found = interpreted(arrays, d_out, ids(rows), axes)
    expected = output_and_gradients(plain, arrays, d_out, ids(rows))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_values_and_gradients_equal_plain_attention(layout):
    assert_equals_plain(LAYOUTS[layout])


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_values_and_gradients_of_random_families_equal_plain_attention(seed):
    rng = np.random.default_rng(seed)
    assert_equals_plain([random_row(rng) for _ in range(2)])


def test_values_and_gradients_on_a_mesh_equal_plain_attention():
    rows = [FAMILIES, MIXED, ALONE, FAMILIES]
    assert_equals_plain(rows, MeshConfig(fsdp=2, sequence=2, tensor=2))


def test_bfloat16_errs_by_its_rounding():
    """Each result errs by as many units of roundoff (2^-8), relative to the sum of its terms'
    magnitudes, as roundings lead to it. All results are rounded, dv's probabilities too, and of dk
    and dq the scores' gradients; dq is then scaled. Queries of 1 and -1 are scaled exactly.
    """
    rows = ids(LAYOUTS["families"])
    (q, k, v), d_out = inputs(jnp.bfloat16)
    q = jnp.sign(q)
    found = interpreted((q, k, v), d_out, rows)
    scale = jnp.asarray(128**-0.5, jnp.bfloat16)
    q, k, v, d_out = (x.astype(jnp.float32) for x in (q * scale, k, v, d_out))
    scores = jnp.einsum("rkgsh,rkth->rkgst", q, k)
    p = jax.nn.softmax(jnp.where(may_attend(*rows)[:, None, None], scores, -jnp.inf), axis=-1)
    out = jnp.einsum("rkgst,rkth->rkgsh", p, v)
    d_p = jnp.einsum("rkgsh,rkth->rkgst", d_out, v)
    d_scores = p * (d_p - jnp.sum(p * d_p, axis=-1, keepdims=True))
    # their second term is a sum over the rounded output
    inner = jnp.sum(jnp.abs(d_out * out), axis=-1, keepdims=True)
    d_scores_size = jnp.abs(d_scores) + p * inner
    to_queries = functools.partial(jnp.einsum, "rkgst,rkth->rkgsh")
    to_keys = functools.partial(jnp.einsum, "rkgst,rkgsh->rkth")
    scale = scale.astype(jnp.float32)
    expected = {
        "out": (1, out, jnp.abs(out)),
        "dq": (3, to_queries(d_scores, k) * scale, to_queries(d_scores_size, jnp.abs(k)) * scale),
        "dk": (2, to_keys(d_scores, q), to_keys(d_scores_size, jnp.abs(q))),
        "dv": (2, to_keys(p, d_out), to_keys(p, jnp.abs(d_out))),
    }
    for (name, (roundings, value, size)), array in zip(expected.items(), found, strict=True):
        error = jnp.abs(array.astype(jnp.float32) - value)
        assert jnp.all(error <= roundings * 2**-8 * size + 1e-5), name


def test_blocks_in_which_no_query_attends_are_not_computed():
    """A sum with a term 0 * NaN is NaN. The second block is a segment alone; the fourth and fifth,
    a branch of the first, attend neither to it nor to their sibling in the third.
    """
    segment_ids, prefix_ids = ids([[(128, 1, 0), (128, 2, 0), (128, 3, 1), (256, 4, 1)]])
    (q, k, v), d_out = inputs(rows=1, length=640)  # blocks of 128
    k, v = (x.at[:, :, 128:384].set(jnp.nan) for x in (k, v))
    out, dq, *_ = interpreted((q, k, v), d_out, (segment_ids, prefix_ids))
    for x in (out, dq):
        finite = jnp.all(jnp.isfinite(x), axis=(0, 1, 2, 4))
        np.testing.assert_array_equal(finite, (segment_ids[0] == 1) | (segment_ids[0] == 4))


def test_of_a_row_of_padding_the_diagonal_blocks_are_computed():
    """A sum with a term 0 * NaN is NaN. Each row of padding has NaN in another block of keys, which
    reaches the queries of that block alone.
    """
    blocks = np.arange(3)
    rows = jnp.zeros((3, 384), jnp.int32)  # blocks of 128
    (q, k, v), d_out = inputs(rows=3, length=384)
    in_block = np.repeat(blocks == blocks[:, None], 128, axis=1)
    k, v = (jnp.where(in_block[:, None, :, None], jnp.nan, x) for x in (k, v))
    out, dq, *_ = interpreted((q, k, v), d_out, (rows, rows))
    for x in (out, dq):
        np.testing.assert_array_equal(jnp.all(jnp.isfinite(x), axis=(1, 2, 4)), ~in_block)


def test_rows_that_are_too_long_are_refused():
    shapes = [(1, 1, 1, 65_536, 128), (1, 1, 65_536, 128), (1, 1, 65_536, 128)]
    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    row = jax.ShapeDtypeStruct((1, 65_536), jnp.int32)
    with pytest.raises(ValueError, match="32768 positions .* not 65536; leave prefix_ids out"):
        jax.eval_shape(splash.attention, *arrays, row, row)


@pytest.mark.slow
def test_it_compiles_for_a_tpu_and_holds_no_more_than_without_prompts():
    """The layer of an 8B model, forward and backward. The attention of whole segments keeps a part
    of dq for each block of keys.
    """
    mesh = sharding.make_mesh(MeshConfig(), slices.slice_devices("v5e:2x2")[:1])
    place = sharding.replicated(mesh)
    queries = jax.ShapeDtypeStruct((1, 8, 4, 8192, 128), jnp.bfloat16, sharding=place)
    keys = jax.ShapeDtypeStruct((1, 8, 8192, 128), jnp.bfloat16, sharding=place)
    row = jax.ShapeDtypeStruct((1, 8192), jnp.int32, sharding=place)

    def temporary_bytes(*rows):
        step = functools.partial(output_and_gradients, splash.attention)
        traced = jax.jit(step).trace((queries, keys, keys), queries, rows)
        compiled = traced.lower(lowering_platforms=("tpu",)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert 0 < temporary_bytes(row, row) < temporary_bytes(row)
