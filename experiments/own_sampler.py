"""What must a sampler of your own do? The quickstart, sampled from the trainer's own parameters.

It has the two methods of `records.Sampler`. There is no cache: each token is drawn after a forward
pass over the whole sequence. Stop strings, `top_k`, `top_p` and `min_p` are not read, nor is
`rollout.precision`, which is that of the library's engine.

Command:  dcmdp train experiments/own_sampler.py --seed 1 --steps 40
Hardware: two CPU cores
Time:     3 minutes of CPU time (13 of the clock, beside about ten other programs)
Result:   held-out pass rate 0.37 -> 0.87; mean delta 8e-8, since sampler and trainer both compute
          in float32, and lambda falls to 0
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from quickstart import CONFIG as QUICKSTART

from dcmdp_jax.config import Precision
from dcmdp_jax.models import decoder
from dcmdp_jax.records import NotFinite, Rollout
from dcmdp_jax.stopping import Interrupted


class PlainSampler:
    """A `records.Sampler`."""

    def __init__(self, config, model, tokenizer, mesh):
        self.stop_ids = tokenizer.eos_ids
        self.logits = jax.jit(lambda params, tokens: decoder.logits(params, tokens, model))

    def update_weights(self, params, version):
        if not all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(params)):
            raise NotFinite("a parameter is not finite")
        self.params = jax.tree.map(jnp.copy, params)  # the next step donates its buffers
        self.version = version

    def sample(
        self, prompts, *, samples, max_tokens, sampling, stop_strings, seed, offset, should_stop
    ):
        count = len(prompts.lengths) * samples
        start = np.repeat(prompts.lengths, samples)
        tokens = np.repeat(prompts.tokens, samples, axis=0)
        tokens = np.pad(tokens, ((0, 0), (0, max_tokens)))
        out = np.zeros((count, max_tokens), np.int32)
        logp = np.zeros((count, max_tokens), np.float32)
        stopped = np.zeros(count, bool)
        lengths = np.zeros(count, np.int32)
        numbers = offset + jnp.arange(count)  # completion i depends on `seed` and `offset + i`
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), numbers)
        for t in range(max_tokens):
            if should_stop():
                raise Interrupted
            logits = self.logits(self.params, tokens)[np.arange(count), start + t - 1]
            log_probs = jax.nn.log_softmax(logits / sampling.temperature)
            step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, t)
            token = np.asarray(jax.vmap(jax.random.categorical)(step_keys, log_probs))
            live = np.flatnonzero(~stopped)
            out[live, t] = tokens[live, start[live] + t] = token[live]
            logp[live, t] = np.asarray(log_probs)[live, token[live]]
            lengths[live] += 1
            stopped[live] = np.isin(token[live], self.stop_ids)
        texts = lengths - stopped  # without the stop token
        return Rollout(prompts, out, lengths, texts, logp, stopped, self.version, sampling)


CONFIG = dataclasses.replace(
    QUICKSTART,
    name="own_sampler",
    rollout=dataclasses.replace(QUICKSTART.rollout, precision=Precision(), sampler=PlainSampler),
)
