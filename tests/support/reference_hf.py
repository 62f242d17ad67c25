"""Tiny random Qwen3 models made by transformers, and what each of their modules puts out."""

from __future__ import annotations

import numpy as np
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

DENSE = dict(
    vocab_size=62,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    rope_theta=1e6,
    tie_word_embeddings=False,
)
MOE = DENSE | dict(
    num_experts=6, num_experts_per_tok=2, moe_intermediate_size=16, norm_topk_prob=True
)
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}

CASES = {
    "dense": DENSE,
    "tied": DENSE | dict(tie_word_embeddings=True),
    "bias": DENSE | dict(attention_bias=True),
    "theta": DENSE | dict(rope_theta=5e3, rms_norm_eps=1e-2),
    "head_dim": DENSE | dict(hidden_size=20, head_dim=10),
    "groups_1": DENSE | dict(num_key_value_heads=4),
    "groups_4": DENSE | dict(num_key_value_heads=1, head_dim=6),
    "yarn": DENSE | dict(rope_scaling=YARN),
    "yarn_set": DENSE
    | dict(
        rope_theta=1e4,
        head_dim=16,
        rope_scaling=YARN | dict(beta_fast=4.0, beta_slow=0.5, attention_factor=1.3),
    ),
    "moe_top1": MOE | dict(num_experts_per_tok=1, norm_topk_prob=False),
    "moe_top2": MOE,
    "moe_top3": MOE | dict(num_experts_per_tok=3, norm_topk_prob=False, attention_bias=True),
    "moe_step2": MOE | dict(num_hidden_layers=4, decoder_sparse_step=2, num_key_value_heads=1),
    "moe_mlp_only": MOE
    | dict(num_hidden_layers=4, mlp_only_layers=[0, 3], tie_word_embeddings=True),
    "moe_yarn": MOE | dict(rope_scaling=YARN, num_key_value_heads=4, num_experts_per_tok=3),
}


def make(case: str, seed: int = 0) -> torch.nn.Module:
    """The model of one case. Norm scales and biases are random too: ones and zeros would hide their
    absence.
    """
    settings = CASES[case]
    sparse = "num_experts" in settings
    config = (Qwen3MoeConfig if sparse else Qwen3Config)(**settings, attn_implementation="eager")
    model = (Qwen3MoeForCausalLM if sparse else Qwen3ForCausalLM)(config).float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(
                torch.randn(p.shape, generator=generator) * 0.15 + (1.0 if "norm" in name else 0.0)
            )
    return model


def tokens(case: str, rows: int, length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(
        0, CASES[case]["vocab_size"], (rows, length), dtype=np.int32
    )


def logits(
    model: torch.nn.Module, tokens: np.ndarray, mask: np.ndarray | None = None
) -> np.ndarray:
    """[B, S, V]; `mask` is 1 on real tokens."""
    mask = None if mask is None else torch.from_numpy(mask).long()
    with torch.no_grad():
        return model(torch.from_numpy(tokens).long(), attention_mask=mask).logits.numpy()


def outputs(model: torch.nn.Module, tokens: np.ndarray) -> dict[str, np.ndarray]:
    """What every module of the model puts out, by its name in transformers."""
    seen = {}

    def record(name):
        def hook(module, args, output):
            output = output[0] if isinstance(output, tuple) else output
            if isinstance(output, torch.Tensor):
                seen[name] = output.detach().numpy()

        return hook

    handles = [
        module.register_forward_hook(record(name)) for name, module in model.named_modules() if name
    ]
    logits(model, tokens)
    for handle in handles:
        handle.remove()
    return seen


def gradients(model: torch.nn.Module, tokens: np.ndarray) -> dict[str, np.ndarray]:
    """Gradients of the mean log-prob of tokens 1.. given those before, by the tensor names of
    published checkpoints.
    """
    ids = torch.from_numpy(tokens).long()
    logp = torch.log_softmax(model(ids).logits, -1)
    torch.gather(logp[:, :-1], -1, ids[:, 1:, None]).mean().backward()
    grads = {name: p.grad.numpy() for name, p in model.named_parameters()}
    # In memory transformers keeps a layer's experts in two tensors; on disk each expert has its own
    # three.
    for name in [name for name in grads if ".experts." in name]:
        fused = grads.pop(name)
        prefix = name.rpartition(".")[0]
        for e, part in enumerate(fused):
            if name.endswith("gate_up_proj"):
                gate, up = np.split(part, 2)
                grads[f"{prefix}.{e}.gate_proj.weight"], grads[f"{prefix}.{e}.up_proj.weight"] = (
                    gate,
                    up,
                )
            else:
                grads[f"{prefix}.{e}.down_proj.weight"] = part
    model.zero_grad()
    return grads
