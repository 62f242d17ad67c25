"""One contract for every public function of `losses` and `constraint`, by the table of
`losses_table`.

A public function without a case fails. What the mask leaves out may as well not be there; the
gradient is that of the value; jit, vmap, the order of the batch and sharding over eight devices
change nothing; an empty mask gives 0; a sampler's NaN stays where it is; other dtypes and shapes
are refused by name.
"""

import functools
import importlib
import inspect
import pkgutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import dcmdp_jax.losses
from dcmdp_jax import constraint
from support.losses_table import NO_SLOPE, RENAMED, TABLE, N, T, empty, make_data, pad, spoil


def floats(tree):
    return [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)]


@functools.lru_cache(None)
def outcome(name):
    """data -> (value, gradient of the sum of x + sin x over it), by the table's `wrt` or
    `surrogate`, else by all.
    """
    case = TABLE[name]

    def total(varied, data):
        value = case.call(data | varied)
        return sum(
            (jnp.sum(leaf + jnp.sin(leaf)) for leaf in floats(value)), jnp.float32(0.0)
        ), value

    def run(data):
        named = case.wrt + case.surrogate
        names = named or [
            key for key, leaf in data.items() if jnp.issubdtype(leaf.dtype, jnp.floating)
        ]
        (_, value), gradient = jax.value_and_grad(total, has_aux=True)(
            {key: data[key] for key in names}, data
        )
        return value, gradient

    return run


@functools.lru_cache(None)
def jitted(name):
    return jax.jit(outcome(name))


@functools.lru_cache(None)
def core(name):
    """The outcome that all others are compared with."""
    return jax.device_get(jitted(name)(make_data(0)))


def cut(leaf, rows=N, columns=T):
    """The unpadded part of a leaf that has rows and columns."""
    if leaf.ndim and leaf.shape[0] == rows + 4:
        leaf = leaf[:rows]
        if leaf.ndim > 1 and leaf.shape[1] == columns + 3:
            leaf = leaf[:, :columns]
    return leaf


def same(actual, expected, rtol=2e-5, atol=2e-6, message=""):
    def check(a, b):
        a = np.asarray(a)
        b = np.asarray(b)
        assert a.dtype == b.dtype and a.shape == b.shape, (
            f"{message}: {a.dtype}{a.shape}, {b.dtype}{b.shape}"
        )
        np.testing.assert_allclose(
            np.float64(a), np.float64(b), rtol=rtol, atol=atol, err_msg=message
        )

    jax.tree.map(check, actual, expected)


def measured_part(tree, data, case):
    """Of an elementwise function, the part on the mask; else everything."""
    if not case.elementwise:
        return tree

    def part(leaf):
        grid = leaf.shape[:2] == data["mask"].shape
        return (
            np.where(data["mask"].reshape(N, T, *[1] * (leaf.ndim - 2)), leaf, 0) if grid else leaf
        )

    return jax.tree.map(part, tree)


every = pytest.mark.parametrize("name", TABLE)


def test_every_public_function_has_a_case():
    modules = {"constraint": constraint} | {
        found.name: importlib.import_module(f"dcmdp_jax.losses.{found.name}")
        for found in pkgutil.iter_modules(dcmdp_jax.losses.__path__)
        if not found.name.startswith("_")
    }
    public = {
        f"{short}.{name}"
        for short, module in modules.items()
        for name, member in inspect.getmembers(module, inspect.isfunction)
        if member.__module__ == module.__name__ and not name.startswith("_")
    }
    assert public == set(TABLE)


@pytest.mark.full
@every
def test_types(name):
    """float32, bool or int32 out; every float finite."""
    for leaf in jax.tree.leaves(core(name)):
        assert leaf.dtype in (np.float32, np.bool_, np.int32), leaf.dtype
        assert np.all(np.isfinite(leaf))


@pytest.mark.full
@every
def test_mask_is_drop(name):
    """Padding and holes that hold NaN, infinities and 1e4 are as if they were not there, in value
    and gradient.
    """
    case = TABLE[name]
    data = make_data(0)
    if case.drawn:
        value, gradient = jax.device_get(jitted(name)(spoil(data, 7)))
        same((value, gradient), core(name), message=name)
        return
    padded = pad(data, 7)
    value, gradient = jax.device_get(jitted(name)(padded))
    expected = core(name)
    got = jax.tree.map(cut, (value, gradient))
    same(measured_part(got, data, case), measured_part(expected, data, case), message=name)
    if case.elementwise:
        return
    assert all(np.all(np.isfinite(leaf)) for leaf in floats((value, gradient)))
    outside = ~padded["mask"]
    for leaf in jax.tree.leaves(gradient):
        if leaf.shape[:2] == outside.shape:
            assert not np.any(leaf[outside]), f"{name}: gradient at the padding"


