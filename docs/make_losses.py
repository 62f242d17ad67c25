"""Writes docs/losses.md from the docstrings of `losses` and `constraint`: `python -m
docs.make_losses`.

Every public function states `Formula:` and `Needs:`, and `Default:` and `Paper:` if it has them; a
line indented under one of these continues it. A function without a formula, or that does not say
what it needs, stops the script. The column of the field
that takes a function in `dcmdp train` is made from the function's module and signature, or stated
in `OTHERS`. It is empty for the functions of `MEASURES` alone.
"""

from __future__ import annotations

import importlib
import inspect
import pathlib
import pkgutil
import re
from types import ModuleType

import dcmdp_jax.losses

PAGE = pathlib.Path(__file__).with_name("losses.md")
FIELDS = ("Formula", "Needs", "Default", "Paper")
REQUIRED = ("Formula", "Needs")

# (module, leading parameters of a function) -> the field of the configuration that takes it.
ADVANTAGE = "algorithm.advantage"
SURROGATE = "algorithm.surrogate"
TOP = SURROGATE + ", rollout.top_logprobs"
FIELDS_OF_CONFIG = {
    ("losses.advantages", "reward, group"): ADVANTAGE,
    ("losses.advantages", "reward, group, mask"): ADVANTAGE,
    ("losses.advantages", "length"): "algorithm.reward_shaping",
    ("losses.advantages", "correct, length, group"): "algorithm.reward_shaping",
    ("losses.advantages", "mask, truncated"): "algorithm.mask",
    ("losses.policy", "logp, old_logp, advantage, mask"): SURROGATE,
    ("losses.policy", "logp, rollout_logp, advantage, mask"): SURROGATE + " (bypass)",
    ("losses.sequence", "logp, old_logp, advantage, mask"): SURROGATE,
    ("losses.covariance", "logp, old_logp, advantage, mask"): SURROGATE,
    ("losses.corrections", "loss, correction"): SURROGATE,
    ("losses.corrections", "loss"): SURROGATE,
    ("losses.corrections", "high"): SURROGATE + " (correction)",
    ("losses.corrections", "low, high"): SURROGATE + " (correction)",
    ("losses.corrections", "low, high, denominator"): SURROGATE + " (correction)",
    ("losses.corrections", "weights, mask"): SURROGATE + " (reweight)",
    ("losses.surrogates", "logp, old_logp, rollout_logp, advantage, mask"): SURROGATE,
    ("losses.centering", "ratio"): TOP + " (weight)",
    ("losses.centering", "ratio, high"): TOP + " (weight)",
    ("losses.centering", "ratio, low, high"): TOP + " (weight)",
    ("losses.centering", "logp, old_logp, rollout_logp, advantage, mask"): TOP,
    ("losses.step_size", "old_logp, rollout_logp, advantage, mask"): "algorithm.accept",
    ("losses.step_size", "old_logp, rollout_logp, mask, steps"): "algorithm.update_scale",
    ("losses.operators", "difference, mask"): SURROGATE + " (correction)",
    ("losses.operators", "ratio, low, high"): SURROGATE + " (correction)",
    ("losses.operators", "mask, keep"): SURROGATE + " (denominator)",
    ("losses.rejection", "old_logp, rollout_logp, mask"): SURROGATE + " (rejections)",
    ("losses.rejection", "measure, mask"): SURROGATE + " (rejections)",
    ("losses.reduce", "x, mask"): "algorithm.reduce",
    ("losses.kl", "logp, ref_logp, mask"): "algorithm.reference_penalty",
    ("losses.kl", "logp, old_logp, ref_logp, mask"): "algorithm.reference_penalty",
    (
        "constraint",
        "advantage, old_logp, rollout_logp, multiplier, tolerance, mask",
    ): "constraint.shaping",
    ("constraint", "logp, rollout_logp, mask, multiplier"): "constraint.penalty",
    ("constraint", "dual_lr"): "constraint.dual",
    ("constraint", "controller, decay"): "constraint.dual",
    ("constraint", "controller, fraction"): "constraint.dual",
}
BUILT_IN = "built in"
# Functions that their signature alone would put elsewhere. "In one of your own" is a function of an
# experiment that calls this one; the page has an example of each.
IN_YOUR_OWN = " (in one of your own)"
OTHERS = {
    "constraint.delta": BUILT_IN,
    "constraint.measure": BUILT_IN,
    "constraint.calibrate_tolerance": "constraint.tolerance (Calibrated)",
    "constraint.signed_delta": "constraint.shaping (in shape_signed, shape_credit)",
    "losses.advantages.at_last_token": ADVANTAGE + IN_YOUR_OWN,
    "losses.advantages.dynamic_sampling_mask": "algorithm.mask",
    "losses.advantages.reinforce_pp": ADVANTAGE + IN_YOUR_OWN,
    "losses.advantages.whiten": ADVANTAGE + IN_YOUR_OWN,
    "losses.centering.score_centering": TOP + " (in centred)",
    "losses.diagnostics.summary": BUILT_IN,
    "losses.diagnostics.sign_flip": BUILT_IN,
    "losses.diagnostics.staleness": BUILT_IN,
    "losses.rejection.opsm": SURROGATE + IN_YOUR_OWN,
    "losses.routing.replay_ids": "algorithm.replay_routing",
    "losses.routing.replay_weights": "algorithm.replay_routing",
    "losses.step_size.inference_gap": "algorithm.accept (in accept)",
    "losses.surrogates.log_linear_proximal": SURROGATE + " (in log_linear)",
}
# Modules and functions that measure and change nothing.
MEASURES = (
    "losses.advantages.pass_at_k",
    "losses.diagnostics",
    "losses.routing.flips",
    "losses.tails",
)
INTRODUCTION = """# Losses and the constraint

Pure functions: arrays in, arrays out. `pip install dcmdp-jax`, or `pip install .` in a checkout,
is enough to import them. This page is made from the docstrings by `python -m docs.make_losses`.

- Log-probs are float32 nats, `[N, T]` (completions x tokens): `logp` of the trainer
  (differentiated), `old_logp` of the trainer at the weights that sampled, `rollout_logp` of the
  sampler, `ref_logp` of a reference.
- `advantage` is float32, `[N, T]` or `[N, 1]`. `mask` is bool, int32 or float32 and above zero on
  the response tokens that are trained; what arrays hold elsewhere is never read. A token whose
  `rollout_logp` is not finite takes no part in anything that compares with the sampler.
- `reward` is float32 `[N]`; `group` is int32 `[N]`, the number of each completion's prompt from 0
  on, or -1 for padding. NumPy makes float64 and int64 by default, which are refused; `.astype`
  casts.
- Ratios are train over rollout: rho = exp(old_logp - rollout_logp). Log ratios of tokens are
  clipped to +-20, that of a completion once, after the sum.
- A policy loss is called as `(logp, old_logp, advantage, mask)`, with options by name, and returns
  the loss of each token.
- A surrogate, which `corrections.decoupled` or `corrections.bypass` makes of a policy loss, is
  called as `(logp, old_logp, rollout_logp, advantage, mask)`. It returns two arrays `[N, T]`: the
  loss of each token, and the mask of the tokens that a mean counts.
- A function of `reduce` makes a scalar of the two.
- A shaping is called as `(advantage, old_logp, rollout_logp, multiplier, tolerance, mask)`.
- Advantages are made in `losses.advantages`, and shaped by the discrepancy in `constraint`.
- In the tables, "needs" lists the arguments that are read, and "trains with" the field of the
  configuration that takes the function in `dcmdp train`; set options with `functools.partial`.
  "Built in" is part of every step. A function that only measures has no field. Policy losses,
  corrections and rejections are passed inside `corrections.decoupled` or `corrections.bypass`.

## Three algorithms on your own log-probs

```python
>>> import jax, numpy as np
>>> from dcmdp_jax import constraint
>>> from dcmdp_jax.losses import advantages, corrections, policy, reduce
>>> rng = np.random.default_rng(0)
>>> rollout_logp = -rng.exponential(0.5, (8, 64)).astype("float32")
>>> old_logp = rollout_logp - rng.exponential(0.3, (8, 64)).astype("float32")
>>> mask, group = np.ones((8, 64), bool), np.arange(8, dtype="int32") // 4
>>> advantage = advantages.grpo(rng.random(8, "float32"), group, num_groups=2)[:, None]
>>> shaped = constraint.shape_advantage(advantage, old_logp, rollout_logp, 0.5, 0.0037, mask)
>>> plain = corrections.decoupled(policy.clipped)
>>> tis = corrections.decoupled(policy.clipped, corrections.tis(2.0))
>>> def norm(surrogate, a):
...     loss = lambda logp: reduce.token_mean(*surrogate(logp, old_logp, rollout_logp, a, mask))
...     return f"{np.linalg.norm(jax.grad(loss)(old_logp)):.3f}"
>>> {"GRPO": norm(plain, advantage), "TIS": norm(tis, advantage), "DC-GRPO": norm(plain, shaped)}
{'GRPO': '0.038', 'TIS': '0.031', 'DC-GRPO': '0.039'}

```

The multiplier is updated after it was applied, from sums over the batch:

```python
>>> controller = constraint.projected_ascent(1.0, multiplier_init=0.5)
>>> sums = constraint.measure(old_logp, rollout_logp, mask)
>>> dual = controller.update(controller.init(), *sums, 0.0037)
>>> f"{dual.multiplier:.3f}"
'0.637'

```

## In an experiment

A configuration takes functions, yours too ([extending.md](extending.md)), and any optax
transformation. `optimizers.muon` tells optax's Muon which matrices the decoder's projections
multiply by. Without that, optax applies Muon to all arrays of two axes, which here are the
embedding, the head and the stacked norms.

```python
>>> from dcmdp_jax import optimizers
>>> from dcmdp_jax.config import AlgorithmConfig
>>> from dcmdp_jax.losses import kl
>>> algorithm = AlgorithmConfig(
...     advantage=advantages.grpo, surrogate=tis, reduce=reduce.token_mean, microbatches=4,
...     reference_penalty=kl.k3, reference_coefficient=0.01, optimizer=optimizers.muon,
... )

```

An advantage that has a parameter `mask` is given it, `[N, T]`, and may return one value per token.
What reads more than its field passes goes into a function of your own:

```python
>>> import jax.numpy as jnp
>>> from dcmdp_jax.losses import rejection
>>> def reinforce_pp(reward, group, mask, *, num_groups):
...     return advantages.reinforce_pp(advantages.at_last_token(reward, mask), mask)
>>> def whitened_rloo(reward, group, mask, *, num_groups):
...     advantage = advantages.rloo(reward, group, num_groups=num_groups)[:, None]
...     return advantages.whiten(jnp.broadcast_to(advantage, mask.shape), mask)
>>> def with_opsm(logp, old_logp, rollout_logp, advantage, mask):
...     loss, counted = tis(logp, old_logp, rollout_logp, advantage, mask)
...     keep = rejection.opsm(logp, rollout_logp, advantage, mask)
...     return jnp.where(keep, loss, 0.0), counted

```

Score centering takes the sampler's k likeliest tokens at each place, which the engine reports where
`rollout.top_logprobs` is k, with `functools.partial(centering.centred, weight=centering.truncated)`
for a surrogate. They take 8 k bytes per sampled token.

`separable = True` declares that what the function gives a completion does not depend on the
log-probs of others; the functions of this page declare it themselves. With one update a batch, a
loss made of such functions alone is scored and differentiated in one pass over each microbatch.
For any other loss the batch is scored first, and the gradient is the same whatever the number of
microbatches.
"""


