"""The published Qwen3 models (arXiv 2505.09388, tables 1 and 2, and each model's config.json)."""

from __future__ import annotations

import functools

from dcmdp_jax.models.model_config import ModelConfig

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
