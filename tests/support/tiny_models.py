"""A dense model and a mixture of experts that compile and run fast."""

from dcmdp_jax.models.model_config import ModelConfig

TINY = ModelConfig(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=128,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    tie_word_embeddings=True,
    max_position=512,
)
TINY_MOE = ModelConfig(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=128,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_position=512,
    num_experts=8,
    experts_per_token=2,
    expert_size=32,
)
