"""A model in a GGUF file: its config and parameters, dequantised by the `gguf` package.

The metadata becomes the settings of a config.json, which `hf_config` checks as it checks any other.
A key of the architecture that is neither read nor known to change nothing is refused.
"""

from __future__ import annotations

import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dcmdp_jax.models import decoder, hf_config, rope, weights
from dcmdp_jax.models.model_config import Llama3, ModelConfig

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",  # Mistral and SmolLM2, too
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
# what the metadata calls a setting of config.json; names begin with that of the architecture
SETTINGS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
}
# read beside those, or known to change nothing
OTHERS = """
    vocab_size attention.key_length attention.value_length attention.sliding_window
    rope.dimension_count rope.scaling.type rope.scaling.factor rope.scaling.original_context_length
    rope.scaling.finetuned rope.scaling.attn_factor expert_count expert_used_count
""".split()
ROPE_FACTORS = "rope_freqs.weight"  # by which each frequency is divided, of Llama 3
LLAMA3_CONTEXT = 8192  # positions that Llama 3 was first trained on; the file does not say

OUTER = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class GgufFile(NamedTuple):
    """An opened file."""

    path: pathlib.Path
    metadata: dict[str, Any]
    tensors: dict[str, StoredTensor]  # by the names of a Hugging Face folder


class StoredTensor:
    """A tensor of the file, read as `weights.Leaf` reads those of safetensors."""

    def __init__(self, tensor: Any, heads: int):
        """`heads`: of a query or key projection whose rows llama.cpp permutes; else 0."""
        self._tensor = tensor
        self._heads = heads

    def get_slice(self, name: str) -> StoredTensor:
        """Returns itself."""
        return self

    def get_shape(self) -> list[int]:
        """The shape, outputs first."""
        return [int(n) for n in reversed(self._tensor.shape)]

    def get_dtype(self) -> str:
        """The format that its numbers are exact in."""
        name = self._tensor.tensor_type.name
        return name if name in weights.FLOATS else "F32"

    def __getitem__(self, index: weights.Index) -> np.ndarray:
        """Returns a block, dequantised."""
        import gguf

        data = self._tensor.data
        if self._tensor.tensor_type.name != "F64":
            data = gguf.dequantize(data, self._tensor.tensor_type)
        data = data.reshape(self.get_shape())
        if self._heads:
            # a head's pairs of rotary features stand beside each other there, and apart here
            pairs = data.reshape(self._heads, -1, 2, *data.shape[1:])
            data = pairs.swapaxes(1, 2).reshape(data.shape)
        return data[index]


def read(path: pathlib.Path) -> GgufFile:
    """Opens a GGUF file.

    Raises ValueError if it is none, is one of several parts, or is of another architecture.
    """
    try:
        import gguf
    except ImportError:
        raise ValueError("gguf is not installed; pip install 'dcmdp-jax[train]'") from None
    try:
        reader = gguf.GGUFReader(path)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
    except Exception as error:  # of a damaged file the library raises many kinds
        message = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{path} is no GGUF file that can be read ({message}); copy or download it again"
        ) from None
    parts = metadata.get("split.count", 1)
    if parts > 1:
        raise ValueError(
            f"{path} is one of {parts} parts; join them with llama-gguf-split --merge first"
        )
    architecture = metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise ValueError(
            f"{path}: general.architecture is {architecture!r:.60}; supported are "
            f"{', '.join(ARCHITECTURES)}"
        )
    heads = dict.fromkeys(("attn_q", "attn_k"), 0)
    if architecture == "llama":
        heads["attn_q"] = metadata.get("llama.attention.head_count", 0)
        heads["attn_k"] = metadata.get("llama.attention.head_count_kv", heads["attn_q"])
    tensors = {}
    for tensor in reader.tensors:
        _check_format(path, tensor)
        part = tensor.name.split(".")[2:3]
        permuted = heads.get(part[0], 0) if part else 0
        tensors[_hugging_face_name(tensor.name)] = StoredTensor(tensor, permuted)
    return GgufFile(path, metadata, tensors)


def _check_format(path: pathlib.Path, tensor: Any) -> None:
    """Raises ValueError on a format that the library cannot dequantise."""
    import gguf

    if tensor.tensor_type.name == "F64":
        return
    first_row = tensor.data.reshape(-1, tensor.data.shape[-1])[:1]
    try:
        gguf.dequantize(first_row, tensor.tensor_type)
    except NotImplementedError:
        raise ValueError(
            f"{path}: tensor {tensor.name} is {tensor.tensor_type.name}, which the gguf package "
            "does not dequantise; take a file in another format, such as Q8_0"
        ) from None


def _hugging_face_name(name: str) -> str:
    """Returns the name in a Hugging Face folder, or `name` if there is none."""
    match name.split("."):
        case [outer, "weight"] if outer in OUTER:
            return f"{OUTER[outer]}.weight"
        case ["blk", layer, part, ("weight" | "bias") as kind] if part in LAYER:
            return f"model.layers.{layer}.{LAYER[part]}.{kind}"
    return name


