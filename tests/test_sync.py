"""Weight sync: the same values in the engine's layout, no shared buffer, each part's format."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcmdp_jax import sharding, sync
from dcmdp_jax.config import MeshConfig, Precision
from dcmdp_jax.models import decoder, inference
from dcmdp_jax.models.quantized import SCALED, Quantized, quantize
from support.random_params import random_params
from support.tiny_models import TINY, TINY_MOE

pytestmark = pytest.mark.full

DENSE = dataclasses.replace(TINY, qkv_bias=True, o_bias=True)  # tied embeddings
MOE = TINY_MOE
MODELS = pytest.mark.parametrize("model", [DENSE, MOE], ids=["dense", "moe"])
PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def synced(model, precision, params=None, mesh=None, version=0):
    mesh = mesh or sharding.single_device_mesh()
    return sync.converter(model, precision, mesh)(
        random_params(model) if params is None else params, version
    )


@functools.cache
def of_one_device(model, precision):
    """The weights that an engine on one device gets of the random parameters."""
    return synced(model, precision)


def leaves(params) -> dict:
    """Path -> leaf; a `Quantized` one is one leaf."""
    pairs = jax.tree_util.tree_leaves_with_path(params, is_leaf=lambda x: isinstance(x, Quantized))
    return {jax.tree_util.keystr(path): leaf for path, leaf in pairs}


def nbytes(model, precision) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(of_one_device(model, precision).params))


@MODELS
def test_the_default_changes_nothing_but_the_layout(model):
    weights = synced(model, Precision(), version=7)
    assert weights.version == 7 and weights.version.dtype == jnp.int32
    jax.tree.map(
        np.testing.assert_array_equal,
        weights.params,
        inference.unstack(random_params(model), model),
    )


@pytest.mark.parametrize(
    "precision",
    [
        Precision(),
        Precision(weights="bfloat16", activations="int8"),
        Precision(weights="nf4", group=16),
        Precision(embed="int8"),
        Precision(head="bfloat16", norms="bfloat16"),
    ],
    ids=lambda p: f"{p.weights}-{p.embed}-{p.head}",
)
@MODELS
def test_the_engine_survives_the_donation_of_the_parameters(model, precision):
    params = random_params(model)
    version = jnp.int32(3)
    weights = synced(model, precision, params, version=version)
    mine = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves((params, version))}
    assert not mine & {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(weights)}
    before = jax.tree.map(np.array, weights)
    jax.jit(lambda p: jax.tree.map(lambda x: x + 1, p), donate_argnums=0)((params, version))
    jax.tree.map(np.testing.assert_array_equal, before, weights)


FIELDS = {  # precision -> does it name the leaf?
    Precision(weights="int8"): lambda path: any(name in path for name in PROJECTIONS),
    Precision(weights="bfloat16"): lambda path: any(name in path for name in PROJECTIONS),
    Precision(activations="int8"): lambda path: any(name in path for name in PROJECTIONS),
    Precision(embed="int8"): lambda path: path == "['embed']",
    Precision(embed="bfloat16"): lambda path: path == "['embed']",
    Precision(head="int4"): lambda path: path == "['head']",
    Precision(head="bfloat16"): lambda path: path == "['head']",
    Precision(router="bfloat16"): lambda path: "router" in path,
    Precision(norms="bfloat16"): lambda path: "norm" in path,
    Precision(cache="int8"): lambda path: False,
    Precision(experts_per_token=1): lambda path: False,
}


@MODELS
@pytest.mark.parametrize(("precision", "named"), FIELDS.items(), ids=map(str, range(len(FIELDS))))
def test_a_field_changes_what_it_names_and_nothing_else(model, precision, named):
    got = leaves(of_one_device(model, precision).params)
    exact = leaves(of_one_device(model, Precision()).params)
    # a head apart from the embedding where the two differ, with the embedding's values
    if model.tie_word_embeddings:
        assert ("['head']" in got) == (precision.embed != precision.head)
        exact |= {"['head']": exact["['embed']"]} if "['head']" in got else {}
    assert got.keys() == exact.keys()
    changed = {
        path
        for path, leaf in got.items()
        if isinstance(leaf, Quantized) or leaf.dtype != jnp.float32
    }
    assert changed == {path for path in exact if named(path)}
    for path in exact.keys() - changed:
        np.testing.assert_array_equal(got[path], exact[path])


@MODELS
def test_values_of_every_part(model):
    """Each part is the trainer's, quantized by itself."""
    precision = Precision(
        weights="nf4",
        group=16,
        activations="int8",
        embed="int8",
        head="int4",
        router="bfloat16",
        norms="bfloat16",
    )
    got = leaves(of_one_device(model, precision).params)
    exact = leaves(of_one_device(model, Precision()).params)
    exact.setdefault("['head']", exact["['embed']"])
    contracted = {"q_proj": (-3,), "k_proj": (-3,), "v_proj": (-3,), "o_proj": (-3, -2)}
    for path, leaf in got.items():
        name = next((name for name in PROJECTIONS if name in path), path)
        if name in PROJECTIONS:
            want = quantize(exact[path], "nf4", contracted.get(name, (-2,)), 16, "int8")
        elif path == "['embed']":
            want = quantize(exact[path], "int8", (-1,))
        elif path == "['head']":
            want = quantize(exact[path], "int4", (-1,) if model.tie_word_embeddings else (-2,))
        else:
            want = exact[path] if "bias" in path else exact[path].astype(jnp.bfloat16)
        jax.tree.map(functools.partial(np.testing.assert_array_equal, err_msg=path), leaf, want)


