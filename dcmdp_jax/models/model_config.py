"""What a decoder is: its sizes and switches, and how it is computed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from dcmdp_jax import limits

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Linear:
    """Linear context extension of RoPE (arXiv 2306.15595): divides every frequency by `factor`."""

    factor: float


@dataclass(frozen=True)
class Llama3:
    """Context extension of RoPE as in Llama 3.1: frequencies with wavelengths of more than
    `original_max_position / low_freq_factor` positions are divided by `factor`, those of less than
    `original_max_position / high_freq_factor` are kept, and those between are interpolated.
    """

    factor: float
    original_max_position: int
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0

    def __post_init__(self):
        name = "llama3: original_max_position"
        limits.check_number(name, self.original_max_position, 1, limits.MAX_INT)
        if not self.low_freq_factor < self.high_freq_factor:
            raise ValueError(
                f"llama3: low_freq_factor={self.low_freq_factor} must be less than "
                f"high_freq_factor={self.high_freq_factor}"
            )


@dataclass(frozen=True)
class Yarn:
    """YaRN context extension of RoPE (arXiv 2309.00071); fields as in a Hugging Face `rope_scaling`
    of type `yarn`.
    """

    factor: float
    original_max_position: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None  # None: 0.1 ln(factor) + 1
    truncate: bool = True  # round the bounds of the blended dimensions to integers

    def __post_init__(self):
        name = "yarn: original_max_position"
        limits.check_number(name, self.original_max_position, 1, limits.MAX_INT)


@dataclass(frozen=True)
class Compute:
    """How a decoder is computed. None of it changes which parameters there are."""

    # compute in bfloat16; norms, softmax, router and log-probs stay float32
    bfloat16: bool = False
    remat: bool = False  # recompute each layer in the backward pass
    # what is saved nevertheless, e.g. jax.checkpoint_policies.dots_saveable; None: nothing
    remat_policy: Callable | None = None


@dataclass(frozen=True)
class ModelConfig:
    """A decoder of one of the families Qwen3, Qwen2 and Llama: sizes and switches.

    Hugging Face's names, shortened; the comments hold those that differ. `num_experts == 0` is the
    dense model.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int  # num_hidden_layers
    num_heads: int  # num_attention_heads
    num_kv_heads: int  # num_key_value_heads
    head_dim: int
    rope_theta: float = 1_000_000.0
    rope_scaling: Linear | Llama3 | Yarn | None = None
    rms_norm_eps: float = 1e-6
    qk_norm: bool = True  # RMSNorm of each head's queries and keys
    qkv_bias: bool = False  # biases of the query, key and value projections
    o_bias: bool = False  # bias of attention's output projection
    tie_word_embeddings: bool = False  # the head is the embedding, transposed
    max_position: int = 40_960  # max_position_embeddings
    num_experts: int = 0
    experts_per_token: int = 0  # num_experts_per_tok
    expert_size: int = 0  # moe_intermediate_size
    norm_topk_prob: bool = True
    decoder_sparse_step: int = 1
    mlp_only_layers: tuple[int, ...] = ()
    compute: Compute = Compute()

    def is_sparse(self, layer: int) -> bool:
        """Returns True if layer `layer` routes to experts (Hugging Face's rule for Qwen3-MoE)."""
        return (
            self.num_experts > 0
            and layer not in self.mlp_only_layers
            and (layer + 1) % self.decoder_sparse_step == 0
        )

    def __post_init__(self):
        sizes = dict.fromkeys(
            (
                "vocab_size",
                "hidden_size",
                "intermediate_size",
                "num_heads",
                "num_kv_heads",
                "head_dim",
                "max_position",
                "decoder_sparse_step",
            ),
            (1, 2**24),
        )
        sizes |= dict.fromkeys(("num_experts", "experts_per_token"), (0, 2**16))
        sizes |= {
            "expert_size": (1 if self.num_experts else 0, 2**24),
            "num_layers": (1, 1000),
            "rope_theta": (1, limits.MAX_FLOAT),
            "rms_norm_eps": (0, 1),
        }
        for name, (low, high) in sizes.items():
            limits.check_number(f"model: {name}", getattr(self, name), low, high)
        if not self.rms_norm_eps > 0:
            raise ValueError(
                "model: rms_norm_eps=0 divides a vector of zeros by zero; set a small "
                "number such as 1e-6"
            )
        if self.head_dim % 2:
            raise ValueError(
                f"model: head_dim={self.head_dim} must be even, because RoPE rotates pairs"
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"model: num_heads={self.num_heads} is not a multiple of "
                f"num_kv_heads={self.num_kv_heads}"
            )
        if self.num_experts and not 0 < self.experts_per_token <= self.num_experts:
            raise ValueError(
                f"model: experts_per_token={self.experts_per_token} must lie in "
                f"1..{self.num_experts}"
            )
