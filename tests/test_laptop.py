"""The laptop studies' own parts: spellings, the outlier, shaping on a part of the tokens, and the
tables of RESULTS.md.
"""

import pathlib
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

LAPTOP = pathlib.Path(__file__).parents[1] / "experiments" / "laptop"
sys.path.insert(0, str(LAPTOP))

import room  # noqa: E402
import split  # noqa: E402
import tables  # noqa: E402
from chain import TASK  # noqa: E402

from dcmdp_jax import constraint  # noqa: E402
from dcmdp_jax.models import decoder  # noqa: E402
from dcmdp_jax.models.quantized import quantize  # noqa: E402

pytestmark = pytest.mark.full


@pytest.mark.parametrize("kinds", [2, 3])
def test_every_spelling_of_a_right_solution_is_right_and_no_other(kinds):
    exact = room.Synonyms(TASK.operations, (0.0, 0.0, 0.0), kinds)
    for example in exact.held_out(20):
        text = exact.solution(example, np.random.default_rng(0))
        plain = TASK.__class__(TASK.operations, (0.0, 0.0, 0.0)).solution(
            example, np.random.default_rng(0)
        )
        back = str.maketrans("".join(room.SPELLINGS[1:kinds]), room.DIGITS * (kinds - 1))
        assert text.translate(back) == plain and exact.reward(example, text) == 1.0
        assert all(c == p for i, (c, p) in enumerate(zip(text, plain)) if not exact.computed(i))
        right = int(example.answer)
        for value in range(10):
            for spelt in room.SPELLINGS[:kinds]:
                assert exact.reward(example, text[:-1] + spelt[value]) == float(value == right)
        assert exact.reward(example, text + "1") == exact.reward(example, text[:-1]) == 0.0


def test_kinds_are_drawn_alike():
    task = room.Synonyms(TASK.operations, TASK.noise, 3)
    rng = np.random.default_rng(1)
    counts = np.zeros(3)
    for example in task.held_out(200):
        text = task.solution(example, rng)
        counts += [
            sum(c in spelt for i, c in enumerate(text) if task.computed(i))
            for spelt in room.SPELLINGS
        ]
    assert counts.sum() == 200 * 11 and np.abs(counts / counts.sum() - 1 / 3).max() < 0.03


def test_the_outlier_changes_the_engines_policy_and_not_the_trainers():
    shape = room.start(3).model.architecture
    params = decoder.init(jax.random.key(0), shape)
    params = params | {"head": params["head"] * 6.5}  # as large as after a warm-up
    with_outlier = room.with_outlier(params)
    without = with_outlier | {"head": with_outlier["head"].at[-1].set(0.0)}
    tokens = jnp.arange(2, 30)[None]
    assert shape.vocab_size - 10 == 2 + len(room.Synonyms(5, TASK.noise, 2).alphabet), (
        "the last kind has the last ten symbols"
    )
    np.testing.assert_array_equal(
        decoder.logits(with_outlier, tokens, shape), decoder.logits(without, tokens, shape)
    )

    def error(p):
        rounded = quantize(p["head"], "int4", (-2,)).dequantize()
        return np.abs(
            decoder.logits(p | {"head": rounded}, tokens, shape) - decoder.logits(p, tokens, shape)
        ).mean((0, 1))

    np.testing.assert_array_equal(error(with_outlier)[:-10], error(without)[:-10])
    assert error(with_outlier)[-10:].mean() > 1.5 * error(without)[-10:].mean()


def test_shaping_on_a_part_of_the_tokens():
    rng = np.random.default_rng(0)
    old, rollout = (np.log(rng.uniform(0.1, 0.9, (4, 6))).astype(np.float32) for _ in range(2))
    advantage = rng.normal(size=(4, 1)).astype(np.float32)
    mask = rng.random((4, 6)) < 0.8
    gap = np.exp(old) - np.exp(rollout)
    for chosen, part in (
        (split.failed, advantage < 0),
        (split.succeeded, advantage > 0),
        (split.engine_likelier, gap < 0),
        (split.trainer_likelier, gap > 0),
    ):
        found = split.where(chosen, constraint.shape_advantage)(
            advantage, old, rollout, 0.5, 0.0, mask
        )
        np.testing.assert_allclose(
            found, np.where(mask, advantage - 0.5 * np.abs(gap) * part, 0.0), atol=1e-6
        )


def test_table_figures_are_the_closed_forms():
    runs = {
        seed: [
            {
                "reward_eval_infer": 0.3,
                "reward_eval_train": 0.3,
                "delta_mean": 0.0,
                "multiplier": 0.0,
                "entropy": 1.0,
            },
            {
                "reward_eval_infer": end,
                "reward_eval_train": 0.5,
                "delta_mean": 0.01,
                "multiplier": 0.1,
                "entropy": 0.1,
            },
        ]
        for seed, end in ((0, 0.2), (1, 0.4), (2, 0.6))
    }  # of starts at 0.3
    control = {
        seed: [{**rows[0]}, {**rows[1], "reward_eval_infer": rows[1]["reward_eval_infer"] - 0.1}]
        for seed, rows in runs.items()
    }
    assert tables.spread([0.2, 0.4, 0.6]) == "0.40 ± 0.50", (
        "4.303 * 0.2 / sqrt(3), t of 2 degrees of freedom"
    )
    assert tables.against(runs, control) == "0.10 ± 0.00 (3 of 3)"
    assert tables.collapsed(runs) == "1 of 3"
    runs[1][-1]["reward_eval_infer"] = 0.25
    assert tables.collapsed(runs) == "1 of 3", "0.05 is within the noise of 512 samples"


def test_the_tables_of_results_are_the_studies():
    page = (LAPTOP.parents[1] / "RESULTS.md").read_text()
    made = tables.every(LAPTOP / "results")
    assert page == tables.fill(page, made)
    assert set(re.findall(r"<!-- table (.*?) -->", page)) == set(made), (
        "every table that a study leaves is shown"
    )
