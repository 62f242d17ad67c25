"""Hugging Face's `config.json` of Qwen3 and Qwen3-MoE, to and from `ModelConfig`.

A key is read, or must have the one value that this model has, or is known to change nothing. Of the
others, those whose name speaks of the model's mathematics are refused, unless they are switched
off; the rest are notes and are left alone. What a file says twice must agree.
"""

from __future__ import annotations

import json
import math
import pathlib
import reprlib
from typing import Any

from dcmdp_jax import files
from dcmdp_jax.config import MAX_FLOAT, ModelConfig, Yarn

REMEDY = "give a Hugging Face model folder, with config.json and safetensors"
DENSE = "Qwen3ForCausalLM"
SPARSE = "Qwen3MoeForCausalLM"
MODEL_TYPES = {DENSE: "qwen3", SPARSE: "qwen3_moe"}
THETA = 10_000.0  # transformers 5 takes it where rope_scaling, beside rope_parameters, gives none

READ = [
    "architectures",
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "tie_word_embeddings",
    "attention_bias",
    "max_position_embeddings",
    "rope_theta",
    "rope_parameters",
    "rope_scaling",
    "original_max_position_embeddings",
    "layer_types",
    "num_experts",
    "num_local_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "norm_topk_prob",
    "decoder_sparse_step",
    "mlp_only_layers",
]
# Settings that would change the model and that this one does not have, each with the value under
# which it does nothing.
ONE_VALUE = {
    "hidden_act": "silu",
    "use_sliding_window": False,
    "attention_dropout": 0,
    "partial_rotary_factor": 1,
    "quantization_config": None,
    "text_config": None,
    "vision_config": None,
    "is_causal": True,
    "shared_expert_intermediate_size": 0,
    "qkv_bias": False,
    "use_qk_norm": True,
    "qk_norm": True,
}
# Names that hold one of `WORDS` and still change nothing in a forward pass of this model; the
# sliding window is idle without use_sliding_window.
HARMLESS = [
    "sliding_window",
    "max_window_layers",
    "router_aux_loss_coef",
    "output_router_logits",
    "output_attentions",
    "output_hidden_states",
    "initializer_range",
    "attn_implementation",
    "_attn_implementation",
    "_attn_implementation_autoset",
    "_attn_implementation_internal",
    "experts_implementation",
    "_experts_implementation",
    "_experts_implementation_internal",
    "tie_last_hidden_states",
    "cross_attention_hidden_size",
    "torch_dtype",
    "dtype",
    "transformers_version",
]
WORDS = [
    "rope",
    "rotary",
    "alibi",
    "position",
    "attention",
    "attn",
    "causal",
    "window",
    "chunk",
    "sink",
    "norm",
    "bias",
    "scal",
    "multiplier",
    "softcap",
    "logit",
    "expert",
    "moe",
    "router",
    "routed",
    "topk",
    "group",
    "scoring",
    "layer",
    "mlp",
    "head",
    "hidden",
    "emb",
    "activation",
    "quant",
    "dropout",
    "sparse",
    "linear",
    "mamba",
    "nextn",
    "mtp",
    "lora",
    "residual",
]

PLAIN_SETTINGS = ["type", "rope_type", "rope_theta"]
YARN_SETTINGS = [
    "factor",
    "original_max_position_embeddings",
    "beta_fast",
    "beta_slow",
    "attention_factor",
    "mscale",
    "mscale_all_dim",
    "truncate",
]


