"""The tables of RESULTS.md about the language model are those of its runs."""

import importlib
import itertools
import math
import pathlib
import statistics

import pytest

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture
def summary(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "experiments" / "language"))
    return importlib.import_module("summary")


@pytest.fixture
def nf4_summary(summary):
    return importlib.import_module("nf4_summary")


def test_the_tables_of_results_are_the_runs(summary, nf4_summary):
    page = (ROOT / "RESULTS.md").read_text()
    made = {"seeds": summary.table(summary.read(summary.CSV)), "pilots": summary.pilots()}
    made |= nf4_summary.tables()
    assert all(table in page for table in made.values())
    assert page == summary.fill(page, made)


def test_the_seeds_are_complete_pairs_of_the_study(summary):
    arms = summary.read(summary.CSV)
    assert {len(rows) for runs in arms.values() for rows in runs.values()} == {20}
    assert arms["grpo"].keys() == arms["dcgrpo"].keys() <= set(range(2, 7))


def test_the_runs_under_nf4_are_those_of_the_studies(summary, nf4_summary):
    for name, study in nf4_summary.STUDIES.items():
        arms = summary.read(nf4_summary.csv_of(name))
        assert arms.keys() == study.arms.keys()
        seeds = {arm: sorted(runs) for arm, runs in arms.items()}
        if name == "nf4_halves":  # without the last seed of the charges
            assert seeds.pop("charge_engine") == seeds.pop("charge_trainer") == [0, 1]
        assert {tuple(runs) for runs in seeds.values()} == {tuple(study.seed_numbers)}
        steps = {arm: {len(rows) for rows in runs.values()} for arm, runs in arms.items()}
        assert steps == {arm: {config.steps} for arm, config in study.arms.items()}


def test_the_cooled_policy_is_measured_at_every_temperature(nf4_summary):
    cooled = importlib.import_module("cooled")
    measured = [(row["temperature"], row["batch"]) for row in cooled.read()]
    assert measured == list(itertools.product(cooled.TEMPERATURES, range(cooled.BATCHES)))


def test_a_table_of_arms_by_hand(nf4_summary):
    def run(engine, trainer, delta):
        nan = math.nan
        rows = [
            {"step": step, "delta_mean": delta, "multiplier": 0.5, "entropy": 2.0}
            | {"reward_eval_infer": nan, "reward_eval_train": nan}
            for step in range(1, 11)
        ]
        rows[0] |= {"delta_mean": 99.0, "reward_eval_infer": 0.1, "reward_eval_train": 0.2}
        rows[-1] |= {"reward_eval_infer": engine, "reward_eval_train": trainer}
        return rows

    found = {
        "penalty": {0: run(0.75, 0.5, 0.3)},
        "grpo": {0: run(0.5, 0.75, 0.1), 1: run(0.625, 0.75, 0.2)},
    }
    assert nf4_summary.table(found).splitlines()[2:] == [
        "| grpo | 2 | 0.56 |  | 0.75 | 0.19 | 0.15 | 0.5 | 2 |",
        "| penalty | 1 | 0.75 | 0.25 | 0.50 | -0.25 | 0.3 | 0.5 | 2 |",
    ]