def config(file: GgufFile) -> ModelConfig:
    """Returns the model's config. Raises ValueError on what is missing or not supported."""
    try:
        return hf_config.parse(_settings(file))
    except ValueError as error:
        raise ValueError(f"{file.path}: {error}") from None


def _settings(file: GgufFile) -> dict[str, Any]:
    """Returns the settings of the config.json that says the same."""
    architecture = file.metadata["general.architecture"]
    prefix = f"{architecture}."
    given = {
        name.removeprefix(prefix): _number(value)
        for name, value in file.metadata.items()
        if name.startswith(prefix)
    }
    for name, value in given.items():
        if name not in SETTINGS and name not in OTHERS:
            raise ValueError(f"{prefix}{name}={value!r:.60} is not supported")
    settings = {key: given[name] for name, key in SETTINGS.items() if name in given}
    embedding = file.tensors.get("model.embed_tokens.weight")
    settings |= {
        "architectures": [ARCHITECTURES[architecture]],
        "vocab_size": embedding.get_shape()[0] if embedding else given.get("vocab_size"),
        "tie_word_embeddings": weights.HEAD not in file.tensors,
        "rope_theta": given.get("rope.freq_base", hf_config.THETA),
    }
    if architecture != "qwen2":
        settings["attention_bias"] = "model.layers.0.self_attn.q_proj.bias" in file.tensors
    if given.get("expert_count"):
        raise ValueError(f"{prefix}expert_count={given['expert_count']} is not supported")
    positions = given.get("context_length", 0)
    window = given.get("attention.sliding_window") or positions
    if window < positions:
        raise ValueError(f"{prefix}attention.sliding_window={window} is not supported")
    head_dim = given.get("attention.key_length") or _width_per_head(given)
    for name in ("attention.value_length", "rope.dimension_count"):
        if given.get(name, head_dim) != head_dim:
            raise ValueError(
                f"{prefix}{name}={given[name]} is not supported; only the size of a head, "
                f"{head_dim}, is"
            )
    settings["head_dim"] = head_dim
    settings["rope_scaling"] = _rope_scaling(given, prefix)
    if ROPE_FACTORS in file.tensors:
        if settings["rope_scaling"]:
            raise ValueError(f"tensor {ROPE_FACTORS} beside {prefix}rope.scaling is not supported")
        settings["rope_scaling"] = _llama3(file, settings["rope_theta"], head_dim)
    return settings


def _width_per_head(given: dict[str, Any]) -> int | None:
    """Returns the size of a head where none is given; None where it cannot be told."""
    width = given.get("embedding_length")
    heads = given.get("attention.head_count")
    if type(width) is not int or type(heads) is not int or heads < 1 or width % heads:
        return None
    return width // heads


def _number(value: Any) -> Any:
    """Returns a float32 of the file as the decimal number that it was written for."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _rope_scaling(given: dict[str, Any], prefix: str) -> dict[str, Any] | None:
    if given.get("rope.scaling.attn_factor", 1.0) != 1.0:
        raise ValueError(
            f"{prefix}rope.scaling.attn_factor={given['rope.scaling.attn_factor']} is not supported"
        )
    factor = given.get("rope.scaling.factor")
    kind = given.get("rope.scaling.type", "linear" if factor else "none")  # as llama.cpp
    if kind == "none":
        return None
    scaling = {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        length = given.get("rope.scaling.original_context_length")
        scaling["original_max_position_embeddings"] = length
    return scaling


def _llama3(file: GgufFile, theta: float, head_dim: int) -> dict[str, Any]:
    """Returns the scaling of Llama 3 that has the file's factors; ValueError if there is none."""
    factors = file.tensors[ROPE_FACTORS][...]
    scaling = Llama3(float(factors.max()), LLAMA3_CONTEXT)
    plain = theta ** -(np.arange(0, head_dim, 2) / head_dim)
    expected = plain / rope.llama3_frequencies(plain, scaling)
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-4):
        raise ValueError(
            f"tensor {ROPE_FACTORS} is not supported; only the rotary scaling of Llama 3 with a "
            f"context of {LLAMA3_CONTEXT} positions is"
        )
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "original_max_position_embeddings": scaling.original_max_position,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
    }


def load(file: GgufFile) -> tuple[ModelConfig, dict]:
    """Returns the config and the parameters, as NumPy arrays that hold the file's numbers exactly.

    Raises ValueError for tensors that are missing, of another shape or without a use, and for
    weights that are not finite.
    """
    model = config(file)
    stored = {name: tensor for name, tensor in file.tensors.items() if name != ROPE_FACTORS}
    table = weights.check_stored(file.path, stored, model)
    shapes = jax.eval_shape(lambda: decoder.init(jax.random.key(0), model))

    def array(leaf: weights.Leaf, shape: jax.ShapeDtypeStruct) -> np.ndarray:
        formats = {stored[tensor.name].get_dtype() for tensor in leaf.tensors.values()}
        exact = {"BF16": jnp.bfloat16, "F16": np.float16}
        dtype = exact.get(formats.pop(), np.float32) if len(formats) == 1 else np.float32
        return leaf.read(stored, tuple(slice(0, n) for n in shape.shape), dtype)

    with weights.naming(file.path):
        return model, jax.tree.map(array, table, shapes)
