"""The tables are strict: unknown axes, collisions, and sizes that do not divide are refused."""

import jax
import pytest
from jax.sharding import PartitionSpec as P

from dcmdp_jax import sharding
from dcmdp_jax.config import MeshConfig
from dcmdp_jax.models import decoder, sizes


def test_spec_reads_the_table():
    assert sharding.partition_spec(("layers", "embed", "q_heads", None), sharding.TRAIN) == P(
        None, ("fsdp", "expert", "sequence"), "tensor", None
    )
    assert sharding.partition_spec(("embed", "mlp"), sharding.DECODE) == P(None, "tensor")


def test_unknown_and_colliding_axes_raise():
    with pytest.raises(KeyError, match="no_such"):
        sharding.partition_spec(("embed", "no_such"), sharding.TRAIN)
    with pytest.raises(ValueError, match="twice"):
        sharding.partition_spec(("mlp", "vocab"), sharding.TRAIN)


@pytest.mark.parametrize("config", [sizes.TINY, sizes.TINY_MOE], ids=["dense", "moe"])
@pytest.mark.parametrize("table", [sharding.TRAIN, sharding.DECODE], ids=["train", "decode"])
def test_every_parameter_has_a_place(config, table):
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    shapes = jax.eval_shape(lambda: decoder.init(jax.random.key(0), config))
    places = sharding.param_shardings(decoder.logical_axes(config), mesh, table, shapes)
    assert jax.tree.structure(places) == jax.tree.structure(shapes)


def test_mesh_must_use_every_device():
    with pytest.raises(ValueError, match="does not make 8"):
        sharding.make_mesh(MeshConfig(tensor=3), jax.devices()[:8])
    assert dict(sharding.make_mesh(MeshConfig(tensor=2), jax.devices()[:8]).shape) == {
        "data": 1,
        "fsdp": 4,
        "expert": 1,
        "sequence": 1,
        "tensor": 2,
    }


def test_sizes_must_divide():
    mesh = sharding.make_mesh(MeshConfig(tensor=8), jax.devices()[:8])
    shapes = jax.eval_shape(lambda: decoder.init(jax.random.key(0), sizes.TINY))
    with pytest.raises(ValueError, match=r"does not divide over mesh\.tensor=8"):
        sharding.param_shardings(decoder.logical_axes(sizes.TINY), mesh, sharding.TRAIN, shapes)
