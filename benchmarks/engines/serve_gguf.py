"""Serves a GGUF file or a Hugging Face folder of a dense Qwen3 by llama.cpp's server; a script for
the environment of install_llama_cpp.sh:

    runs/engines/llama_cpp/bin/python benchmarks/engines/serve_gguf.py MODEL --port 8080

Of a folder it writes MODEL/model-TYPE.gguf first, in which token i has a text of its own in the
place of the tokenizer's: requests and replies are token ids. A line on its standard input names
another model, which it then serves in the place of the one before; it ends with its input.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys

import gguf
import numpy as np
import xllamacpp
from safetensors import numpy as safetensors

NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
OTHERS = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
CACHES = {"f32": xllamacpp.ggml_type.GGML_TYPE_F32, "f16": xllamacpp.ggml_type.GGML_TYPE_F16}


def write(folder: pathlib.Path, weights: str) -> pathlib.Path:
    """Writes the model as GGUF beside its files and returns the path.

    Args:
      weights: a type of GGUF, such as "F32" or "Q8_0", for all matrices.
    """
    config = json.loads((folder / "config.json").read_text())
    if config["architectures"] != ["Qwen3ForCausalLM"] or config.get("rope_scaling"):
        sys.exit(
            f"{folder} is no dense Qwen3 without rotary scaling, which alone is written here; give "
            "its GGUF file"
        )
    tensors = safetensors.load_file(folder / "model.safetensors")
    path = folder / f"model-{weights}.gguf"
    writer = gguf.GGUFWriter(path, "qwen3")
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    eos = config["eos_token_id"]
    _add_vocabulary(writer, config["vocab_size"], eos if isinstance(eos, list) else [eos])
    kind = gguf.GGMLQuantizationType[weights]
    for name, tensor in tensors.items():
        tensor = np.ascontiguousarray(tensor, np.float32)
        if tensor.ndim > 1:
            tensor = gguf.quants.quantize(tensor, kind)
            writer.add_tensor(_name(name), tensor, raw_dtype=kind)
        else:
            writer.add_tensor(_name(name), tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_vocabulary(writer: gguf.GGUFWriter, size: int, stops: list[int]) -> None:
    eos = stops[0]  # the file names one; at the others the trainer ends a completion
    types = [gguf.TokenType.NORMAL] * size
    for stop in stops:
        types[stop] = gguf.TokenType.CONTROL
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"<{number}>" for number in range(size)])
    writer.add_token_scores([0.0] * size)
    writer.add_token_types(types)
    writer.add_eos_token_id(eos)
    writer.add_bos_token_id(eos)
    writer.add_unk_token_id(eos)
    writer.add_add_bos_token(False)


def _name(name: str) -> str:
    if name in OTHERS:
        return OTHERS[name]
    layer, rest = name.removeprefix("model.layers.").split(".", 1)
    return f"blk.{layer}.{NAMES[rest.removesuffix('.weight')]}.weight"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=pathlib.Path, help="GGUF file, or folder of a dense Qwen3")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument(
        "--weights", default="F32", help="type of a folder's matrices in the file, such as Q8_0"
    )
    parser.add_argument("--cache", default="f32", choices=CACHES)
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--context", type=int, default=512, help="tokens of a slot")
    args = parser.parse_args()
    serving = [start(args.model, args)]
    for line in sys.stdin:
        serving.clear()  # a server ends where nothing refers to it, and its port is free
        serving.append(start(pathlib.Path(line.rstrip("\n")), args))


def start(model: pathlib.Path, args: argparse.Namespace) -> xllamacpp.Server:
    """Returns a server of the model, which runs until it is deleted."""
    if not model.exists():
        sys.exit(f"{model} does not exist; name a GGUF file or a model folder")
    params = xllamacpp.CommonParams()
    params.model.path = str(write(model, args.weights) if model.is_dir() else model)
    params.port = args.port
    params.n_parallel = args.slots
    params.n_ctx = args.slots * args.context
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.cache_type_k = params.cache_type_v = CACHES[args.cache]
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(params)
    print(f"llama.cpp is ready at {server.listening_address}", flush=True)
    return server


if __name__ == "__main__":
    main()