@MODELS
@pytest.mark.parametrize(
    ("group", "per_matrix"),
    [
        (0, lambda inputs, outputs: outputs),
        (-1, lambda inputs, outputs: 1),
        (8, lambda inputs, outputs: inputs * outputs // 8),
    ],
)
def test_bytes(model, group, per_matrix):
    c = model = dataclasses.replace(model, num_layers=1)
    attention = [
        (c.hidden_size, n * c.head_dim) for n in (c.num_heads, c.num_kv_heads, c.num_kv_heads)
    ]
    attention.append((c.num_heads * c.head_dim, c.hidden_size))
    inner, experts = (c.expert_size, c.num_experts) if c.num_experts else (c.intermediate_size, 1)
    matrices = (
        attention
        + [(c.hidden_size, inner), (c.hidden_size, inner), (inner, c.hidden_size)] * experts
    )
    numbers = sum(inputs * outputs for inputs, outputs in matrices)
    scales = sum(per_matrix(*shape) for shape in matrices)
    exact = nbytes(model, Precision())
    for weights in SCALED:  # 4-bit numbers, too, take a byte here
        assert (
            exact - nbytes(model, Precision(weights=weights, group=group))
            == 3 * numbers - 4 * scales
        ), weights
    assert exact - nbytes(model, Precision(weights="bfloat16", group=group)) == 2 * numbers


@pytest.mark.parametrize(
    "precision",
    [Precision(head="int8"), Precision(head="int8", embed="int8"), Precision(embed="int8")],
    ids=["head", "both", "embedding"],
)
def test_tied_embedding_and_head_are_quantized_independently(precision):
    table = random_params(DENSE)["embed"]
    x = jax.random.normal(jax.random.key(0), (5, DENSE.hidden_size))
    params = of_one_device(DENSE, precision).params
    assert ("head" in params) == (precision.embed != precision.head)
    assert isinstance(params["embed"], Quantized) == bool(precision.embed)
    head = quantize(table, "int8", (-1,)).dequantize() if precision.head else table
    np.testing.assert_allclose(decoder.head(params, x, DENSE), x @ head.T, atol=1e-4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"weights": "float16"}, "precision.weights='float16' is not one of"),
        ({"activations": "int4"}, "precision.activations='int4' is not one of"),
        ({"embed": "fp8"}, "precision.embed='fp8' is not one of"),
        ({"head": "q4"}, "precision.head='q4' is not one of"),
        ({"router": "int8"}, "precision.router='int8' is not one of"),
        ({"norms": "int8"}, "precision.norms='int8' is not one of"),
        ({"weights": "int8", "group": -2}, "precision.group=-2 must be"),
        ({"weights": "int8", "group": 48}, "groups of 48 do not divide"),
    ],
    ids=str,
)
def test_a_precision_that_cannot_work_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        sync.converter(DENSE, Precision(**fields), sharding.single_device_mesh())


@MODELS
@pytest.mark.parametrize(
    "precision",
    [Precision(weights="int8"), Precision(weights="nf4", group=16, embed="int8", head="int4")],
    ids=["int8", "nf4"],
)
def test_placement_is_the_decode_table(model, precision):
    mesh = sharding.make_mesh(
        MeshConfig(expert=2 if model.num_experts else 1, tensor=2), jax.devices()[:8]
    )
    shapes = jax.eval_shape(lambda: random_params(model))
    places = sharding.param_shardings(decoder.logical_axes(model), mesh, sharding.TRAIN, shapes)
    params = jax.device_put(random_params(model), places)
    weights = synced(model, precision, params, mesh)
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)),
        weights,
        of_one_device(model, precision),
    )
    attention = weights.params["stacks"][0]["attention"]
    for leaf in (attention["q_proj"].values, attention["q_proj"].scale):
        assert tuple(leaf.sharding.spec) == (None, "tensor", None)
    assert tuple(attention["o_proj"].values.sharding.spec) == ("tensor", None, None)
    # one per output channel is not split, one per head and group is
    few = attention["o_proj"].scale
    assert tuple(few.sharding.spec) == (
        (None, None, None) if few.shape[0] == 1 else ("tensor", None, None)
    )
    assert tuple(params["stacks"][0]["attention"]["q_proj"].sharding.spec) == (
        None,
        ("fsdp", "expert", "sequence"),
        "tensor",
        None,
    )


@pytest.mark.parametrize(
    "precision", [Precision(), Precision(weights="int8")], ids=["float32", "int8"]
)
def test_from_training_devices_to_others(precision):
    halves = jax.devices()[:4], jax.devices()[4:]
    train, decode = (sharding.make_mesh(MeshConfig(tensor=2), half) for half in halves)
    shapes = jax.eval_shape(lambda: random_params(MOE))
    params = jax.device_put(
        random_params(MOE),
        sharding.param_shardings(decoder.logical_axes(MOE), train, sharding.TRAIN, shapes),
    )
    weights = synced(
        MOE, precision, params, decode, version=jax.device_put(5, sharding.replicated(train))
    )
    for leaf in jax.tree.leaves(weights):
        assert leaf.sharding.device_set == set(jax.devices()[4:])
    assert weights.params["stacks"][0]["moe"]["router"].sharding.is_fully_replicated
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)),
        weights,
        synced(MOE, precision, version=5),
    )
