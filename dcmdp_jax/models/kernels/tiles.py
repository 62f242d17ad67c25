"""Sizes of the tiles in which the kernels work: the defaults of their arguments.

All but `HEAD_VOCAB`, `EXCHANGE_ROWS`, `EXPERT_BYTES` and those of `DECODE` are for CPUs, on which a
kernel is fast if what it computes at a time stays in a core's cache. They change no result but by
rounding.
"""

ATTENTION_POSITIONS = 128  # queries, and keys, of a tile of attention scores
CACHE_ELEMENTS = 1 << 19  # elements of cached keys that are read at a time in decoding
SWIGLU_ROWS = 512  # rows of a tile of a dense feed-forward
SWIGLU_FEW_ROWS = 128  # up to so many rows (decoding) are not tiled
EXPERT_ROWS = 128  # rows of one expert that are multiplied together, at most
EXPERT_BYTES = 1 << 20  # bytes of an expert's weights of few bits that a TPU reads at a time
CHANNELS = 128  # output channels of a quantized projection that become float at a time
TABLE_ROWS = 512  # the same of a quantized table [V, D]
TABLE_FEW_ROWS = 64  # activations up to which a product takes as long as reading its weight
LOGITS = 1 << 24  # logits that exist at a time
HEAD_CPU_TOKENS = (1024, 256, 64)  # positions of a tile of logits, descending
HEAD_CPU_VOCAB = 1024  # tokens of the vocabulary in a tile of logits
HEAD_VOCAB = 8192  # the same on accelerators; so many rows of a sharded head are gathered at a time
EXCHANGE_ROWS = 16_384  # rows that a device receives in a round of the expert exchange, at most
DECODE_POSITIONS = 1024  # cached positions that a TPU reads at a time in decoding, at most
DECODE_BYTES = 1 << 19  # bytes of their keys in one copy, at most
