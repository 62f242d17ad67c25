"""The report: sentences that can be checked by hand, curves where they belong, a page that stands
alone.
"""

import math
import re

import numpy as np
import pytest

from dcmdp_jax.report import line_chart, run_page
from support.pages import (
    CONFIG,
    ROWS,
    Page,
    make_run,
)


def page(folder, rows, config=CONFIG):
    return Page(run_page.write(make_run(folder, rows, config)).read_text(encoding="utf-8"))


def test_verdict_by_hand():
    assert run_page.verdict(CONFIG, ROWS) == (
        "Held-out reward of the engine's policy rose from 0.250 (step 1) to 0.750 (step 4). "
        "Held-out reward of the trainer's policy stayed within sampling noise, from 0.375 (step 1) to 0.385 (step 4). "
        "Mean delta was 0.004 at the last step, within the tolerance of 0.01; 2 of 4 steps (50%) lay inside it. "
        "After the last update the multiplier is 0.125. It stood at its upper bound of 0.2 after 2 of 4 steps."
    )


@pytest.mark.parametrize(
    "end, says",
    [
        (0.25 + 0.0624, "stayed within"),
        (0.25 + 0.0626, "rose"),
        (0.25 - 0.0624, "stayed within"),
        (0.25 - 0.0626, "fell"),
    ],
)
def test_a_change_of_two_standard_errors_is_called_one(end, says):
    rows = [ROWS[0], {"step": 4, "reward_eval_infer": end}]
    # 2 sqrt(2) 0.5 / sqrt(512) = 0.0625
    assert f"engine's policy {says}" in run_page.verdict(CONFIG, rows)


def test_a_multiplier_at_its_bound_in_float32_is_at_its_bound():
    config = CONFIG | {"constraint": {"multiplier_max": 0.7}}
    # 0.69999999 and less
    rows = [{"step": 1, "multiplier": float(np.float32(0.7))}, {"step": 2, "multiplier": 0.69}]
    assert "upper bound of 0.7 after 1 of 2 steps" in run_page.verdict(config, rows)


def test_verdict_tells_of_interruption_skipped_updates_and_violation():
    said = run_page.verdict(
        CONFIG | {"steps": 9}, ROWS[:3] + [ROWS[3] | {"delta_mean": 0.02, "skipped": 1}]
    )
    assert said.startswith("The run stopped at step 4 of 9.")
    assert "above the tolerance of 0.01; 1 of 4 steps (25%)" in said and "1 update left out" in said


def test_verdict_tells_that_nothing_was_learnt_or_measured():
    rows = [row | {"skipped": 2 * row["step"], "delta_mean": None} for row in ROWS]
    config = CONFIG | {"algorithm": {"epochs": 1, "minibatches": 2}}
    said = run_page.verdict(config, rows)
    assert said.startswith("Nothing was learnt: every update was left out.")
    assert "8 updates left out" in said
    assert "Delta could be measured in 0 of 4 steps" in said and "Mean delta" not in said
    assert "Nothing was learnt" not in run_page.verdict(config, [*rows[:3], ROWS[3]])


def test_verdict_tells_of_a_bound_that_holds_a_floor_that_is_above_and_completions_cut_off():
    rows = [row | {"prob_diff_std": 0.1, "truncated": 1.0} for row in ROWS]
    rows[3]["saturated"] = 2
    said = run_page.verdict(CONFIG, rows)
    assert "All completions were cut off by the limit of 32 tokens at the last step." in said
    assert "In the last 2 steps it was held there with delta above the tolerance" in said
    assert "The tolerance lies under the floor: with the weights that the run began with" in said
    assert "mean delta was 0.03, at which no multiplier" in said
    rows = [row | {"prob_diff_std": 0.15, "truncated": 0.25} for row in ROWS]
    said = run_page.verdict(CONFIG, rows)
    assert "25.0% of the completions were cut off by the limit of 32 tokens" in said
    assert "floor" not in said
    assert "cut off" not in run_page.verdict(CONFIG, [row | {"truncated": 0.0} for row in ROWS])