def modules() -> list[ModuleType]:
    """`constraint`, then every public module of `losses`."""
    names = sorted(
        found.name
        for found in pkgutil.iter_modules(dcmdp_jax.losses.__path__)
        if found.name[0] != "_"
    )
    return [
        importlib.import_module(f"dcmdp_jax.{name}")
        for name in ["constraint", *(f"losses.{n}" for n in names)]
    ]


def functions(module: ModuleType) -> dict:
    """Public functions in the order of the file."""
    members = {
        name: member
        for name, member in inspect.getmembers(module, inspect.isfunction)
        if member.__module__ == module.__name__ and not name.startswith("_")
    }
    return dict(sorted(members.items(), key=lambda item: item[1].__code__.co_firstlineno))


def fields(name: str, function) -> dict[str, str]:
    """The first sentence and the four stated fields of a docstring."""
    text = inspect.getdoc(function) or ""
    stated = {"Summary": text.split("\n\n")[0].replace("\n", " ")}
    for field in FIELDS:
        found = re.search(rf"^{field}: (.+(?:\n[ \t]+.+)*)", text, re.MULTILINE)
        if not found and field in REQUIRED:
            raise ValueError(f"{name} has no line `{field}:` in its docstring; write one")
        stated[field] = re.sub(r"\s*\n\s*", " ", found[1]) if found else ""
    return stated


def trains_with(short: str, name: str, function) -> str:
    """Returns the field of the configuration that takes a function, `BUILT_IN` or ""."""
    if f"{short}.{name}" in OTHERS:
        return OTHERS[f"{short}.{name}"]
    parameters = inspect.signature(function).parameters.values()
    leading = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    return FIELDS_OF_CONFIG.get((short, ", ".join(leading)), "")


def table(module: ModuleType) -> str:
    """A heading, the module's first sentence, and one row for each function."""
    short = module.__name__.removeprefix("dcmdp_jax.")
    rows = [f"## {short}", "", inspect.getdoc(module).split("\n\n")[0].replace("\n", " "), ""]
    rows += [
        "| name | formula | needs | default | trains with | paper |",
        "|---|---|---|---|---|---|",
    ]
    for name, function in functions(module).items():
        stated = fields(f"{short}.{name}", function)
        cells = [f"`{name}`: {stated['Summary']}", *(f"{stated[field]}" for field in FIELDS)]
        cells[1] = f"`{cells[1]}`"
        cells.insert(-1, trains_with(short, name, function))
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows) + "\n"


def page() -> str:
    return "\n".join([INTRODUCTION, *(table(module) for module in modules())])


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}")
