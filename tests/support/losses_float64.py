"""Values and gradients of the losses in float64 NumPy, from docs/losses.md and the papers it names.

Nothing of the package is called. `of_case` has the layout of a golden file's case: inputs, and
beside them what the losses, corrections, diagnostics and the constraint make of them. Gradients are
exact, by the complex step f(x + ih) / h with h = 1e-30: `fixed` takes the real part, which stops a
gradient, and every comparison is of real parts. What padding holds is garbage on purpose.

Conventions. D = old - roll, so that rho = train / rollout. A token's log ratio is clamped to +-20;
a completion's is the sum of its tokens' unclamped ones, clamped once; means are of clamped ones. A
token whose roll is not finite has D = 0 and is not counted where tokens are measured. Rejected
tokens stay in the denominator unless a name ends in _shrink. Nothing to average gives 0.
"""

import functools
import math

import numpy as np

STEP = 1e-30
TOLERANCE = 0.0037
MULTIPLIER = 0.1


def fixed(x):
    return np.real(x)


def least(a, b):
    return np.where(np.real(a) <= np.real(b), a, b)


def most(a, b):
    return np.where(np.real(a) >= np.real(b), a, b)


def clip(x, low, high):
    return least(most(x, low), high)


def clamp(x):
    return clip(x, -20.0, 20.0)


def excess(z):
    """exp(z) - 1 - z, by its series near 0, where float64 too would cancel."""
    near = z * z * (1 / 2 + z * (1 / 6 + z * (1 / 24 + z * (1 / 120 + z / 720))))
    return np.where(np.abs(z) < 1e-2, near, np.exp(z) - 1 - z)


def row_sum(x, m):
    return np.where(m, x, 0).sum(axis=1, keepdims=True)


def row_mean(x, m):
    return row_sum(x, m) / np.maximum(m.sum(axis=1, keepdims=True), 1)


def mean(x, m):
    return np.where(m, x, 0).sum() / max(m.sum(), 1)


def two_kl(q, p):
    """KL in nats of "this token or another"."""
    return q * np.log(q / p) + (1 - q) * np.log((1 - q + 1e-8) / (1 - p + 1e-8))


# ------------------------------------------------------------ reducers


def token_mean(x, m):
    return mean(x, m)


def row_token_mean(x, m):
    return row_mean(x, m).sum() / max(m.any(axis=1).sum(), 1)


def row_token_sum(x, m):
    return np.where(m, x, 0).sum() / max(m.any(axis=1).sum(), 1)


REDUCERS = {
    "ppo_dapo_token_mean": token_mean,
    "ppo_dapo_token_sum": lambda x, m: np.where(m, x, 0).sum(),
    "ppo_dapo_seq_mean_token_mean": row_token_mean,
    "ppo_dapo_batch_mean_token_mean": lambda x, m: row_mean(x, m).sum() / m.shape[0],
    "ppo_dapo_seq_mean_token_sum": row_token_sum,
    "ppo_dapo_seq_mean_token_sum_norm": lambda x, m: row_token_sum(x, m) / m.shape[1],
    "ppo_dapo_dr_grpo_trl": lambda x, m: np.where(m, x, 0).sum() / m.size,
}


# ------------------------------------------------------------ policy losses
# Of (log-probs, behaviour log-probs, advantage, mask), 0 at padding where arrays come in.


def ppo(cur, old, adv, m, low=0.2, high=0.28, dual=None, ratio_max=None):
    r = np.exp(clamp(cur - old))
    loss = most(
        -adv * (r if ratio_max is None else least(r, ratio_max)), -adv * clip(r, 1 - low, 1 + high)
    )
    return loss if dual is None else np.where(adv < 0, least(loss, -dual * adv), loss)


def sapo(cur, old, adv, m):
    r = np.exp(clamp(cur - old))
    tau = np.where(adv > 0, 1.0, 1.05)
    return -adv * 4 / tau / (1 + np.exp(-tau * (r - 1)))


