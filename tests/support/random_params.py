"""Random parameters without compiling the initialiser. Norms and biases differ from their defaults
too.
"""

import jax
import jax.numpy as jnp
import numpy as np

from dcmdp_jax.models import decoder
from dcmdp_jax.models.model_config import ModelConfig


def random_params(
    config: ModelConfig,
    scale: float = 1.0,
    dtype=jnp.float32,
    norms: float | None = None,
    seed: int = 0,
) -> dict:
    """Returns normal numbers times `scale`. If `norms` is set, the scales of norms are that number
    plus a tenth of a normal one.
    """
    rng = np.random.default_rng(seed)

    def fill(path, shape):
        values = rng.normal(size=shape.shape)
        values = (
            norms + 0.1 * values if norms is not None and "norm" in str(path) else scale * values
        )
        return jnp.asarray(values, dtype)

    return jax.tree_util.tree_map_with_path(
        fill, jax.eval_shape(lambda: decoder.init(jax.random.key(0), config))
    )
