"""The formulas of `losses.surrogates`, `losses.step_size` and TBPO in float64 NumPy, from
docs/losses.md and the papers it names.

Nothing of the package is called. Inputs are those of a golden file's case, conventions and helpers
those of `losses_float64`; gradients are exact, by its complex step.
"""

import math

import numpy as np

from support import losses_float64 as plain

HIGH = 1.4  # of the adaptive clip's ratio
ALPHA = 0.35  # of the log-linear proximal policy
WEIGHT = 1.25  # of its truncated importance sampling
BAND = 1.06  # TBPO's second clip
REFERENCE = 0.9  # of the effective sample size
LENGTH = 3.0  # tokens from which on the rate falls
POWER = 1.5
MINIMUM = 0.6


def read(inputs):
    x = {name: np.array(value, float) for name, value in inputs.items()}
    x["mask"] = x["mask"] > 0
    return x


def adaptive_clip(cur, x):
    m = x["mask"]
    old, adv = (np.where(m, x[name], 0) for name in ("old", "adv"))
    _, gap, _ = plain.gaps(x)
    rho = np.exp(gap)
    scale = np.clip(rho, 1 / HIGH, HIGH)
    r = np.exp(plain.clamp(cur - old))
    clipped = plain.clip(r, 1 - 0.2 * scale, 1 + 0.28 * scale)
    return np.minimum(rho, HIGH) * plain.most(-r * adv, -clipped * adv)


def proximal(cur, x):
    measured = x["mask"] & np.isfinite(x["roll"])
    roll = np.where(measured, x["roll"], np.real(cur))
    return (1 - ALPHA) * roll + ALPHA * np.real(cur)


def log_linear(cur, x):
    m = x["mask"]
    adv = np.where(m, x["adv"], 0)
    middle = np.where(m, proximal(cur, x), 0)
    measured = m & np.isfinite(x["roll"])
    gap = np.where(measured, middle - np.where(measured, x["roll"], 0), 0)
    weight = np.minimum(np.exp(np.clip(gap, -20, 20)), WEIGHT)
    return weight * plain.ppo(cur, middle, adv, m, low=0.2, high=0.2)


def tbpo(cur, x):
    m = x["mask"]
    old = np.where(m, x["old"], 0)
    s = np.exp(plain.least(plain.row_mean(plain.clamp(cur - old), m), 10.0))
    adv = plain.row_mean(np.where(m, x["adv"], 0), m)
    loss = plain.most(-s * adv, -plain.clip(s, 1 - 0.02, 1 + 0.03) * adv)
    return np.where(adv < 0, plain.least(loss, -BAND * adv), loss) + 0 * cur


LOSSES = {
    "adaptive_clip": (adaptive_clip, plain.token_mean),
    "log_linear": (log_linear, plain.token_mean),
    "tbpo": (tbpo, plain.row_token_mean),
}


def value_and_gradient(name, inputs):
    """A loss, reduced, and its derivative by the current log-probs."""
    x = read(inputs)
    function, reducer = LOSSES[name]

    def scalar(cur):
        return reducer(function(np.where(x["mask"], cur, 0), x), x["mask"])

    return plain.value_and_gradient(scalar, np.where(x["mask"], x["cur"], 0))


def sqrt_ess(inputs):
    x = read(inputs)
    raw, _, measured = plain.gaps(x)
    w = np.exp(np.clip(plain.row_sum(raw, measured), -20, 20))[measured.any(axis=1), 0]
    if not len(w):
        return 1.0
    return min(1.0, math.sqrt(w.sum() ** 2 / (w**2).sum() / len(w) / REFERENCE))


def inference_gap(inputs):
    x = read(inputs)
    _, gap, measured = plain.gaps(x)
    rows = measured.any(axis=1)
    ratio = np.exp(plain.row_mean(gap, measured))[rows, 0]
    adv = plain.row_mean(np.where(measured, x["adv"], 0), measured)[rows, 0]
    return -float(np.mean(ratio * adv)) if rows.any() else 0.0


def length_decay(inputs):
    tokens = read(inputs)["mask"].sum(axis=1)
    if not tokens.any():
        return 1.0
    return min(1.0, max((LENGTH / tokens[tokens > 0].mean()) ** POWER, MINIMUM))
