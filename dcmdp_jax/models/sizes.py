"""Published models: Qwen3 (arXiv 2505.09388, tables 1 and 2), Qwen2.5 (arXiv 2412.15115), Llama 3.2
and SmolLM2 (arXiv 2502.02737), each as its config.json has it.
"""

from __future__ import annotations

import functools

from dcmdp_jax.models.model_config import Llama3, ModelConfig

VOCABULARY = 151_936

_dense = functools.partial(ModelConfig, vocab_size=VOCABULARY, num_kv_heads=8, head_dim=128)
_sparse = functools.partial(
    ModelConfig,
    vocab_size=VOCABULARY,
    num_kv_heads=4,
    head_dim=128,
    num_experts=128,
    experts_per_token=8,
)

QWEN3_0_6B = _dense(
    hidden_size=1024, intermediate_size=3072, num_layers=28, num_heads=16, tie_word_embeddings=True
)
QWEN3_1_7B = _dense(
    hidden_size=2048, intermediate_size=6144, num_layers=28, num_heads=16, tie_word_embeddings=True
)
QWEN3_4B = _dense(
    hidden_size=2560, intermediate_size=9728, num_layers=36, num_heads=32, tie_word_embeddings=True
)
QWEN3_8B = _dense(hidden_size=4096, intermediate_size=12_288, num_layers=36, num_heads=32)
QWEN3_14B = _dense(hidden_size=5120, intermediate_size=17_408, num_layers=40, num_heads=40)
QWEN3_32B = _dense(hidden_size=5120, intermediate_size=25_600, num_layers=64, num_heads=64)
QWEN3_30B_A3B = _sparse(
    hidden_size=2048, intermediate_size=6144, expert_size=768, num_layers=48, num_heads=32
)
QWEN3_235B_A22B = _sparse(
    hidden_size=4096, intermediate_size=12_288, expert_size=1536, num_layers=94, num_heads=64
)

QWEN2_5_0_5B = ModelConfig(
    vocab_size=VOCABULARY,
    hidden_size=896,
    intermediate_size=4864,
    num_layers=24,
    num_heads=14,
    num_kv_heads=2,
    head_dim=64,
    qk_norm=False,
    qkv_bias=True,
    tie_word_embeddings=True,
    max_position=32_768,
)
LLAMA_3_2_1B = ModelConfig(
    vocab_size=128_256,
    hidden_size=2048,
    intermediate_size=8192,
    num_layers=16,
    num_heads=32,
    num_kv_heads=8,
    head_dim=64,
    rope_theta=500_000.0,
    rope_scaling=Llama3(factor=32.0, original_max_position=8192),
    rms_norm_eps=1e-5,
    qk_norm=False,
    tie_word_embeddings=True,
    max_position=131_072,
)
SMOLLM2_135M = ModelConfig(
    vocab_size=49_152,
    hidden_size=576,
    intermediate_size=1536,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    rope_theta=100_000.0,
    rms_norm_eps=1e-5,
    qk_norm=False,
    tie_word_embeddings=True,
    max_position=8192,
)