def cispo(cur, old, adv, m, low=0.0, high=math.inf):
    return -clip(np.exp(clamp(fixed(cur) - old)), low, high) * adv * cur


def dppo(cur, old, adv, m, keep):
    return -np.minimum(np.exp(clamp(fixed(cur) - old)), 20.0) * keep * adv * cur


def inside_tv(cur, old, adv, bound):
    gap = np.exp(fixed(cur)) - np.exp(old)
    return np.where(adv > 0, gap <= bound, gap >= -bound)


def dppo_kl(cur, old, adv, m, bound):
    p = np.exp(fixed(cur))
    q = np.exp(old)
    inward = np.where(adv > 0, p <= q, p >= q)
    return dppo(cur, old, adv, m, (two_kl(q, p) <= bound) | inward)


def prime_tv(cur, roll, adv, m):
    log_ratio = clamp(cur - roll)
    return -adv * np.exp(log_ratio) * inside_tv(cur, roll, adv, 0.2) + 1e-3 * log_ratio**2


def quadratic(cur, old, adv, m, weight):
    r = np.exp(clamp(cur - old))
    return -adv * r + np.abs(adv) * weight * (r - 1) ** 2 / (2 * 12.5)


def dro(cur, old, adv, m):
    return -adv * cur + 0.5 / 2 * clamp(cur - old) ** 2


def gspo(cur, old, adv, m):
    s = np.exp(least(row_mean(clamp(cur - old), m), 10.0))
    a = row_mean(adv, m)
    return most(-a * s, -a * clip(s, 1 - 3e-4, 1 + 4e-4)) + 0 * cur


def gspo_token(cur, old, adv, m):
    s = np.exp(least(fixed(row_mean(clamp(cur - old), m)) + cur - fixed(cur), 10.0))
    return most(-adv * s, -adv * clip(s, 1 - 3e-4, 1 + 4e-4))


def gmpo(cur, old, adv, m):
    d = clamp(cur - old)
    s = np.sign(adv)
    x = s * least(s * d, s * clip(d, -0.4, 0.4))
    return -row_mean(adv, m) * np.exp(row_mean(x, m)) + 0 * cur


def vespo(cur, old, adv, m):
    log_w = np.clip(row_sum(fixed(cur) - old, m), math.log(1e-8), 20.0)
    k = np.where(adv >= 0, 2.0, 3.0)
    lam = np.where(adv >= 0, 3.0, 2.0)
    return -np.exp(lam + k * log_w - lam * np.exp(log_w)) * adv * cur


# ------------------------------------------------------------ the train/rollout gap


def gaps(x):
    """(unclamped D, clamped D, which tokens are measured)."""
    measured = x["mask"] & np.isfinite(x["roll"])
    raw = np.where(measured, x["old"] - np.where(measured, x["roll"], 0), 0)
    return raw, np.clip(raw, -20, 20), measured


def weights(x, t):
    raw, d, measured = gaps(x)
    rho = np.exp(d)
    product = np.exp(np.clip(row_sum(raw, measured), -20, 20))
    (pop_low, pop_high), (clip_low, clip_high) = t["w_icepop"], t["w_clip_token"]
    found = {
        "w_tis_token": np.minimum(rho, t["w_tis_token"]),
        "w_tis_token_C1.05": np.minimum(rho, 1.05),
        "w_tis_seq": np.minimum(product, t["w_tis_seq"]) + 0 * rho,
        "w_icepop": np.where((rho >= pop_low) & (rho <= pop_high), rho, 0),
        "w_clip_token": np.clip(rho, clip_low, clip_high),
        "w_geo_seq_truncate": np.minimum(np.exp(row_mean(d, measured)), 2.0) + 0 * rho,
    }
    found = {name: np.where(x["mask"], w, 0) for name, w in found.items()}
    for name, average in (("w_tis_token", token_mean), ("w_tis_seq", row_token_mean)):
        factor = average(found[name], x["mask"])
        found[name + "_batchnorm"] = found[name] / (factor if factor > 1e-8 else 1.0)
    return found


