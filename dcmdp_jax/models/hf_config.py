"""Hugging Face's `config.json`, to and from `ModelConfig`.

`FAMILIES` lists the architectures that are read and written. A key is read, or must have the one
value that the decoder has, or is known to change nothing. Any other key is refused if its name
suggests that it changes the model's mathematics, unless it is switched off; the rest are ignored.
If a file gives a setting twice, both must agree.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import reprlib
from collections.abc import Callable
from typing import Any

from dcmdp_jax import files
from dcmdp_jax.limits import MAX_FLOAT
from dcmdp_jax.models.model_config import Linear, Llama3, ModelConfig, Yarn

REMEDY = "give a Hugging Face model folder, with config.json and safetensors"


@dataclasses.dataclass(frozen=True)
class Family:
    """An architecture of transformers: what its config.json means beside the keys that all share.

    Its tensors' names are in `weights.py`, its published sizes in `sizes.py`.
    """

    model_type: str
    sparse: bool  # has experts
    head_dim: int | None  # where config.json gives none; None: hidden_size / num_attention_heads
    switches: Callable[[dict], dict]  # config.json -> qk_norm, qkv_bias and o_bias
    # settings that are no choice in this family, with the value that it has; they are not written
    fixed: dict[str, Any] = dataclasses.field(default_factory=dict)
    rope_theta: float | None = None  # where config.json gives none; None: it must
    # `sliding_window` where config.json gives none, in a family whose every layer then has it, with
    # no switch; 0: only with use_sliding_window
    window: int = 0


def _qwen3_switches(raw: dict) -> dict:
    bias = _flag(raw, "attention_bias")
    return {"qk_norm": True, "qkv_bias": bias, "o_bias": bias}


def _llama_switches(raw: dict) -> dict:
    bias = _flag(raw, "attention_bias")
    return {"qk_norm": False, "qkv_bias": bias, "o_bias": bias}


def _qwen2_switches(raw: dict) -> dict:
    return {"qk_norm": False, "qkv_bias": True, "o_bias": False}


def _mistral_switches(raw: dict) -> dict:
    return {"qk_norm": False, "qkv_bias": False, "o_bias": False}


# transformers 5 uses this if rope_scaling is given beside rope_parameters, without a theta
THETA = 10_000.0
_WITH_NORM = {"use_qk_norm": True, "qk_norm": True}
_WITHOUT_NORM = {"use_qk_norm": False, "qk_norm": False}
# the defaults, of head_dim and others, are those of transformers
FAMILIES = {
    "Qwen3ForCausalLM": Family(
        "qwen3", False, 128, _qwen3_switches, {"qkv_bias": False, **_WITH_NORM}
    ),
    "Qwen3MoeForCausalLM": Family(
        "qwen3_moe", True, None, _qwen3_switches, {"qkv_bias": False, **_WITH_NORM}
    ),
    "Qwen2ForCausalLM": Family(
        "qwen2",
        False,
        None,
        _qwen2_switches,
        {"attention_bias": True, "qkv_bias": True, **_WITHOUT_NORM},
        rope_theta=THETA,
    ),
    "LlamaForCausalLM": Family(
        "llama",
        False,
        None,
        _llama_switches,
        {"qkv_bias": False, "use_sliding_window": False, **_WITHOUT_NORM},
        rope_theta=THETA,
    ),
    "MistralForCausalLM": Family(
        "mistral",
        False,
        None,
        _mistral_switches,
        {"attention_bias": False, "qkv_bias": False, **_WITHOUT_NORM},
        rope_theta=THETA,
        window=4096,
    ),
}

READ = """
    architectures model_type vocab_size hidden_size intermediate_size num_hidden_layers
    num_attention_heads num_key_value_heads head_dim rms_norm_eps tie_word_embeddings attention_bias
    max_position_embeddings rope_theta rope_parameters rope_scaling original_max_position_embeddings
    layer_types num_experts num_local_experts num_experts_per_tok moe_intermediate_size
    norm_topk_prob decoder_sparse_step mlp_only_layers
""".split()
# Settings that would change the model and that the decoder does not have, each with the value that
# has no effect.
ONE_VALUE = {
    "hidden_act": "silu",
    "use_sliding_window": False,
    "attention_dropout": 0,
    "partial_rotary_factor": 1,
    "quantization_config": None,
    "text_config": None,
    "vision_config": None,
    "is_causal": True,
    "mlp_bias": False,
    "shared_expert_intermediate_size": 0,
}
# Names that contain one of `WORDS` and still change nothing in a forward pass of this model; see
# `_check_window`.
HARMLESS = """
    sliding_window max_window_layers router_aux_loss_coef output_router_logits output_attentions
    output_hidden_states initializer_range attn_implementation _attn_implementation
    _attn_implementation_autoset _attn_implementation_internal experts_implementation
    _experts_implementation _experts_implementation_internal tie_last_hidden_states
    cross_attention_hidden_size torch_dtype dtype transformers_version