def test_the_page_stands_alone_and_holds_every_curve(tmp_path):
    seen = page(tmp_path, ROWS)
    assert not {tag for tag, _ in seen.tags} & {"script", "link", "img", "iframe", "object"}
    assert not [attributes for _, attributes in seen.tags if attributes.keys() & {"src", "href"}]
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "http" not in text and "url(" not in text and "@import" not in text
    assert seen.count("svg") == 6 and seen.count("tr") == 1 + 8 and seen.count("details") == 1
    assert run_page.verdict(CONFIG, ROWS) in seen.text and '"multiplier_max": 0.2' in seen.text
    assert "4 steps took 8.0 s (median 2 s); 2,000 tokens were sampled, 250 per second" in seen.text
    for unit in ("mean reward", "nats per token", "tokens", "step"):
        assert unit in seen.text
    colors = {attributes.get("stroke") for _, attributes in seen.tags}
    assert {line_chart.ENGINE, line_chart.TRAINER, line_chart.INSIDE} <= colors
    dots = [attributes["fill"] for tag, attributes in seen.tags if tag == "circle"]
    # two evaluations of each policy
    assert sorted(dots) == sorted(2 * [line_chart.ENGINE] + 2 * [line_chart.TRAINER])


def test_the_table_has_first_best_and_last(tmp_path):
    page(tmp_path, ROWS)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    cells = {
        label: [cell.strip() for cell in re.findall(r"<td>([^<]*)", rest)]
        for label, rest in re.findall(r"<tr><td>([^<]*) <small>.*?</small></td>(.*?)</tr>", text)
    }
    assert cells["Held-out reward, engine"] == ["0.250", "0.750", "0.750"]
    assert cells["Mean delta"] == ["0.03", "0.004", "0.004"]
    assert cells["Entropy"] == ["0.500", "–", "0.200"]


def test_everything_read_from_files_is_escaped(tmp_path):
    attack = "<script>alert('x')</script>\"&"
    config = CONFIG | {
        "name": attack,
        "seed": attack,
        "rollout": {"precision": {"weights": attack}},
        attack: attack,
    }
    seen = page(tmp_path, ROWS, config)
    assert seen.count("script") == 0 and seen.text.count(attack) >= 4


def test_smoothing_is_a_trailing_mean_over_finite_values():
    points = [(1, 2.0), (2, 4.0), (3, math.nan), (4, 9.0), (5, math.nan), (6, math.nan)]
    smooth = [value for _, value in run_page.smoothed(points, 2)]
    assert smooth[:5] == [2.0, 3.0, 4.0, 9.0, 9.0] and math.isnan(smooth[5])


@pytest.mark.parametrize(
    "rows",
    [
        [],
        ROWS[:1],
        [{"step": 1}],
        [{"step": 1, "reward": None, "delta_mean": None, "non_finite": {"reward": "nan"}}],
        [dict.fromkeys(ROWS[0]) | {"step": 1}, ROWS[1]],
        [{**row, "delta_mean": 0.0, "multiplier_next": 0.0} for row in ROWS],
        [{k: v for k, v in row.items() if "eval" not in k} for row in ROWS],
        [{**row, "delta_mean": 1e-12} for row in ROWS],
        [{**ROWS[1], "step": step, "reward": -1.0} for step in range(1, 400)],
    ],
    ids=[
        "none",
        "one",
        "bare",
        "nulls",
        "first null",
        "zero",
        "no evaluation",
        "exact engine",
        "long",
    ],
)
def test_odd_runs_have_a_page(tmp_path, rows):
    seen = page(tmp_path, rows)
    assert seen.count("svg") == len(run_page.panels(CONFIG, rows)) and seen.count("h1") == 1
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"\b(nan|inf|None)\b", re.sub(r"<pre>.*</pre>", "", text, flags=re.S))


@pytest.mark.parametrize(
    "config", [{}, {"name": "x"}, CONFIG | {"constraint": {}}, CONFIG | {"eval": None}]
)
def test_a_configuration_that_lacks_fields_is_no_obstacle(tmp_path, config):
    assert page(tmp_path, ROWS, config).count("svg") == 6


def test_a_torn_last_line_is_an_interrupted_run(tmp_path):
    make_run(tmp_path, ROWS[:2])
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "rew')
    assert "stopped at step 2 of 4" in run_page.write(tmp_path).read_text(encoding="utf-8")


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"config\.json does not exist"):
        run_page.write(tmp_path)
    make_run(tmp_path, ROWS)
    (tmp_path / "metrics.jsonl").unlink()
    with pytest.raises(ValueError, match=r"metrics\.jsonl does not exist"):
        run_page.write(tmp_path)
