"""The mathematics of reinforcement learning under a gap between trainer and sampler: arrays in,
arrays out.

Notation, the same in every module. N completions of T tokens; all log-probabilities are float32, in
nats, `[N, T]` (any leading axes, the last one is tokens), of the same temperature and support:

    logp           trainer, current weights; what is differentiated
    old_logp       trainer, the rollout's weights
    rollout_logp   sampler
    ref_logp       reference model
    advantage      float32 [N, T], or [N, 1] for one value per completion
    mask           bool, int32 or float32 [N, T]; above 0 on response tokens that are trained,
                   and no weight: 0.5 counts as 1

    r   = exp(logp - old_logp)            staleness
    rho = exp(old_logp - rollout_logp)    gap between trainer and sampler, pi_train / pi_rollout
    e   = exp(logp - rollout_logp)        both; e = r rho
    D   = old_logp - rollout_logp         clamped to +-20, 0 where rollout_logp is not finite;
                                          summed over a completion first, and clamped then

    prompts -> ... -> advantages -> shaped advantages -> loss -> gradients

`advantages` turns rewards into advantages. `policy`, `sequence` and `covariance` hold the policy
losses, all of `(logp, old_logp, advantage, mask)`; `kl` the divergences from a reference;
`corrections` weights a loss by rho, from the levels, operators and denominators of `operators`, and
`rejection` drops tokens by it; `surrogates` holds complete losses of trainer and sampler;
`centering` corrects the score function with the head of the sampler's distribution; `routing`
replays experts; `reduce` turns a per-token loss into a scalar; `step_size` says how far a batch
lets an update go; `diagnostics` and `tails` measure the gap. The constraint on it is
`dcmdp_jax.constraint`.

Losses are unreduced, float32 `[N, T]`, and 0 outside the mask. Padding may hold anything: it
reaches neither value nor gradient. Empty masks, empty completions, groups of one and batches in
which every token is rejected give loss 0 and gradient 0. Every function is safe under jit, vmap and
grad. An argument of another dtype raises TypeError and one of another shape ValueError; both name
it.

A function is *separable* over microbatches if what it gives a completion does not depend on the
log-probs of other completions. The functions here declare it by their attribute `separable`; on a
function of your own, set `function.separable = True`. The training step can then score a batch and
update from it in one pass, where it otherwise scores the batch first.
"""

from dcmdp_jax.losses import (
    advantages,
    centering,
    corrections,
    covariance,
    diagnostics,
    kl,
    operators,
    policy,
    reduce,
    rejection,
    routing,
    sequence,
    step_size,
    surrogates,
    tails,
)