""".split()
WORDS = """
    rope rotary alibi position attention attn causal window chunk sink norm bias scal multiplier
    softcap logit expert moe router routed topk group scoring layer mlp head hidden emb activation
    quant dropout sparse linear mamba nextn mtp lora residual
""".split()

# What each kind of `rope_scaling` may set, beside rope_theta.
ROPE_SETTINGS = {
    "default": [],
    "linear": ["factor"],
    "llama3": ["factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"],
    "yarn": [
        "factor",
        "original_max_position_embeddings",
        "beta_fast",
        "beta_slow",
        "attention_factor",
        "mscale",
        "mscale_all_dim",
        "truncate",
    ],
}


def read(folder: str | pathlib.Path) -> ModelConfig:
    """Returns the config of the model in `folder`.

    Raises ValueError for what is missing, contradictory or not supported.
    """
    folder = pathlib.Path(folder)
    path = folder / "config.json"
    if folder.suffix == ".gguf":
        raise ValueError(f"{folder} is one file; convert it first: dcmdp convert {folder} FOLDER")
    if not folder.is_dir():
        raise ValueError(f"model folder {folder} does not exist; {REMEDY}")
    if not path.is_file():
        raise ValueError(f"model folder {folder} has no config.json; {REMEDY}")
    raw = files.read_json_object(path)
    try:
        return parse(raw)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def parse(raw: dict) -> ModelConfig:
    """Returns the config that the settings of a config.json define; raises ValueError as `read`."""
    names = raw.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or names[0] not in FAMILIES:
        raise ValueError(
            f"architectures is {reprlib.repr(names)}; supported are {' and '.join(FAMILIES)}"
        )
    family = FAMILIES[names[0]]
    if raw.get("model_type") not in (None, family.model_type):
        raise ValueError(
            f"model_type is {raw['model_type']!r}, which is not that of architectures, {names[0]}"
        )
    _check_others(raw, family)
    layers = _positive_int(raw, "num_hidden_layers")
    _check_layer_types(raw.get("layer_types"), layers)
    heads = _positive_int(raw, "num_attention_heads")
    width = _positive_int(raw, "hidden_size")
    if raw.get("head_dim") is None and family.head_dim is None and width % heads:
        raise ValueError(
            f"head_dim is not given, and hidden_size={width} is not a multiple of "
            f"num_attention_heads={heads}, which would define it"
        )
    positions = _positive_int(raw, "max_position_embeddings")
    _check_window(raw, family, positions)
    theta, scaling = _rotary(raw, family)
    return ModelConfig(
        vocab_size=_positive_int(raw, "vocab_size"),
        hidden_size=width,
        intermediate_size=_positive_int(raw, "intermediate_size"),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=_positive_int(raw, "num_key_value_heads", heads),
        head_dim=_positive_int(raw, "head_dim", family.head_dim or width // heads),
        rope_theta=theta,
        rope_scaling=scaling,
        rms_norm_eps=_positive_float(raw, "rms_norm_eps", 1e-6),
        tie_word_embeddings=_flag(raw, "tie_word_embeddings"),
        max_position=positions,
        **family.switches(raw),
        **(_experts(raw, layers) if family.sparse else _no_experts(raw)),
    )


def _check_others(raw: dict, family: Family) -> None:
    """Raises ValueError on a setting that is not read and may change the model."""
    one_value = ONE_VALUE | family.fixed
    for name, value in one_value.items():
        if raw.get(name) not in (value, None):
            raise ValueError(
                f"{name}={reprlib.repr(raw[name])} is not supported; only {value!r} is"
            )
    for name in raw.keys() - {*READ, *one_value, *HARMLESS}:
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
                f"layer_types has {kind!r}, which is not supported; only 'full_attention' is"
            )


def _check_window(raw: dict, family: Family, positions: int) -> None:
    """Raises ValueError if attention would end within the positions that the model has."""
    if not family.window or ("sliding_window" in raw and raw["sliding_window"] is None):
        return
    window = _positive_int(raw, "sliding_window", family.window)
    if window < positions:
        given = "" if raw.get("sliding_window") else ", which is what leaving it out means,"
        raise ValueError(
            f"sliding_window={window}{given} is not supported; set max_position_embeddings to "
            f"{window}, up to which it changes nothing, or sliding_window to null if the model has "
            "none"
        )


def _no_experts(raw: dict) -> dict:
    for name in ("num_experts", "num_local_experts"):
        if raw.get(name) not in (0, None):
            having = " and ".join(name for name, family in FAMILIES.items() if family.sparse)
            raise ValueError(
                f"{name}={raw[name]!r} is not supported by {raw['architectures'][0]}; experts are "
                f"{having}'s"
            )
    return {}


def _experts(raw: dict, layers: int) -> dict:
    given = {name: raw.get(name) for name in ("num_experts", "num_local_experts")}
    dense = raw.get("mlp_only_layers")
    dense = [] if dense is None else dense
    if not isinstance(dense, list) or not all(type(i) is int and 0 <= i < layers for i in dense):
        raise ValueError(
            f"mlp_only_layers is {reprlib.repr(dense)}, not a list of layers from 0 to {layers - 1}"
        )
    return {
        "num_experts": _positive_int({"num_experts": _agreed(given, "num_experts")}, "num_experts"),
        "experts_per_token": _positive_int(raw, "num_experts_per_tok"),
        "expert_size": _positive_int(raw, "moe_intermediate_size"),
        "norm_topk_prob": _flag(raw, "norm_topk_prob"),
        "decoder_sparse_step": _positive_int(raw, "decoder_sparse_step", 1),
        "mlp_only_layers": tuple(dense),
    }


# Rotary positions


def _rotary(raw: dict, family: Family) -> tuple[float, Linear | Llama3 | Yarn | None]:
    """Returns theta and the scaling, of `rope_parameters` (transformers 5) or of `rope_theta` and
    `rope_scaling`.

    A `rope_scaling` added to a file whose `rope_parameters` are of type 'default' is used, as
    transformers 5 does.
    """
    new = _rope_settings(raw, "rope_parameters")
    old = _rope_settings(raw, "rope_scaling")
    if old and new and _kind(new) != "default" and _described(old) != _described(new):
        raise ValueError(
            f"rope_scaling={old} and rope_parameters={new} disagree; keep one of the two"
        )
    theta = _theta(raw, old, new, family)
    rope = old or new
    kind = _kind(rope)
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, Linear(_factor(rope))
    attention_factor = _attention_factor(rope)
    name = "original_max_position_embeddings"
    length = _agreed({"rope_scaling": rope.get(name), "config.json": raw.get(name)}, name)
    length = _positive_int({name: length}, name)
    if kind == "llama3":
        return theta, Llama3(
            factor=_factor(rope),
            original_max_position=length,
            low_freq_factor=_positive_float(rope, "low_freq_factor"),
            high_freq_factor=_positive_float(rope, "high_freq_factor"),
        )
    return theta, Yarn(
        factor=_factor(rope),
        original_max_position=length,
        beta_fast=_positive_float(rope, "beta_fast", 32.0),
        beta_slow=_positive_float(rope, "beta_slow", 1.0),
        attention_factor=attention_factor,
        truncate=_flag(rope, "truncate", True),
    )


def _rope_settings(raw: dict, name: str) -> dict:
    """Returns what is set under `name`. Raises ValueError on a kind or setting that is not
    supported.
    """
    rope = raw.get(name)
    if rope is None:
        return {}
    if not isinstance(rope, dict):
        raise ValueError(f"{name} is {files.describe(rope)}, not an object")
    rope = {key: value for key, value in rope.items() if value is not None}
    kind = _kind(rope)
    if kind not in ROPE_SETTINGS:
        raise ValueError(
            f"rope_type {kind!r} is not supported; supported are "
            f"{', '.join(map(repr, ROPE_SETTINGS))}"
        )
    allowed = ["type", "rope_type", "rope_theta", *ROPE_SETTINGS[kind]]
    for key, value in rope.items():
        if key not in allowed and (key, value) != ("partial_rotary_factor", 1):
            raise ValueError(
                f"rope setting {key}={value!r} of {name} is not supported with rope_type {kind!r}"
            )
    return rope


def _kind(rope: dict) -> str:
    given = {name: rope.get(name) for name in ("rope_type", "type")}
    return _agreed(given, "the kind of rope") or "default"


def _described(rope: dict) -> dict:
    """Returns the settings that two descriptions must share; `_theta` compares theta."""
    kind = _kind(rope)
    return {"": kind} | {name: rope[name] for name in ROPE_SETTINGS[kind] if name in rope}


def _theta(raw: dict, old: dict, new: dict, family: Family) -> float:
    given = {
        "rope_theta": raw.get("rope_theta"),
        "rope_scaling": old.get("rope_theta"),
        "rope_parameters": new.get("rope_theta"),
    }
    theta = _positive_float(
        {"rope_theta": _agreed(given, "rope_theta")}, "rope_theta", family.rope_theta
    )
    if theta <= 1:
        raise ValueError(f"rope_theta={theta} must be more than 1")
    if old and given["rope_theta"] is None and given["rope_scaling"] is None and theta != THETA:
        raise ValueError(
            f"rope_theta={theta} of rope_parameters is not in rope_scaling, without which "
            f"transformers takes {THETA}; write it into rope_scaling too"
        )
    return theta


def _factor(rope: dict) -> float:
    factor = _positive_float(rope, "factor")
    if factor < 1:
        raise ValueError(f"factor={factor} of rope_scaling is less than 1")
    return factor


def _attention_factor(rope: dict) -> float | None:
    """Returns it as given or as `mscale` and `mscale_all_dim` define it; None: the factor's own."""
    names = ("mscale", "mscale_all_dim")
    given = [name for name in names if name in rope]
    if "attention_factor" in rope:
        return _positive_float(rope, "attention_factor")
    if not given:
        return None
    if len(given) == 1:
        name = given[0]
        raise ValueError(
            f"rope setting {name}={rope[name]!r} is not supported alone; give "
            f"{' and '.join(names)}, or neither"
        )
    log = math.log(_factor(rope))
    above, below = (0.1 * _positive_float(rope, name) * log + 1 for name in names)
    return above / below


