"""GGUF files of tiny models, as llama.cpp's converter writes them."""

import json
import pathlib

import gguf
import safetensors.numpy

ARCHITECTURES = {
    "LlamaForCausalLM": ("llama", gguf.MODEL_ARCH.LLAMA),
    "Qwen2ForCausalLM": ("qwen2", gguf.MODEL_ARCH.QWEN2),
    "Qwen3ForCausalLM": ("qwen3", gguf.MODEL_ARCH.QWEN3),
}
# one byte-level token for each character; the last two are control tokens
TEXTS = [*map(chr, range(ord("!"), ord("~") + 1)), "Ġ", "ab", "<|s|>", "<|e|>"]
TOKENIZER = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": TEXTS,
    "tokenizer.ggml.merges": ["a b"],
    "tokenizer.ggml.token_type": [1] * (len(TEXTS) - 2) + [3, 3],
    "tokenizer.ggml.bos_token_id": len(TEXTS) - 2,
    "tokenizer.ggml.eos_token_id": len(TEXTS) - 1,
}


def permute(w, heads):
    """Interleaves the two halves of each head's rows, as `LlamaModel.permute` of llama.cpp does."""
    return (
        w.reshape(heads, 2, w.shape[0] // heads // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)
    )


def write(path, folder, changes=None, tensors=None, formats=None):
    """Writes the model of a Hugging Face folder, and `TOKENIZER`.

    Args:
        changes: of the metadata; None takes a key out.
        tensors: further ones, by their names in the file.
        formats: name in the file -> (format, data), instead of float32.
    """
    folder = pathlib.Path(folder)
    raw = json.loads((folder / "config.json").read_text())
    name, architecture = ARCHITECTURES[raw["architectures"][0]]
    heads = raw["num_attention_heads"]
    rope = raw.get("rope_parameters") or raw
    metadata = TOKENIZER | {
        f"{name}.block_count": raw["num_hidden_layers"],
        f"{name}.context_length": raw["max_position_embeddings"],
        f"{name}.embedding_length": raw["hidden_size"],
        f"{name}.feed_forward_length": raw["intermediate_size"],
        f"{name}.attention.head_count": heads,
        f"{name}.attention.head_count_kv": raw["num_key_value_heads"],
        f"{name}.attention.layer_norm_rms_epsilon": raw["rms_norm_eps"],
        f"{name}.rope.freq_base": float(rope["rope_theta"]),
    }
    if raw.get("head_dim"):
        metadata[f"{name}.attention.key_length"] = raw["head_dim"]
        metadata[f"{name}.attention.value_length"] = raw["head_dim"]
    metadata = {key: v for key, v in (metadata | (changes or {})).items() if v is not None}
    writer = gguf.GGUFWriter(path, name)
    for key, value in metadata.items():
        _add(writer, key, value)
    names = gguf.get_tensor_name_map(architecture, raw["num_hidden_layers"])
    stored = safetensors.numpy.load_file(folder / "model.safetensors")
    for theirs, w in stored.items():
        if name == "llama" and ".q_proj." in theirs:
            w = permute(w, heads)
        if name == "llama" and ".k_proj." in theirs:
            w = permute(w, raw["num_key_value_heads"])
        own = names.get_name(theirs, try_suffixes=(".weight", ".bias"))
        kind, data = (formats or {}).get(own, (None, w))
        writer.add_tensor(own, data, raw_dtype=kind)
    for own, w in (tensors or {}).items():
        writer.add_tensor(own, w)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add(writer, key, value):
    if key == "general.architecture":
        writer.kv_data[0][key].value = value
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)
