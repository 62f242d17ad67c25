"""Low-rank adapters of the embedding: what trains is two small matrices, what is scored their
product added to the frozen table.
"""

import dataclasses

import jax
import jax.numpy as jnp

RANK = 2


def adapters(params, key):
    """`ModelSource.trainable`: the product of `down` and `up` starts at 0."""
    rows, columns = params["embed"].shape
    down = 0.1 * jax.random.normal(key, (rows, RANK))
    return {"down": down, "up": jnp.zeros((RANK, columns))}


def with_adapters(trained, frozen):
    """`ModelSource.policy_params`."""
    return frozen | {"embed": frozen["embed"] + trained["down"] @ trained["up"]}


def adapted(config):
    """The same configuration, with adapters."""
    source = dataclasses.replace(config.model, trainable=adapters, policy_params=with_adapters)
    return dataclasses.replace(config, model=source)