def keeps(x, t):
    raw, d, measured = gaps(x)
    m = x["mask"]
    rho = np.exp(d)
    k3 = excess(d)
    roll = np.where(measured, x["roll"], x["old"])
    p = np.exp(np.where(m, x["old"], -1.0))
    q = np.exp(np.where(m, roll, -1.0))
    worst = np.where(measured, k3, 0).max(axis=1, keepdims=True)
    product = np.exp(np.clip(row_sum(raw, measured), -20, 20))
    geometric = np.exp(row_mean(d, measured))
    drift = row_mean(np.clip(np.where(measured, roll - x["cur"], 0), -20, 20), measured)

    def between(ratio, bounds):
        return (ratio >= bounds[0]) & (ratio <= bounds[1])

    found = {
        "keep_mis_token": between(rho, t["keep_mis_token"]),
        "keep_mis_seq": between(product, t["keep_mis_seq"]),
        "keep_geo_seq": between(geometric, t["keep_geo_seq"]),
        "keep_veto": np.where(measured, rho, 1).min(axis=1, keepdims=True) >= t["keep_veto"],
        "keep_trm_max_k3": worst <= t["keep_trm_max_k3"],
        "keep_seq_mean_k3": row_mean(k3, measured) <= t["keep_seq_mean_k3"],
        "keep_token_k3": k3 <= t["keep_token_k3"],
        "keep_kpop": np.maximum(two_kl(p, q), two_kl(q, p)) <= t["keep_kpop"],
        "keep_m2po": d**2 <= second_moment_cut((d**2)[measured], t["keep_m2po"]),
        "keep_opsm": (x["adv"] >= 0) | (drift <= t["keep_opsm"]),
        "keep_ipo_absprob": np.abs(p - q) <= t["keep_ipo_absprob"],
    }
    return {name: m & keep for name, keep in found.items()}


def second_moment_cut(squares, threshold):
    """The greatest square with a mean of those up to it below the threshold, or the smallest."""
    cut = min(squares, default=0.0)
    for candidate in squares:
        if np.mean([s for s in squares if s <= candidate]) < threshold:
            cut = max(cut, candidate)
    return cut


# ------------------------------------------------------------ the constraint


def constraint(x):
    _, _, measured = gaps(x)
    old, roll = (np.where(measured, x[name], 0) for name in ("old", "roll"))
    signed = np.where(measured, np.exp(old) - np.exp(roll), 0)
    average = mean(np.abs(signed), measured)
    after = MULTIPLIER
    if measured.any():
        after = min(max(MULTIPLIER + (average - TOLERANCE), 0.0), 1.0)

    def shaped(cost, multiplier):
        return np.where(x["mask"], x["adv"] - multiplier * cost, 0)

    return {
        "delta": np.abs(signed),
        "delta_bar": average,
        "lambda_applied": MULTIPLIER,
        "lambda_next": after,
        "adv_shaped": shaped(np.abs(signed), MULTIPLIER),
        "adv_shaped_update_first": shaped(np.abs(signed), after),
        "adv_signed_variant": shaped(signed, MULTIPLIER),
        "adv_normalised_variant": shaped(np.abs(signed), MULTIPLIER) / (1 + MULTIPLIER),
    }


def penalty(cur, x):
    _, _, measured = gaps(x)
    a = np.where(measured, cur, 0)
    b = np.where(measured, x["roll"], 0)
    return MULTIPLIER * np.where(np.real(a) >= b, 1, -1) * (np.exp(a) - np.exp(b))


# ------------------------------------------------------------ losses by name


