"""Are four experts better than one? The quickstart with an architecture of your own.

The decoder's switches make a small Mixture-of-Experts of it, with random weights: two of four
experts read a token, and one table is both embedding and head. (Trained weights need no file: any
experiment takes them by `--model.folder DIR`.)

Command:  dcmdp train experiments/own_model.py --seed 1 --steps 40
Hardware: two CPU cores
Time:     3 minutes of CPU time (16 of the clock, beside about ten other programs)
Result:   it does not learn in 40 steps, from a warm-up as weak as that of the quickstart's seed 0:
          held-out pass rate of the engine's policy 0.21 -> 0.25, of the trainer's 0.21 -> 0.25;
          mean delta 0.0058 -> 0.0136, with lambda at its bound. One seed answers no question
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
