"""Each piece of advice stands on the page of a run that shows its sign, and on no other's."""

import operator
import pathlib
import re

import pytest

from dcmdp_jax.experiment import load_experiment
from dcmdp_jax.report import run_advice, run_page
from support.pages import Page, make_run

ROOT = pathlib.Path(__file__).parents[1]
CONFIG = {
    "name": "trial",
    "steps": 30,
    "constraint": {"shaping": "f", "penalty": None, "tolerance": 0.01, "multiplier_max": 0.2},
    "eval": {"prompts": 512},
}
SENTENCES = {
    name: value
    for name, value in vars(run_advice).items()
    if name.isupper() and isinstance(value, str)
}
STEPS = 30


def rows_of(**changes):
    """A healthy run of 30 steps; a change is a value, or a function of the share of the run."""
    healthy = {
        "reward": lambda u: 0.3 + 0.3 * u,
        "reward_eval_infer": 0.5,
        "reward_eval_train": 0.55,
        "delta_mean": 0.008,
        "prob_diff_std": 0.02,
        "tokens": 400,
        "multiplier": lambda u: 0.1 - 0.05 * u,
        "entropy": lambda u: 0.5 - 0.3 * u,
        "reward_spread": 0.3,
        "truncated": 0.02,
        "skipped": 0,
        "saturated": 0,
    }
    values = (healthy | changes).items()
    return [
        {"step": i + 1}
        | {name: value(i / (STEPS - 1)) if callable(value) else value for name, value in values}
        for i in range(STEPS)
    ]


def rising(u):
    return 0.02 + 0.02 * u


SIGNS = {
    "UNDER_FLOOR": {"delta_mean": 0.02, "prob_diff_std": 0.05},  # 0.02 - 3 * 0.05 / 20 > 0.01
    "RISES_WITH_LAMBDA": {"delta_mean": rising, "multiplier": rising, "prob_diff_std": 0.1},
    "AT_BOUND": {"delta_mean": 0.02, "prob_diff_std": 0.1, "saturated": 5},
    "ENTROPY_COLLAPSED": {"entropy": lambda u: 0.5 - 0.45 * u, "reward_spread": 0.01},
    "ENTROPY_ROSE": {"reward": lambda u: 0.6 - 0.5 * u, "entropy": lambda u: 0.2 + u},
    "CUT_OFF_ANSWERS": {"truncated": 0.3},
    "ALL_ALIKE": {"reward": 0.0, "reward_spread": 0.0},
    "ALL_SOLVED": {"reward": 1.0, "reward_spread": 0.0},
    "SKIPPED": {"skipped": 2},
    "ENGINE_BEHIND": {"reward_eval_train": 0.57},  # 2 sqrt(2) 0.5 / sqrt(512) = 0.0625
}


def test_a_healthy_run_needs_no_advice():
    assert run_advice.advice(CONFIG, rows_of()) == []


def test_every_sentence_has_a_sign():
    assert SIGNS.keys() == SENTENCES.keys()


@pytest.mark.parametrize("name", SIGNS)
def test_a_sign_brings_its_sentence_alone(name):
    assert run_advice.advice(CONFIG, rows_of(**SIGNS[name])) == [SENTENCES[name]]


@pytest.mark.parametrize(
    "changes",
    [
        {"delta_mean": 0.02, "prob_diff_std": 0.07},  # 0.02 - 3 * 0.07 / 20 < 0.01
        {"delta_mean": rising, "prob_diff_std": 0.1},
        {"delta_mean": 0.02, "multiplier": rising, "prob_diff_std": 0.1},
        {"delta_mean": lambda u: rising(u) / 10, "multiplier": rising},
        {"entropy": lambda u: 0.5 - 0.45 * u},
        {"entropy": lambda u: 0.5 - 0.45 * u, "reward_spread": 0.01, "reward": 0.95},
        {"entropy": lambda u: 0.2 + u},
        {"reward": lambda u: 0.6 - 0.5 * u},
        {"truncated": lambda u: 0.3 - 0.3 * u},
        {"skipped": 1},
        {"reward_eval_train": 0.56},
    ],
    ids=[
        "floor in doubt",
        "delta alone rises",
        "lambda alone rises",
        "both rise within the tolerance",
        "entropy falls with the spread kept",
        "entropy falls as problems are solved",
        "entropy alone rises",
        "reward alone falls",
        "cut off at the start alone",
        "one update skipped",
        "engine behind by noise",
    ],
)
def test_half_a_sign_brings_none(changes):
    assert run_advice.advice(CONFIG, rows_of(**changes)) == []