@every
def test_gradient(name):
    """Central differences along a random direction where the value is differentiated; 0 where it is
    detached.
    """
    case = TABLE[name]
    gradient = core(name)[1]
    if case.surrogate:
        assert any(np.any(leaf) for leaf in jax.tree.leaves(gradient)) or name in NO_SLOPE, (
            "no gradient at all"
        )
    elif not case.wrt:
        assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient)), "it should be detached"
    for key in case.wrt:
        data = make_data(0)
        rng = np.random.default_rng(2)
        direction = np.where(rng.random(data[key].shape) < 0.5, np.float32(1e-3), np.float32(-1e-3))

        def total(step):
            value = jitted(name)(data | {key: data[key] + step * direction})[0]
            return sum(
                float(np.sum(leaf + np.sin(leaf))) for leaf in map(np.float64, floats(value))
            )

        difference = (total(1) - total(-1)) / 2
        slope = float(np.sum(np.float64(gradient[key]) * direction))
        np.testing.assert_allclose(
            difference, slope, rtol=1e-2, atol=1.5e-5, err_msg=f"{name} by {key}"
        )


@pytest.mark.full
@every
def test_jit_changes_nothing(name):
    same(
        jax.device_get(outcome(name)(jax.tree.map(jnp.asarray, make_data(0)))),
        core(name),
        message=name,
    )


@pytest.mark.full
@every
def test_vmap_is_loop_and_sharding_is_none(name):
    """Three batches at once, their rows spread over eight devices, against one at a time on one
    device.
    """
    assert jax.device_count() == 8
    batches = [make_data(seed) for seed in range(3)]
    rows = NamedSharding(Mesh(np.array(jax.devices()), ("data",)), PartitionSpec(None, "data"))
    stacked = jax.device_put(jax.tree.map(lambda *leaves: np.stack(leaves), *batches), rows)
    looped = jax.tree.map(
        lambda *leaves: np.stack(leaves), *(jax.device_get(jitted(name)(b)) for b in batches)
    )
    same(jax.device_get(jax.jit(jax.vmap(outcome(name)))(stacked)), looped, message=name)


@every
def test_order_of_the_batch(name):
    if TABLE[name].shuffled:
        return
    order = np.random.default_rng(3).permutation(N)
    shuffled = jax.device_get(
        jitted(name)({key: leaf[order] for key, leaf in make_data(0).items()})
    )
    expected = jax.tree.map(
        lambda leaf: leaf[order] if leaf.ndim and leaf.shape[0] == N else leaf, core(name)
    )
    same(shuffled, expected, message=name)


@every
def test_nothing_in_the_mask(name):
    """0 everywhere and no gradient; finite where the result is not a function of the mask."""
    case = TABLE[name]
    value, gradient = jax.device_get(jitted(name)(empty(make_data(0))))
    if case.elementwise:
        return
    for leaf in floats((value, gradient)):
        assert np.all(np.isfinite(leaf))
    if case.empty is not None:
        for leaf in jax.tree.leaves(value):
            assert np.all(leaf == case.empty), f"{name}: {leaf}"
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient))


@every
def test_nan_of_the_sampler_stays_where_it_is(name):
    """One NaN of the sampler inside the mask leaves every value and gradient finite, and other
    rows' tokens alone.
    """
    data = make_data(0)
    data["rollout_logp"][4, 0] = np.nan
    for leaf in floats(jax.device_get(jitted(name)(data))):
        assert np.all(np.isfinite(leaf)), name


class Used(dict):
    """Remembers which fields a call reads."""

    def __init__(self, data):
        super().__init__(data)
        self.names = []

    def __getitem__(self, name):
        self.names.append(name)
        return super().__getitem__(name)


@every
def test_other_dtypes_and_shapes_are_refused_by_name(name):
    """bfloat16 log-probs and a missing column, one argument at a time; the message names the
    argument.
    """
    case = TABLE[name]
    if case.trusting or case.elementwise:
        return
    used = Used(make_data(0))
    case.call(used)
    named = [
        key
        for key in dict.fromkeys(used.names)
        if key.endswith("logp") and f"{name}:{key}" not in RENAMED
    ]
    for key in named:
        with pytest.raises(TypeError, match=rf"\b{key} is bfloat16"):
            case.call(dict(used) | {key: jnp.asarray(used[key], jnp.bfloat16)})
    if len([key for key in used.names if key.endswith("logp")]) > 1:
        for key in named:
            with pytest.raises(ValueError, match=r"has shape|have shape"):
                case.call(dict(used) | {key: used[key][:, :-1]})
