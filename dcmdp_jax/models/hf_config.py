"""Hugging Face's `config.json` of Qwen3 and Qwen3-MoE, to and from `ModelConfig`."""

from __future__ import annotations

import json
import pathlib

from dcmdp_jax.config import ModelConfig, Yarn

REMEDY = "give a Hugging Face model folder, with config.json and safetensors"
DENSE, SPARSE = "Qwen3ForCausalLM", "Qwen3MoeForCausalLM"

# Settings that would change the model and that this one does not have, each with the value under which it does nothing.
ABSENT = {
    "hidden_act": "silu",
    "use_sliding_window": False,
    "quantization_config": None,
    "shared_expert_intermediate_size": 0,
}
ROPE_ABSENT = {"partial_rotary_factor": 1.0, "truncate": True, "mscale": None, "mscale_all_dim": None}
ROPE_KNOWN = {
    "type",
    "rope_type",
    "rope_theta",
    "factor",
    "original_max_position_embeddings",
    "beta_fast",
    "beta_slow",
    "attention_factor",
}


def read(folder: str | pathlib.Path) -> ModelConfig:
    """The shape of the model in `folder`. Raises ValueError for what is missing or not supported."""
    folder = pathlib.Path(folder)
    path = folder / "config.json"
    if not folder.is_dir():
        raise ValueError(f"model folder {folder} does not exist; {REMEDY}")
    if not path.is_file():
        raise ValueError(f"model folder {folder} has no config.json; {REMEDY}")
    try:
        raw = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    try:
        return _parse(raw)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _parse(raw: dict) -> ModelConfig:
    names = raw.get("architectures") or []
    if len(names) != 1 or names[0] not in (DENSE, SPARSE):
        raise ValueError(f"architectures is {names}; supported are {DENSE} and {SPARSE}")
    for name, value in ABSENT.items():
        if raw.get(name) not in (value, None):
            raise ValueError(f"{name}={raw[name]!r} is not supported; only {value!r} is")
    heads, width = _need(raw, "num_attention_heads"), _need(raw, "hidden_size")
    theta, yarn = _rope(raw)
    # transformers fills in 128 for the dense model, hidden_size / heads for the sparse one
    head_dim = raw.get("head_dim") or (128 if names[0] == DENSE else width // heads)
    return ModelConfig(
        vocab_size=_need(raw, "vocab_size"),
        hidden_size=width,
        intermediate_size=_need(raw, "intermediate_size"),
        num_layers=_need(raw, "num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=raw.get("num_key_value_heads") or heads,
        head_dim=head_dim,
        rope_theta=theta,
        yarn=yarn,
        rms_norm_eps=raw.get("rms_norm_eps", 1e-6),
        tie_word_embeddings=raw.get("tie_word_embeddings", False),
        attention_bias=raw.get("attention_bias", False),
        max_position=_need(raw, "max_position_embeddings"),
        **(_experts(raw) if names[0] == SPARSE else {}),
    )


def _experts(raw: dict) -> dict:
    experts = raw.get("num_experts", raw.get("num_local_experts"))
    if experts is None:
        raise ValueError("num_experts is missing")
    return {
        "num_experts": experts,
        "experts_per_token": _need(raw, "num_experts_per_tok"),
        "expert_size": _need(raw, "moe_intermediate_size"),
        "norm_topk_prob": raw.get("norm_topk_prob", False),
        "decoder_sparse_step": raw.get("decoder_sparse_step", 1),
        "mlp_only_layers": tuple(raw.get("mlp_only_layers") or ()),
    }


def _rope(raw: dict) -> tuple[float, Yarn | None]:
    """theta and YaRN, from `rope_parameters` or from `rope_theta` beside `rope_scaling`."""
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    theta = rope.get("rope_theta", raw.get("rope_theta"))
    if theta is None:
        raise ValueError("rope_theta is missing")
    for name, value in rope.items():
        if name not in ROPE_KNOWN and value != ROPE_ABSENT.get(name):
            raise ValueError(f"rope setting {name}={value!r} is not supported")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "yarn"):
        raise ValueError(f"rope_type {kind!r} is not supported; supported are 'default' and 'yarn'")
    if kind == "default":
        return float(theta), None
    return float(theta), Yarn(
        factor=float(_need(rope, "factor")),
        original_max_position=_need(rope, "original_max_position_embeddings"),
        beta_fast=rope.get("beta_fast") or 32.0,
        beta_slow=rope.get("beta_slow") or 1.0,
        attention_factor=rope.get("attention_factor"),
    )


def _need(raw: dict, name: str):
    if raw.get(name) is None:
        raise ValueError(f"{name} is missing")
    return raw[name]


def write(path: pathlib.Path, config: ModelConfig, dtype: str) -> None:
    """Write `config.json` as the published Qwen3 folders have it, which every transformers with Qwen3 reads."""
    raw = {
        "architectures": [SPARSE if config.num_experts else DENSE],
        "attention_bias": config.attention_bias,
        "attention_dropout": 0.0,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_position,
        "model_type": "qwen3_moe" if config.num_experts else "qwen3",
        "num_attention_heads": config.num_heads,
        "num_hidden_layers": config.num_layers,
        "num_key_value_heads": config.num_kv_heads,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_scaling": None,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_word_embeddings,
        "torch_dtype": dtype,
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": config.vocab_size,
    }
    if config.yarn is not None:
        yarn = {
            "rope_type": "yarn",
            "factor": config.yarn.factor,
            "original_max_position_embeddings": config.yarn.original_max_position,
            "beta_fast": config.yarn.beta_fast,
            "beta_slow": config.yarn.beta_slow,
            "attention_factor": config.yarn.attention_factor,
        }
        raw["rope_scaling"] = {name: value for name, value in yarn.items() if value is not None}
    if config.num_experts:
        raw |= {
            "decoder_sparse_step": config.decoder_sparse_step,
            "mlp_only_layers": list(config.mlp_only_layers),
            "moe_intermediate_size": config.expert_size,
            "norm_topk_prob": config.norm_topk_prob,
            "num_experts": config.num_experts,
            "num_experts_per_tok": config.experts_per_token,
            "output_router_logits": False,
            "router_aux_loss_coef": 0.001,
        }
    path.write_text(json.dumps(raw, indent=2, sort_keys=True) + "\n")
