"""The tables are strict: unknown axes, collisions, and sizes that do not divide are refused."""

import jax
import pytest
from jax.sharding import PartitionSpec as P

from dcmdp_jax import sharding
from dcmdp_jax.config import MeshConfig
from dcmdp_jax.models import decoder
from support.tiny_models import TINY, TINY_MOE


@pytest.mark.parametrize(
    ("names", "table", "spec"),
    [
        (
            ("layers", "embed", "q_heads", None),
            sharding.TRAIN,
            P(None, ("fsdp", "expert", "sequence"), "tensor", None),
        ),
        (("embed", "mlp"), sharding.DECODE, P(None, "tensor")),
    ],
)
def test_partition_spec_reads_the_table(names, table, spec):
    assert sharding.partition_spec(names, table) == spec


def test_unknown_axes_raise():
    with pytest.raises(KeyError, match="no_such"):
        sharding.partition_spec(("embed", "no_such"), sharding.TRAIN)


def test_two_axes_on_one_mesh_axis_raise():
    with pytest.raises(ValueError, match="twice"):
        sharding.partition_spec(("mlp", "vocab"), sharding.TRAIN)


@pytest.mark.parametrize("config", [TINY, TINY_MOE], ids=["dense", "moe"])
@pytest.mark.parametrize("table", [sharding.TRAIN, sharding.DECODE], ids=["train", "decode"])
def test_every_parameter_has_a_sharding(config, table):
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    shapes = jax.eval_shape(lambda: decoder.init(jax.random.key(0), config))
    shardings = sharding.param_shardings(decoder.logical_axes(config), mesh, table, shapes)
    assert jax.tree.structure(shardings) == jax.tree.structure(shapes)


def test_mesh_must_use_every_device():
    with pytest.raises(ValueError, match="does not make 8"):
        sharding.make_mesh(MeshConfig(tensor=3), jax.devices()[:8])


def test_fsdp_takes_the_devices_that_the_other_axes_leave():
    mesh = sharding.make_mesh(MeshConfig(tensor=2), jax.devices()[:8])
    axes = {"data": 1, "fsdp": 4, "expert": 1, "sequence": 1, "tensor": 2}
    assert dict(mesh.shape) == axes


def test_sizes_must_divide():
    mesh = sharding.make_mesh(MeshConfig(tensor=8), jax.devices()[:8])
    shapes = jax.eval_shape(lambda: decoder.init(jax.random.key(0), TINY))
    with pytest.raises(ValueError, match=r"does not divide over mesh\.tensor=8"):
        sharding.param_shardings(decoder.logical_axes(TINY), mesh, sharding.TRAIN, shapes)