def read(folder: str | pathlib.Path) -> ModelConfig:
    """The shape of the model in `folder`.

    Raises ValueError for what is missing, contradictory or not supported.
    """
    folder = pathlib.Path(folder)
    path = folder / "config.json"
    if not folder.is_dir():
        raise ValueError(f"model folder {folder} does not exist; {REMEDY}")
    if not path.is_file():
        raise ValueError(f"model folder {folder} has no config.json; {REMEDY}")
    raw = files.read_json_object(path)
    try:
        return _parse(raw)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _parse(raw: dict) -> ModelConfig:
    names = raw.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or names[0] not in (DENSE, SPARSE):
        raise ValueError(
            f"architectures is {reprlib.repr(names)}; supported are {DENSE} and {SPARSE}"
        )
    sparse = names[0] == SPARSE
    if raw.get("model_type") not in (None, MODEL_TYPES[names[0]]):
        raise ValueError(
            f"model_type is {raw['model_type']!r}, which is not that of architectures, {names[0]}"
        )
    _check_others(raw)
    layers = _whole(raw, "num_hidden_layers")
    _check_layer_types(raw.get("layer_types"), layers)
    heads = _whole(raw, "num_attention_heads")
    width = _whole(raw, "hidden_size")
    theta, yarn = _rope(raw)
    # transformers fills in 128 for the dense model, hidden_size / heads for the sparse one
    head_dim = _whole(raw, "head_dim", width // heads if sparse else 128)
    return ModelConfig(
        vocab_size=_whole(raw, "vocab_size"),
        hidden_size=width,
        intermediate_size=_whole(raw, "intermediate_size"),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=_whole(raw, "num_key_value_heads", heads),
        head_dim=head_dim,
        rope_theta=theta,
        yarn=yarn,
        rms_norm_eps=_positive(raw, "rms_norm_eps", 1e-6),
        tie_word_embeddings=_flag(raw, "tie_word_embeddings"),
        attention_bias=_flag(raw, "attention_bias"),
        max_position=_whole(raw, "max_position_embeddings"),
        **(_experts(raw, layers) if sparse else _no_experts(raw)),
    )


def _check_others(raw: dict) -> None:
    """Raises ValueError on a setting of the mathematics that is not read."""
    for name, value in ONE_VALUE.items():
        if raw.get(name) not in (value, None):
            raise ValueError(
                f"{name}={reprlib.repr(raw[name])} is not supported; only {value!r} is"
            )
    for name in raw.keys() - {*READ, *ONE_VALUE, *HARMLESS}:
        off = raw[name] is None or raw[name] is False or raw[name] in ("", 0, [], {})
        if not off and any(word in name.lower() for word in WORDS):
            raise ValueError(
                f"{name}={reprlib.repr(raw[name])} is not supported; take it out if it changes "
                "nothing"
            )


def _check_layer_types(kinds: Any, layers: int) -> None:
    if kinds is None:
        return
    if not isinstance(kinds, list) or len(kinds) != layers:
        raise ValueError(
            f"layer_types is {reprlib.repr(kinds)}, not a list of num_hidden_layers={layers} kinds"
        )
    for kind in kinds:
        if kind not in ("full_attention", "attention"):
            raise ValueError(
                f"layer_types holds {kind!r}, which is not supported; only 'full_attention' is"
            )


def _no_experts(raw: dict) -> dict:
    for name in ("num_experts", "num_local_experts"):
        if raw.get(name) not in (0, None):
            raise ValueError(
                f"{name}={raw[name]!r} is not supported by {DENSE}; experts are {SPARSE}'s"
            )
    return {}


def _experts(raw: dict, layers: int) -> dict:
    said = {name: raw.get(name) for name in ("num_experts", "num_local_experts")}
    only = raw.get("mlp_only_layers")
    only = [] if only is None else only
    if not isinstance(only, list) or not all(type(i) is int and 0 <= i < layers for i in only):
        raise ValueError(
            f"mlp_only_layers is {reprlib.repr(only)}, not a list of layers from 0 to {layers - 1}"
        )
    return {
        "num_experts": _whole({"num_experts": _agreed(said, "num_experts")}, "num_experts"),
        "experts_per_token": _whole(raw, "num_experts_per_tok"),
        "expert_size": _whole(raw, "moe_intermediate_size"),
        "norm_topk_prob": _flag(raw, "norm_topk_prob"),
        "decoder_sparse_step": _whole(raw, "decoder_sparse_step", 1),
        "mlp_only_layers": tuple(only),
    }


# Rotary positions


def _rope(raw: dict) -> tuple[float, Yarn | None]:
    """theta and YaRN, of `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling`.

    A `rope_scaling` added to a file whose `rope_parameters` are of type 'default' is obeyed, as
    transformers 5 does.
    """
    new = _rope_settings(raw, "rope_parameters")
    old = _rope_settings(raw, "rope_scaling")
    if old and new and _kind(new) != "default" and _described(old) != _described(new):
        raise ValueError(
            f"rope_scaling={old} and rope_parameters={new} disagree; keep one of the two"
        )
    theta = _theta(raw, old, new)
    rope = old or new
    if _kind(rope) == "default":
        return theta, None
    attention_factor = _attention_factor(rope)
    name = "original_max_position_embeddings"
    length = _agreed({"rope_scaling": rope.get(name), "config.json": raw.get(name)}, name)
    return theta, Yarn(
        factor=_factor(rope),
        original_max_position=_whole({name: length}, name),
        beta_fast=_positive(rope, "beta_fast", 32.0),
        beta_slow=_positive(rope, "beta_slow", 1.0),
        attention_factor=attention_factor,
        truncate=_flag(rope, "truncate", True),
    )


def _rope_settings(raw: dict, name: str) -> dict:
    """What is set under `name`. Raises ValueError on a kind or a setting that is not supported."""
    rope = raw.get(name)
    if rope is None:
        return {}
    if not isinstance(rope, dict):
        raise ValueError(f"{name} is {files.describe(rope)}, not an object")
    rope = {key: value for key, value in rope.items() if value is not None}
    kind = _kind(rope)
    if kind not in ("default", "yarn"):
        raise ValueError(f"rope_type {kind!r} is not supported; supported are 'default' and 'yarn'")
    known = PLAIN_SETTINGS + YARN_SETTINGS if kind == "yarn" else PLAIN_SETTINGS
    for key, value in rope.items():
        if key not in known and (key, value) != ("partial_rotary_factor", 1):
            raise ValueError(
                f"rope setting {key}={value!r} of {name} is not supported with rope_type {kind!r}"
            )
    return rope


def _kind(rope: dict) -> str:
    said = {name: rope.get(name) for name in ("rope_type", "type")}
    return _agreed(said, "the kind of rope") or "default"


def _described(rope: dict) -> dict:
    """The settings that two descriptions must share; theta is compared apart."""
    return {key: value for key, value in rope.items() if key in YARN_SETTINGS} | {"": _kind(rope)}


def _theta(raw: dict, old: dict, new: dict) -> float:
    said = {
        "rope_theta": raw.get("rope_theta"),
        "rope_scaling": old.get("rope_theta"),
        "rope_parameters": new.get("rope_theta"),
    }
    theta = _positive({"rope_theta": _agreed(said, "rope_theta")}, "rope_theta")
    if theta <= 1:
        raise ValueError(f"rope_theta={theta} must be more than 1")
    if old and said["rope_theta"] is None and said["rope_scaling"] is None and theta != THETA:
        raise ValueError(
            f"rope_theta={theta} of rope_parameters is not in rope_scaling, without which "
            f"transformers takes {THETA}; write it into rope_scaling too"
        )
    return theta


def _factor(rope: dict) -> float:
    factor = _positive(rope, "factor")
    if factor < 1:
        raise ValueError(f"factor={factor} of rope_scaling is less than 1")
    return factor


def _attention_factor(rope: dict) -> float | None:
    """As given, or as `mscale` and `mscale_all_dim` make it; None: what the factor alone makes."""
    names = ("mscale", "mscale_all_dim")
    given = [name for name in names if name in rope]
    if "attention_factor" in rope:
        return _positive(rope, "attention_factor")
    if not given:
        return None
    if len(given) == 1:
        name = given[0]
        raise ValueError(
            f"rope setting {name}={rope[name]!r} is not supported alone; give "
            f"{' and '.join(names)}, or neither"
        )
    log = math.log(_factor(rope))
    above, below = (0.1 * _positive(rope, name) * log + 1 for name in names)
    return above / below


# Values


def _agreed(said: dict[str, Any], name: str) -> Any:
    """The one value of what several places say, or None where none does.

    Raises ValueError where two differ.
    """
    said = {place: value for place, value in said.items() if value is not None}
    values = list(said.values())
    if any(value != values[0] for value in values):
        places = ", ".join(f"{value!r} ({place})" for place, value in said.items())
        raise ValueError(f"{name} is said twice and differs: {places}")
    return values[0] if values else None


def _whole(raw: dict, name: str, default: int | None = None) -> int:
    """A positive whole number; `ModelConfig` and `Yarn` know how large each may be."""
    value = _need(raw, name, default)
    if type(value) is not int or value < 1:
        raise ValueError(f"{name}={value!r} is not a whole number of at least 1")
    return value


def _positive(raw: dict, name: str, default: float | None = None) -> float:
    value = _need(raw, name, default)
    if type(value) not in (int, float) or not 0 < value <= MAX_FLOAT:
        raise ValueError(f"{name}={value!r:.60} is not a positive number that float32 holds")
    return float(value)


def _flag(raw: dict, name: str, default: bool = False) -> bool:
    value = _need(raw, name, default)
    if not isinstance(value, bool):
        raise ValueError(f"{name}={value!r} is not true or false")
    return value


def _need(raw: dict, name: str, default: Any = None) -> Any:
    """The value under `name`, or `default`. Raises ValueError where there is neither."""
    value = default if raw.get(name) is None else raw[name]
    if value is None:
        raise ValueError(f"{name} is missing")
    return value


# Out


def write(path: pathlib.Path, config: ModelConfig, dtype: str, token_ids: dict[str, Any]) -> None:
    """Write `config.json` as the published Qwen3 folders have it, for any transformers with Qwen3.

    `token_ids` holds `eos_token_id` and its like, as the tokenizer names them.
    """
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
            "truncate": None if config.yarn.truncate else False,
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
    path.write_text(json.dumps(raw | token_ids, indent=2, sort_keys=True) + "\n")