def losses(x, t):
    """Name -> function of the current log-probs to (loss per token, denominator mask, reducer)."""
    m = x["mask"]
    raw, d, measured = gaps(x)
    old, adv, ref = (np.where(m, x[name], 0) for name in ("old", "adv", "ref"))
    roll = np.where(measured, x["roll"], 0)

    def plain(loss, reducer=token_mean, weight=1.0, keep=m, denominator=m, **options):
        return lambda cur: (loss(cur, old, adv, m, **options) * weight * keep, denominator, reducer)

    def bypass(loss, **options):
        def call(cur):
            inside = np.where(measured, cur, 0)
            value = loss(inside, roll, np.where(measured, adv, 0), measured, **options)
            return np.where(measured, value, 0), m, token_mean

        return call

    def tv(cur, old, adv, m):
        return dppo(cur, old, adv, m, inside_tv(cur, old, adv, t["dppo_tv"]))

    table = {name: plain(ppo, reducer) for name, reducer in REDUCERS.items()}
    table |= {
        "grpo_clip0.24": plain(ppo, low=0.24, high=0.24),
        "ppo_dual_c3": plain(ppo, high=0.2, dual=3.0),
        "ppo_delta1.5": plain(ppo, ratio_max=1.5),
        "ppo_bypass": bypass(ppo),
        "gspo": plain(gspo_token, row_token_mean),
        "gspo_seq_form": plain(gspo, row_token_mean),
        "sapo": plain(sapo, row_token_mean),
        "cispo": plain(cispo, low=0.8, high=1.28),
        "cispo_abs5": plain(cispo, high=5.0),
        "dppo_tv": plain(tv),
        "dppo_kl": plain(dppo_kl, bound=t["dppo_kl"]),
        "prime_tv": bypass(prime_tv),
        "drpo": bypass(quadratic, weight=np.exp(roll)),
        "drpo_spo": bypass(quadratic, weight=1.0),
        "dro": plain(dro),
        "vespo": plain(vespo),
        "reinforce_tis": bypass(cispo, high=2.0),
        "gmpo_nonempty_rows": plain(gmpo, row_token_mean),
        "gmpo_all_rows_verl": plain(gmpo, REDUCERS["ppo_dapo_batch_mean_token_mean"]),
        "kl_ref_k1": lambda cur: (cur - ref, m, token_mean),
        "kl_ref_k2": lambda cur: ((cur - ref) ** 2 / 2, m, token_mean),
        "kl_ref_k3": lambda cur: (
            excess(clamp(ref - cur)) + clamp(ref - cur) - (ref - cur),
            m,
            token_mean,
        ),
    }
    weight = weights(x, t)
    keep = keeps(x, t)
    shaped = constraint(x)["adv_shaped"]
    table |= {f"ppo*{name}": plain(ppo, weight=w) for name, w in weight.items()}
    for name, kept in keep.items():
        table[f"ppo*{name}"] = plain(ppo, keep=kept)
        table[f"ppo*{name}_shrink"] = plain(ppo, keep=kept, denominator=kept)
    table["ppo*w_tis_token*keep_geo_seq"] = plain(
        ppo, weight=weight["w_tis_token"], keep=keep["keep_geo_seq"]
    )
    clipped = functools.partial(ppo, low=0.24, high=0.24)
    # The constraint's losses take the truncated weight at its default, whatever the thresholds.
    truncated = np.where(m, np.minimum(np.exp(d), 2.0), 0)
    table["dcgrpo"] = lambda cur: (clipped(cur, old, shaped, m), m, token_mean)
    table["dcgrpo*w_tis_token"] = lambda cur: (
        clipped(cur, old, shaped, m) * truncated,
        m,
        token_mean,
    )
    table["dcgrpo_penalty_variant"] = lambda cur: (
        clipped(cur, old, adv, m) + penalty(cur, x),
        m,
        token_mean,
    )
    return table


def value_and_gradient(function, x):
    """A real function of complex arrays, and its derivative by every element."""
    gradient = np.zeros(x.shape)
    for index in np.ndindex(x.shape):
        stepped = x.astype(complex)
        stepped[index] += 1j * STEP
        gradient[index] = np.imag(function(stepped)) / STEP
    return float(np.real(function(x.astype(complex)))), gradient


# ------------------------------------------------------------ diagnostics