def test_what_the_text_says_of_pairs_of_seeds_is_in_the_runs(summary, nf4_summary):
    """The intervals that stand in no table."""
    page = (ROOT / "RESULTS.md").read_text()
    runs = {name: summary.read(nf4_summary.csv_of(name)) for name in nf4_summary.STUDIES}
    grpo = runs["nf4"]["grpo"]

    def rates(arm, at, measure="infer", study="nf4"):
        courses = [runs[study][arm][seed] for seed in range(3)]
        return [summary.evaluations(rows, f"reward_eval_{measure}")[at][1] for rows in courses]

    def deltas(arm):
        return [statistics.fmean(r["delta_mean"] for r in rows[-8:]) for rows in arm.values()]

    def difference(first, second, digits=2):
        return summary.spread([b - a for a, b in zip(first, second, strict=True)], digits)

    for sentence, interval in (
        (
            "At the first step the rounding costs\n  {} of",
            difference(rates("grpo", 0), rates("exact", 0)),
        ),
        ("at step 12 still {}.", difference(rates("grpo", 1), rates("exact", 1))),
        ("ends {} from `exact`", difference(rates("rounded", 2), rates("exact", 2))),
        (
            "GRPO's trainer, too, is ahead of its engine by {}.",
            difference(rates("grpo", 1), rates("grpo", 1, "train")),
        ),
        (
            "GRPO's is not shown ({})",
            difference(deltas(runs["nf4"]["penalty"]), deltas(grpo), 3),
        ),
        (
            "at step 8 it is {} behind",
            difference(rates("grpo", 1, study="nf4_rate"), rates("exact", 1, study="nf4_rate")),
        ),
        (
            "by {} against GRPO over the last eight steps",
            difference(deltas(runs["nf4_halves"]["credit_engine"]), deltas(grpo), 3),
        ),
    ):
        assert sentence.format(interval) in page

    def between(arm):
        rows = [[r["delta_mean"] for r in x if 0.5 <= r["entropy"] < 0.75] for x in arm.values()]
        return [statistics.fmean(deltas) for deltas in rows]

    interval = difference(between(runs["nf4_halves"]["credit_engine"]), between(grpo), 3)
    assert f"it is smaller on each seed, by {interval}, which" in page

    halves = [rows for arm in runs["nf4_halves"].values() for rows in arm.values()]
    for sentence, steps in (("they make {} of delta", slice(3)), ("and {} of it", slice(-8, None))):
        shares = [statistics.fmean(r["prob_diff_rollout_share"] for r in x[steps]) for x in halves]
        assert sentence.format(f"{min(shares):.2f} to {max(shares):.2f}") in page

    int8 = summary.read(summary.CSV)["grpo"].values()
    correlations = [
        statistics.correlation(*([row[name] for row in rows] for name in ("entropy", "delta_mean")))
        for rows in int8
    ]
    assert sum(value < -0.7 for value in correlations) == 2
    assert sum(value > -0.2 for value in correlations) == 3
    assert "In int8 delta rises as the entropy falls on two seeds of five" in page


def test_delta_at_equal_entropy_by_hand(nf4_summary):
    def rows(*pairs):
        return [{"entropy": entropy, "delta_mean": delta} for entropy, delta in pairs]

    means = nf4_summary.at_entropy(
        rows((0.5, 0.1), (0.6, 0.2), (0.74, 0.6), (2.5, 0.9), (2.6, 0.8), (0.49, 5), (0.75, 7))
    )
    assert means[1] == pytest.approx((0.61333, 0.3), abs=1e-5)
    assert all(math.isnan(delta) for _, delta in (means[0], *means[2:]))  # under three batches

    runs = {"exact": {0: rows(*[(0.3, 1e-7)] * 3)}, "grpo": {s: rows((0.3, s)) for s in (1, 2, 3)}}
    table = nf4_summary.entropy_table(runs, rows(*[(2.2, 0.25)] * 3))
    assert table.splitlines()[2:] == [
        "| untrained, cooled | 0.250 |  |  |  |  |  |  |",
        "| grpo |  |  |  |  |  |  | 2.000 |",
    ]


def test_a_table_by_hand(summary):
    def run(delta, last):
        rows = [
            {"delta_mean": delta, "multiplier": 0.1 + step, "reward_eval_infer": float("nan")}
            for step in range(20)
        ]
        for row, rate in ((rows[0], 0.25), (rows[-1], last)):
            row["reward_eval_infer"] = rate
        return [
            {**row, "step": i + 1, "reward_eval_train": row["reward_eval_infer"]}
            for i, row in enumerate(rows)
        ]

    arms = {"grpo": {1: run(0.02, 0.5), 2: run(0.03, 0.7)}, "dcgrpo": {1: run(0.01, 0.75)}}
    *_, line, means = summary.table(arms).splitlines()
    assert line == (
        "| 1 | 0.0200 | 0.25 → 0.50 | 0.25 → 0.50 | 0.0100 | 0.25 → 0.75 | 0.25 → 0.75 | "
        "0.1, 0.1, 19.1, 19.1 |"
    )
    assert means.startswith("| mean | 0.0200 | 0.50 | 0.50 | 0.0100 |")
    assert summary.last_delta(run(0.5, 0.1)) == statistics.fmean([0.5] * 10)
