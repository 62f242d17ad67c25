"""Can low-rank adapters be trained in place of all parameters? The quickstart with LoRA.

LoRA (arXiv 2106.09685): what is trained is a product of two small matrices for each projection. The
sum of projection and product is scored, sampled from and exported; the warm-up still trains all
parameters, which stay frozen afterwards.

Command:  dcmdp train experiments/own_adapter.py
Hardware: two CPU cores
Time:     not measured
Result:   not measured; tests/test_own_adapter.py trains 2 steps of a smaller model
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from quickstart import CONFIG as QUICKSTART

from dcmdp_jax.models import decoder

RANK = 4
SCALE = 2.0  # alpha / rank


def init_adapters(params, key):
    """Returns {name of a projection: {"down" [..., inputs, RANK], "up" [..., RANK, outputs]}}.

    The leading axes are those of stacked layers and experts. `up` is 0, so the products are.
    """
    adapters = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        contracted = decoder.CONTRACTED.get(path[-1].key)  # the input axes; None: no projection
        if contracted:
            stacked = leaf.shape[: contracted[0]]
            inputs = math.prod(leaf.shape[axis] for axis in contracted)
            outputs = leaf.size // (math.prod(stacked) * inputs)
            key, down_key = jax.random.split(key)
            down = jax.random.normal(down_key, (*stacked, inputs, RANK)) / inputs**0.5
            adapters[name(path)] = {"down": down, "up": jnp.zeros((*stacked, RANK, outputs))}
    return adapters


def add_adapters(adapters, frozen):
    """Returns the decoder's parameters: those that are frozen, plus the products."""

    def add(path, leaf):
        pair = adapters.get(name(path))
        if pair is None:
            return leaf
        return leaf + SCALE * (pair["down"] @ pair["up"]).reshape(leaf.shape)

    return jax.tree_util.tree_map_with_path(add, frozen)


def name(path):
    return jax.tree_util.keystr(path, simple=True, separator=".")  # such as stacks.0.q_proj


CONFIG = dataclasses.replace(
    QUICKSTART,
    name="own_adapter",
    model=dataclasses.replace(
        QUICKSTART.model, trainable=init_adapters, policy_params=add_adapters
    ),
    algorithm=dataclasses.replace(QUICKSTART.algorithm, learning_rate=1e-3),
)
