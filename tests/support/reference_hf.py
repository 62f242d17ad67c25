"""Tiny random models of transformers, and the outputs of their modules."""

from __future__ import annotations

import numpy as np
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

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
LINEAR = {"rope_type": "linear", "factor": 4.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "original_max_position_embeddings": 16,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}

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
    "linear": DENSE | dict(rope_scaling=LINEAR),
    "llama3": DENSE | dict(rope_scaling=LLAMA3, rope_theta=1e2),
    "moe_top1": MOE | dict(num_experts_per_tok=1, norm_topk_prob=False),
    "moe_top2": MOE,
    "moe_top3": MOE | dict(num_experts_per_tok=3, norm_topk_prob=False, attention_bias=True),
    "moe_step2": MOE | dict(num_hidden_layers=4, decoder_sparse_step=2, num_key_value_heads=1),
    "moe_mlp_only": MOE
    | dict(num_hidden_layers=4, mlp_only_layers=[0, 3], tie_word_embeddings=True),
    "moe_yarn": MOE | dict(rope_scaling=YARN, num_key_value_heads=4, num_experts_per_tok=3),
}
# The other families: no head_dim, so that it is hidden_size / num_attention_heads.
PLAIN = {name: value for name, value in DENSE.items() if name != "head_dim"}
LLAMA = {
    "llama": PLAIN | dict(rope_theta=5e5, rope_scaling=LLAMA3, num_key_value_heads=1),  # Llama 3
    "llama_tied": PLAIN  # SmolLM2
    | dict(num_attention_heads=3, num_key_value_heads=1, tie_word_embeddings=True, rope_theta=1e5),
    "llama_groups_1": PLAIN | dict(num_key_value_heads=None, rope_theta=1e4),  # Llama 2
    "llama_bias": PLAIN | dict(attention_bias=True),
    "llama_head_dim": PLAIN | dict(hidden_size=20, head_dim=10),
    "llama_eps": PLAIN | dict(rms_norm_eps=1e-2),
    "llama_linear": PLAIN | dict(rope_scaling=LINEAR),
    "llama_yarn": PLAIN | dict(rope_scaling=YARN),
    "llama3_theta": PLAIN | dict(rope_scaling=LLAMA3 | dict(factor=32.0), rope_theta=1e2),
}
QWEN2 = {
    "qwen2": PLAIN,
    "qwen2_tied": PLAIN
    | dict(num_attention_heads=6, num_key_value_heads=2, tie_word_embeddings=True),
    "qwen2_groups_1": PLAIN | dict(num_key_value_heads=4),
    "qwen2_groups_4": PLAIN | dict(num_key_value_heads=1, rope_theta=1e4),
    "qwen2_head_dim": PLAIN | dict(hidden_size=20, head_dim=10),
    "qwen2_eps": PLAIN | dict(rms_norm_eps=1e-2, rope_theta=5e3),
    "qwen2_yarn": PLAIN | dict(rope_scaling=YARN),
    "qwen2_linear": PLAIN | dict(rope_scaling=LINEAR),
    "qwen2_window": PLAIN | dict(sliding_window=8, use_sliding_window=False),
}
MISTRAL = {
    "mistral": PLAIN | dict(sliding_window=None),
    "mistral_head_dim": PLAIN | dict(sliding_window=None, hidden_size=20, head_dim=10),  # Nemo
    "mistral_window": PLAIN | dict(sliding_window=64),  # as long as there are positions
}
RELATIVES = LLAMA | QWEN2 | MISTRAL


def make(case: str, seed: int = 0) -> torch.nn.Module:
    """Returns the model of one case, see `randomize`."""
    settings = (CASES | RELATIVES)[case]
    if case in LLAMA:
        model = LlamaForCausalLM(LlamaConfig(**settings, attn_implementation="eager"))
    elif case in QWEN2:
        model = Qwen2ForCausalLM(Qwen2Config(**settings, attn_implementation="eager"))
    elif case in MISTRAL:
        model = MistralForCausalLM(MistralConfig(**settings, attn_implementation="eager"))
    elif "num_experts" in settings:
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**settings, attn_implementation="eager"))
    else:
        model = Qwen3ForCausalLM(Qwen3Config(**settings, attn_implementation="eager"))
    return randomize(model, seed)


def randomize(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Fills the model with random numbers, norm scales and biases too: ones and zeros would hide
    their absence.
    """
    model = model.float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(
                torch.randn(p.shape, generator=generator) * 0.15 + (1.0 if "norm" in name else 0.0)
            )
    return model


def tokens(case: str, rows: int, length: int, seed: int = 0) -> np.ndarray:
    """Returns random token ids [rows, length] int32."""
    return np.random.default_rng(seed).integers(
        0, (CASES | RELATIVES)[case]["vocab_size"], (rows, length), dtype=np.int32
    )


def logits(
    model: torch.nn.Module, tokens: np.ndarray, mask: np.ndarray | None = None
) -> np.ndarray:
    """Returns logits [B, S, V]; `mask` is 1 on real tokens."""
    mask = None if mask is None else torch.from_numpy(mask).long()
    with torch.no_grad():
        return model(torch.from_numpy(tokens).long(), attention_mask=mask).logits.numpy()


def outputs(model: torch.nn.Module, tokens: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the output of every module of the model, by its name in transformers."""
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
    """Returns the gradients of the mean log-prob of tokens 1.. given those before, by the tensor
    names of published checkpoints.
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