def metrics(x):
    raw, d, measured = gaps(x)
    rows = measured.any(axis=1)
    if not measured.any():
        return dict.fromkeys(METRICS, 0.0)
    old = x["old"][measured]
    roll = x["roll"][measured]
    raw_t = raw[measured]
    d_t = d[measured]
    p = np.exp(old)
    q = np.exp(roll)
    gap = np.abs(p - q)
    mix = np.log((p + q) / 2)
    deviation = [v - v.mean() for v in (p, q)]
    scale = math.sqrt((deviation[0] ** 2).sum() * (deviation[1] ** 2).sum())
    train = row_mean(np.where(measured, x["old"], 0), measured)[rows, 0]
    sampler = row_mean(np.where(measured, x["roll"], 0), measured)[rows, 0]
    token_weight = np.minimum(np.exp(d_t), 2.0)
    row_weight = np.exp(np.clip(row_sum(raw, measured), -20, 20))[rows, 0]

    def effective(w):
        return w.sum() ** 2 / (len(w) * (w**2).sum())

    return {
        "prob_diff_mean": gap.mean(),
        "prob_diff_max": gap.max(),
        "prob_diff_std_ddof1": math.sqrt(((gap - gap.mean()) ** 2).sum() / max(len(gap) - 1, 1)),
        "pearson": (deviation[0] * deviation[1]).sum() / (scale if scale > 0 else 1.0),
        "logp_abs_diff_mean": np.abs(raw_t).mean(),
        "logp_abs_diff_max": np.abs(raw_t).max(),
        "k1_roll_train": -raw_t.mean(),
        "k2": (d_t**2).mean() / 2,
        "k3": excess(d_t).mean(),
        "chi2_token": (np.exp(d_t) ** 2).mean() - 1,
        "chi2_seq": (row_weight**2).mean() - 1,
        "train_ppl": np.exp(-train).mean(),
        "rollout_ppl": np.exp(-sampler).mean(),
        "ppl_ratio": np.exp(sampler - train).mean(),
        "log_ppl_diff": (sampler - train).mean(),
        "log_ppl_abs_diff": np.abs(sampler - train).mean(),
        "ess_token_truncated": effective(token_weight),
        "ess_seq": effective(row_weight),
        "token_mult_prob_error": np.exp(np.abs(d_t)).mean(),
        "js_nemo": (excess(old - mix) + excess(roll - mix)).mean() / 2,
        "m2": (d_t**2).mean(),
        "frac_out_0.5_2": ((np.exp(d_t) < 0.5) | (np.exp(d_t) > 2.0)).mean(),
        "adv_skew": (np.sign(x["adv"][measured]) * d_t).mean(),
    }


METRICS = (
    "prob_diff_mean",
    "prob_diff_max",
    "prob_diff_std_ddof1",
    "pearson",
    "logp_abs_diff_mean",
    "logp_abs_diff_max",
    "k1_roll_train",
    "k2",
    "k3",
    "chi2_token",
    "chi2_seq",
    "train_ppl",
    "rollout_ppl",
    "ppl_ratio",
    "log_ppl_diff",
    "log_ppl_abs_diff",
    "ess_token_truncated",
    "ess_seq",
    "token_mult_prob_error",
    "js_nemo",
    "m2",
    "frac_out_0.5_2",
    "adv_skew",
)


# ------------------------------------------------------------ what has no [N, T] inputs


def controllers(block):
    """The multiplier's trajectory under each; None is a batch with nothing to measure."""
    means = block["delta_bars_null_is_empty"]
    c = block["c"]
    start = block["lambda0"]

    def trajectory(advance):
        state = (start, start, 0.0)
        path = []
        for measured in means:
            state = state if measured is None else advance(measured, *state)
            path.append(state[0])
        return path

    def projected(eta, high):
        return trajectory(lambda v, lam, i, s: (min(max(lam + eta * (v - c), 0.0), high), i, s))

    def log_space(v, lam, i, s):
        log = math.log(lam) + 0.5 * (v / c - 1)
        return math.exp(min(max(log, math.log(1e-6)), 0.0)), i, s

    def proportional_integral(v, lam, i, s):
        i = min(max(i + (v - c), 0.0), 1.0)
        s = 0.9 * s + 0.1 * (v - c)
        return min(max(i + s, 0.0), 1.0), i, s

    return {
        "proj_eta1": projected(1.0, 1.0),
        "proj_eta0.5": projected(0.5, 1.0),
        "proj_max0.105": projected(1.0, 0.105),
        "log_space_rel": trajectory(log_space),
        "pid_antiwindup": trajectory(proportional_integral),
    }