def test_the_last_update_skipped_is_a_sign():
    rows = rows_of()
    rows[-1]["skipped"] = 1
    assert run_advice.advice(CONFIG, rows) == [run_advice.SKIPPED]


def test_a_run_is_lost_that_was_best_in_the_middle():
    reward = [0.3 + 0.02 * i for i in range(18)] + [0.6 - 0.01 * i for i in range(12)]
    entropy = [0.5 - 0.01 * i for i in range(18)] + [0.4 + 0.05 * i for i in range(12)]
    rows = [row | {"reward": r, "entropy": e} for row, r, e in zip(rows_of(), reward, entropy)]
    assert run_advice.advice(CONFIG, rows) == [run_advice.ENTROPY_ROSE]


@pytest.mark.parametrize("name", ["UNDER_FLOOR", "RISES_WITH_LAMBDA", "AT_BOUND"])
def test_a_multiplier_that_acts_on_nothing_needs_no_advice(name):
    config = CONFIG | {"constraint": CONFIG["constraint"] | {"shaping": None}}
    assert run_advice.advice(config, rows_of(**SIGNS[name])) == []


def test_a_policy_trained_through_the_rounding_has_no_other_to_be_behind():
    config = CONFIG | {"algorithm": {"quantize_aware": True}}
    assert run_advice.advice(config, rows_of(**SIGNS["ENGINE_BEHIND"])) == []


@pytest.mark.parametrize("missing", sorted(rows_of()[0].keys() - {"step"}))
def test_a_metric_that_was_not_finite_brings_none(missing):
    assert run_advice.advice(CONFIG, rows_of(**{missing: None})) == []


@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_few_steps_bring_none(count):
    assert run_advice.advice(CONFIG, rows_of()[:count]) == []


@pytest.mark.parametrize("sentence", SENTENCES.values(), ids=SENTENCES)
def test_a_sentence_names_sections_that_exist(sentence):
    sections = re.findall(r"(docs/\w+\.md)#([a-z0-9-]+)", sentence)
    assert sections
    for page, anchor in sections:
        headings = re.findall(r"^#+ (.+)$", (ROOT / page).read_text(encoding="utf-8"), re.M)
        anchors = {re.sub(r"[^a-z0-9 -]", "", h.lower()).replace(" ", "-") for h in headings}
        assert anchor in anchors


@pytest.mark.parametrize("sentence", SENTENCES.values(), ids=SENTENCES)
def test_a_sentence_names_a_setting_that_exists(sentence):
    config = load_experiment(str(ROOT / "experiments" / "quickstart.py"))
    settings = re.findall(r"\b(?:algorithm|constraint|data|rollout)\.[a-z_]+", sentence)
    assert settings
    for name in settings:
        operator.attrgetter(name)(config)


def test_the_page_says_what_to_do_next(tmp_path):
    folder = make_run(tmp_path, rows_of(**SIGNS["CUT_OFF_ANSWERS"]), CONFIG)
    shown = Page(run_page.write(folder).read_text(encoding="utf-8")).text
    assert f"What to do next{run_advice.CUT_OFF_ANSWERS}" in shown


def test_the_page_of_a_healthy_run_says_nothing_of_it(tmp_path):
    folder = make_run(tmp_path, rows_of(), CONFIG)
    assert "What to do next" not in run_page.write(folder).read_text(encoding="utf-8")
