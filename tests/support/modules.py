"""The model's modules against those of transformers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from dcmdp_jax.models import decoder, inference, layers, rope
from dcmdp_jax.models.kernels import attention
from support import reference_hf

LOGITS = jax.jit(decoder.logits, static_argnames="config")
TOLERANCE = 2e-5  # absolute, float32


@functools.partial(jax.jit, static_argnames=("config", "sparse"))
def layer_outputs(params, x, config, sparse) -> dict:
    """Returns the outputs of the modules of one layer, by their names in transformers; the layer
    itself is "".
    """
    index = jnp.arange(x.shape[1])

    def attend(q, k, v):
        return attention.attention(q, k, v, index[:, None] >= index), None

    (y, _, _), caught = layers.Layer(config, sparse).apply(
        {"params": params},
        x,
        *rope.rotary(index[None], config),
        attend,
        capture_intermediates=True,
        mutable=["intermediates"],
    )
    caught = caught["intermediates"]
    outputs = {".input_layernorm": caught["input_norm"]["__call__"][0]}
    if config.qk_norm:
        outputs[".self_attn.q_norm"] = caught["attention"]["q_norm"]["__call__"][0]
        outputs[".self_attn.k_norm"] = caught["attention"]["k_norm"]["__call__"][0]
    return outputs | {
        ".self_attn": caught["attention"]["__call__"][0][0],
        ".post_attention_layernorm": caught["post_attention_norm"]["__call__"][0],
        ".mlp": caught["moe"]["__call__"][0][0] if sparse else caught["mlp"]["__call__"][0],
        "": y,
    }


def module_outputs(params, tokens, config) -> dict:
    """Returns every module's output, by its name in transformers, in order of execution."""
    x = decoder.embed(params, tokens, config)
    seen = {"model.embed_tokens": x}
    for i, tree in enumerate(inference.unstack(params, config)["stacks"]):
        outputs = layer_outputs(tree, x, config, config.is_sparse(i))
        seen |= {f"model.layers.{i}{name}": output for name, output in outputs.items()}
        x = outputs[""]
    seen["model.norm"] = decoder.final_norm(params, x, config)
    seen["lm_head"] = decoder.head(params, seen["model.norm"], config)
    return seen


def assert_modules_match(params, config, reference, tokens):
    """Raises AssertionError at the first module, in order of execution, whose output differs."""
    want = reference_hf.outputs(reference, tokens)
    got = module_outputs(params, tokens, config)
    for name in sorted(got, key=list(want).index):
        np.testing.assert_allclose(got[name], want[name], atol=TOLERANCE, rtol=0, err_msg=name)
    np.testing.assert_allclose(
        LOGITS(params, tokens, config), want["lm_head"], atol=TOLERANCE, rtol=0
    )