def advantages(block):
    reward, group, length = (np.array(block[name]) for name in ("rewards", "groups", "lengths"))
    members = [group == g for g in group]
    average = np.array([reward[own].mean() for own in members])
    size = np.array([own.sum() for own in members])
    spread = np.array([reward[own].std(ddof=1) if own.sum() > 1 else 0.0 for own in members])
    token_reward = np.array(block["token_rewards"])
    m = np.array(block["mask"]) > 0
    to_go = np.where(m, np.flip(np.cumsum(np.flip(np.where(m, token_reward, 0), 1), 1), 1), 0)
    centred = np.where(m, to_go - mean(to_go, m), 0)
    return {
        "grpo": (reward - average) / (spread + 1e-6),
        "dr_grpo": reward - average,
        "rloo": size / np.maximum(size - 1, 1) * (reward - average),
        "rfpp_baseline_unwhitened": reward - average,
        "keep_dynamic_sampling": np.array([float(np.ptp(reward[own]) > 0) for own in members]),
        "overlong_penalty": -np.clip((length - (10 - 4)) / 4, 0, 1),
        "reinforce_pp_gamma1": centred / math.sqrt((centred**2).sum() / max(m.sum() - 1, 1) + 1e-8),
    }


def score_centering(block):
    """Value, and gradient by the trainer's logits, for three weights and heads of 3 and 6."""
    q, actions, adv, m = (np.array(block[name]) for name in ("q", "actions", "adv", "mask"))
    rows = np.arange(len(q))
    actions = actions.astype(int)
    functions = {
        "none": lambda r: 1.0 + 0 * r,
        "tis": lambda r: np.minimum(r, 2.0),
        "mis": lambda r: np.where((r >= 0.5) & (r <= 2.0), r, 0.0),
    }

    def loss(logits, f, k):
        logp = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        p = np.exp(fixed(logp))
        head = np.argsort(-q, axis=1, kind="stable")[:, :k]
        p_head = np.take_along_axis(p, head, 1)
        q_head = np.take_along_axis(q, head, 1)
        tail = np.maximum(1 - q_head.sum(1), 1e-6) / np.maximum(1 - p_head.sum(1), 1e-6)
        alpha = (tail * f(1 / tail))[:, None]
        centre = (
            (q_head * f(p_head / q_head) - alpha * p_head) * np.take_along_axis(logp, head, 1)
        ).sum(1)
        own = f(p[rows, actions] / q[rows, actions]) * logp[rows, actions]
        return np.where(m > 0, -adv * (own - centre), 0).sum() / m.sum()

    found = {}
    for name, f in functions.items():
        for k in (3, 6):
            value, gradient = value_and_gradient(
                functools.partial(loss, f=f, k=k), np.array(block["logits"])
            )
            found[f"{name}_top{k}"] = {"value": value, "grad_logits": gradient}
    return found


# ------------------------------------------------------------ a case of a golden file


def of_case(inputs, thresholds):
    """Everything a case of a golden file holds, from its inputs."""
    x = {name: np.array(value, float) for name, value in inputs.items()}
    x["mask"] = x["mask"] > 0
    current = np.where(x["mask"], x["cur"], 0)

    def scalar(cur, function):
        loss, denominator, reducer = function(np.where(x["mask"], cur, 0))
        return reducer(loss, denominator)

    found = {}
    for name, function in losses(x, thresholds).items():
        value, gradient = value_and_gradient(functools.partial(scalar, function=function), current)
        found[name] = {"value": value, "grad_cur": gradient}
    return {
        "inputs": inputs,
        "losses": found,
        "corrections": weights(x, thresholds) | keeps(x, thresholds),
        "dc": constraint(x),
        "metrics": metrics(x),
    }
