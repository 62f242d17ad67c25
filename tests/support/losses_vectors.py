"""A golden file of our own: inputs, and what `losses_float64` makes of them."""

import numpy as np

from support import losses_float64

THRESHOLDS = {
    "w_tis_token": 1.7,
    "w_tis_token_batchnorm": 1.7,
    "w_tis_seq": 1.6,
    "w_icepop": [0.6, 4.0],
    "w_clip_token": [0.75, 1.5],
    "keep_mis_token": [0.6, 1.8],
    "keep_mis_seq": [0.7, 1.43],
    "keep_geo_seq": [0.93, 1.06],
    "keep_veto": 1e-4,
    "keep_trm_max_k3": 0.06,
    "keep_seq_mean_k3": 0.017,
    "keep_token_k3": 0.03,
    "keep_kpop": 0.02,
    "keep_m2po": 0.03,
    "keep_opsm": 0.05,
    "keep_ipo_absprob": 0.08,
    "dppo_tv": 0.15,
    "dppo_kl": 0.04,
}


def _inputs(case):
    """Five completions of up to eight float32 tokens: a hole in one, one of one, one empty."""
    random = np.random.RandomState(11)  # whose numbers are the same in every version of NumPy
    shape = 5, 8
    mask = np.ones(shape)
    mask[0, 3] = mask[1, 6:] = mask[2, 1:] = mask[3] = 0
    roll = -random.exponential(0.9, shape) - 0.01
    old = np.minimum(roll + 0.25 * random.normal(size=shape), -0.001)
    cur = np.minimum(old + 0.3 * random.normal(size=shape), -0.001)
    ref = np.minimum(cur + 0.4 * random.normal(size=shape), -0.001)
    advantage = np.repeat([[1.1], [-0.8], [0.5], [0.3], [-1.4]], 8, axis=1)
    if case == "flip":
        advantage = -advantage
    if case == "matched":
        roll = cur = old
    if case == "extreme":
        # Tokens past the clamp: sums of two completions come back inside it, one does not.
        old[0, 0], roll[0, 0], old[0, 1], roll[0, 1] = -30.0, -0.001, -0.3, -15.5
        old[1, 2], roll[1, 2], old[1, 4], roll[1, 4] = -0.2, -27.0, -13.0, -0.5
        old[4, 5], roll[4, 5] = -29.0, -0.05
        cur[0, 0], cur[4, 1] = -3.0, -26.0
    if case == "unmeasured":
        roll[0, 2], roll[4, 0], roll[2, 0] = np.nan, -np.inf, np.nan
    if case == "all_masked":
        mask[:] = 0
    garbage = np.array([1e4, -1e4, -1e3])
    arrays = {"cur": cur, "old": old, "roll": roll, "ref": ref, "adv": advantage}
    padded = {}
    for number, (name, value) in enumerate(arrays.items()):
        filling = garbage[(np.arange(mask.size).reshape(shape) + number) % 3]
        padded[name] = np.float64(np.float32(np.where(mask > 0, value, filling)))
    return padded | {"mask": mask}


CASES = ("base", "flip", "matched", "extreme", "unmeasured", "all_masked")


def vectors():
    """A golden file made here and now."""
    random = np.random.RandomState(5)
    singles = {
        "controllers": {
            "delta_bars_null_is_empty": [
                0.002,
                0.009,
                None,
                0.0045,
                0.0,
                0.03,
                0.0002,
                0.15,
                None,
                0.001,
            ],
            "c": 0.0041,
            "lambda0": 0.08,
        },
        "advantages": {
            "rewards": [0.0, 1.0, 1.0, 0.25, 0.5, 0.5, 0.9],
            "groups": [0, 0, 0, 0, 1, 1, 2],
            "lengths": [1, 6, 7, 8, 9, 10, 14],
            "token_rewards": np.float32(random.normal(size=(3, 6))),
            "mask": np.array([[1, 1, 0, 1, 1, 1], [1, 1, 1, 0, 0, 0], [0] * 6], float),
        },
        "score_centering": {
            "logits": np.float64(np.float32(random.normal(size=(4, 6)))),
            "q": np.float64(np.float32(random.dirichlet(np.ones(6), size=4))),
            "actions": [1, 4, 0, 2],
            "adv": [0.9, -1.2, 0.4, 0.6],
            "mask": [1.0, 1.0, 0.0, 1.0],
        },
    }
    computed = {
        "controllers": losses_float64.controllers,
        "advantages": losses_float64.advantages,
        "score_centering": losses_float64.score_centering,
    }
    file = {name: singles[name] | function(singles[name]) for name, function in computed.items()}
    cases = {case: losses_float64.of_case(_inputs(case), THRESHOLDS) for case in CASES}
    return file | {"cases": cases, "thresholds": THRESHOLDS}
