"""Are four experts better than one? The quickstart with an architecture of your own.

The decoder's switches make a small Mixture-of-Experts of it, with random weights: two of four
experts read a token, and one table is both embedding and head. (Trained weights need no file: any
experiment takes them by `--model.folder DIR`.)

Command:  dcmdp train experiments/own_model.py
Hardware: two CPU cores
Time:     not measured
Result:   not measured; tests/test_own_files.py trains 2 steps of a smaller model
"""

import dataclasses

from quickstart import CONFIG as QUICKSTART

from dcmdp_jax.config import ModelSource

ARCHITECTURE = dataclasses.replace(
    QUICKSTART.model.architecture,
    tie_word_embeddings=True,
    num_experts=4,
    experts_per_token=2,
    expert_size=80,
)

CONFIG = dataclasses.replace(
    QUICKSTART,
    name="own_model",
    model=ModelSource(architecture=ARCHITECTURE),
)