# Values


def _agreed(given: dict[str, Any], name: str) -> Any:
    """Returns the one value that several places give, or None if none does.

    Raises ValueError if two differ.
    """
    given = {place: value for place, value in given.items() if value is not None}
    values = list(given.values())
    if any(value != values[0] for value in values):
        places = ", ".join(f"{value!r} ({place})" for place, value in given.items())
        raise ValueError(f"{name} is given twice and differs: {places}")
    return values[0] if values else None


def _positive_int(raw: dict, name: str, default: int | None = None) -> int:
    """Returns a positive whole number; `ModelConfig` and the scalings check their upper bounds."""
    value = _need(raw, name, default)
    if type(value) is not int or value < 1:
        raise ValueError(f"{name}={value!r} is not a whole number of at least 1")
    return value


def _positive_float(raw: dict, name: str, default: float | None = None) -> float:
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
    """Returns the value under `name`, or `default`. Raises ValueError if there is neither."""
    value = default if raw.get(name) is None else raw[name]
    if value is None:
        raise ValueError(f"{name} is missing")
    return value


# Out


def write(path: pathlib.Path, config: ModelConfig, dtype: str, token_ids: dict[str, Any]) -> None:
    """Writes `config.json` as the family's published folders have it, for transformers 4.51 on.

    A Mistral without windows equals a Llama and is written as one. `token_ids` holds `eos_token_id`
    and its like, as the tokenizer names them. Raises ValueError if no architecture of `FAMILIES`
    has the config's switches.
    """
    raw = {
        "attention_bias": config.qkv_bias,
        "attention_dropout": 0.0,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_position,
        "num_attention_heads": config.num_heads,
        "num_hidden_layers": config.num_layers,
        "num_key_value_heads": config.num_kv_heads,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_scaling": _rope_scaling(config.rope_scaling),
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_word_embeddings,
        "torch_dtype": dtype,
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": config.vocab_size,
    }
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
    architecture = _architecture(config, raw)
    family = FAMILIES[architecture]
    raw = {name: value for name, value in raw.items() if name not in family.fixed}
    raw |= {"architectures": [architecture], "model_type": family.model_type}
    path.write_text(json.dumps(raw | token_ids, indent=2, sort_keys=True) + "\n")


def _architecture(config: ModelConfig, raw: dict) -> str:
    """Returns the first of `FAMILIES` that reads the config's switches from what is written."""
    switches = {name: getattr(config, name) for name in ("qk_norm", "qkv_bias", "o_bias")}
    for name, family in FAMILIES.items():
        if family.sparse == (config.num_experts > 0) and family.switches(raw) == switches:
            return name
    given = ", ".join(f"{name}={value}" for name, value in switches.items())
    raise ValueError(
        f"save: neither {' nor '.join(FAMILIES)} has {given}, num_experts={config.num_experts}; "
        "choose switches that one of them has"
    )


def _rope_scaling(scaling: Linear | Llama3 | Yarn | None) -> dict | None:
    if scaling is None:
        return None
    if isinstance(scaling, Linear):
        return {"rope_type": "linear", "factor": scaling.factor}
    both = {
        "factor": scaling.factor,
        "original_max_position_embeddings": scaling.original_max_position,
    }
    if isinstance(scaling, Llama3):
        return both | {
            "rope_type": "llama3",
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
        }
    yarn = both | {
        "rope_type": "yarn",
        "beta_fast": scaling.beta_fast,
        "beta_slow": scaling.beta_slow,
        "attention_factor": scaling.attention_factor,
        "truncate": None if scaling.truncate else False,
    }
    return {name: value for name, value in yarn.items() if value is not None}
