"""Several runs on one page: grouped by configuration, compared by figures made by hand."""

import copy
import json
import statistics

import pytest

from dcmdp_jax import cli
from dcmdp_jax.evaluation import intervals
from dcmdp_jax.report import comparison, html_page, line_chart, run_advice, run_groups
from support.pages import CONFIG, GAPS, ROWS, SOURCES, Page, make_run


def make_arm(folder, seed, weights, end, steps=4):
    """Writes a run of an engine with these weights that ends at this held-out reward."""
    config = copy.deepcopy(CONFIG) | {"seed": seed, "name": f"{weights}-{seed}"}
    config["rollout"]["precision"]["weights"] = weights
    rows = [dict(row) for row in ROWS[:steps]]
    rows[-1] |= {"reward_eval_infer": end, "reward_eval_train": end}
    return make_run(folder, rows, config)


@pytest.fixture
def folders(tmp_path):
    """Two configurations with two seeds each."""
    return [
        make_arm(tmp_path / "a", 0, "int4", 0.4),
        make_arm(tmp_path / "b", 1, "int4", 0.5),
        make_arm(tmp_path / "c", 0, "float32", 0.7),
        make_arm(tmp_path / "d", 1, "float32", 0.78),
    ]


def group(folders):
    _, runs = run_groups.load(folders)
    return run_groups.group_runs(runs)


def panel_of(groups, title):
    return next(panel for panel in comparison.panels(groups) if panel.title == title)


# Groups


def test_seeds_make_one_configuration_named_by_what_differs(folders):
    groups = [(group.label, [run.name for run in group.runs]) for group in group(folders)]
    assert groups == [("weights int4", ["a", "b"]), ("weights float32", ["c", "d"])]


def test_configurations_have_colours_of_their_own(folders):
    assert len({group.color for group in group(folders)}) == 2


def test_siblings_may_start_from_models_of_their_own(folders):
    for folder in folders[:2]:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"model": {"folder": folder.name}}))
    assert [len(group.runs) for group in group(folders[:2])] == [2]


def test_a_study_is_named_by_its_arms(tmp_path):
    arms = [
        make_arm(tmp_path / name / f"s{seed}", seed, weights, 0.5)
        for name, weights in (("coarse", "int4"), ("exact", "float32"))
        for seed in (0, 1)
    ]
    assert [group.label for group in group(arms)] == ["coarse", "exact"]


def test_an_arm_that_was_run_with_two_configurations_is_named_by_settings(tmp_path):
    folders = [
        make_arm(tmp_path / "arm" / f"s{seed}", seed, weights, 0.5)
        for seed, weights in enumerate(("int4", "float32"))
    ]
    assert [group.label for group in group(folders)] == ["weights int4", "weights float32"]


@pytest.mark.parametrize("background", ["#ffffff", "#0f172a"])
def test_colours_stand_out_from_a_white_page_and_a_dark_one(background):
    assert background in html_page.STYLE.replace("#fff;", "#ffffff;")
    light = luminance(background)
    for color in (*run_groups.COLORS, line_chart.ENGINE, line_chart.TRAINER, line_chart.FAINT):
        low, high = sorted((luminance(color), light))
        assert (high + 0.05) / (low + 0.05) >= 3, color


def luminance(color):
    """Relative luminance of a colour "#rrggbb", as WCAG defines it."""
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("home", ["<run_path>", "dcmdp_jax.losses.kl"])
def test_a_function_is_shown_by_its_own_name(home):
    """Of an experiment file, which has no name as a module, and of the package."""
    assert run_groups.short(f"{home}.k3") == "k3"


# The verdict


def test_the_verdict_begins_with_the_first_configuration(folders):
    first = comparison.verdict(group(folders))[0]
    assert first.startswith("weights int4 ends at a held-out reward of 0.450 [")


def test_the_verdict_pairs_seeds(folders):
    low, high = intervals.mean([0.3, 0.28])[1:]
    expected = f"weights float32 against it: engine +0.290 [{low:+.3f}, {high:+.3f}], higher;"
    assert expected in comparison.verdict(group(folders))[1]


def test_single_runs_are_compared_over_prompts(folders):
    first, second = group([folders[0], folders[2]])
    expected = intervals.difference(intervals.wilson(0.7, 512), intervals.wilson(0.4, 512))
    assert comparison.difference_from(second, first, "reward_eval_infer") == expected


def test_the_verdict_says_that_an_interval_is_over_prompts(folders):
    sentences = comparison.verdict(group([folders[0], folders[2]]))
    assert "counts held-out prompts and not seeds" in sentences[2]


def test_the_verdict_says_that_several_comparisons_find_more_by_chance(folders, tmp_path):
    third = [make_arm(tmp_path / name, i, "int8", 0.6) for i, name in enumerate("ef")]
    sentences = comparison.verdict(group([*folders, *third]))
    assert "of 2, at least one shows a difference by chance" in sentences[-1]


def test_the_verdict_says_that_runs_end_at_different_steps(folders, tmp_path):
    short = make_arm(tmp_path / "e", 2, "int4", 0.9, steps=3)
    sentences = comparison.verdict(group([*folders, short]))
    assert "The runs end at different steps, 3 to 4" in sentences[-1]


def test_advice_is_given_once_with_the_configurations_that_it_is_about(folders, tmp_path):
    skips = make_arm(tmp_path / "e", 2, "int4", 0.5)
    rows = [row | {"skipped": 2} for row in ROWS]
    make_run(skips, rows, json.loads((skips / "config.json").read_text()))
    advice = comparison.advice(group([*folders, skips]))
    assert advice == [f"weights int4 (1 of 3 runs): {run_advice.SKIPPED}"]


# Curves


def test_a_curve_ends_where_the_first_of_its_seeds_ends(folders, tmp_path):
    short = make_arm(tmp_path / "e", 2, "int4", 0.9, steps=3)
    curve = panel_of(group([*folders[:2], short]), "Mean delta").series[0]
    assert [step for step, _ in curve.points] == [1, 2, 3]


def test_a_curve_is_the_mean_over_seeds(folders):
    curve = panel_of(group(folders), "Mean delta").series[0]
    assert curve.points[0][1] == pytest.approx(statistics.fmean([0.03, 0.03]))


def test_a_common_tolerance_is_drawn(folders):
    assert panel_of(group(folders), "Mean delta").tolerance == 0.01


def test_a_band_reaches_from_the_lowest_seed_to_the_highest(folders):
    curve = panel_of(group(folders), "Held-out reward, engine").series[0]
    assert curve.points[-1] == (4, pytest.approx(0.45))
    assert curve.band[-1] == (4, 0.4, 0.5)


# The page


@pytest.fixture
def shown(folders, tmp_path):
    """The page of four runs, of which the first has gaps and a diagnosis, as text."""
    (folders[0] / "gaps.jsonl").write_text(json.dumps(GAPS) + "\n")
    (folders[0] / "diagnose.json").write_text(json.dumps(SOURCES))
    assert comparison.write(folders) == str(tmp_path / "report.html")
    return (tmp_path / "report.html").read_text(encoding="utf-8")


def test_the_command_prints_where_the_page_is(folders, tmp_path, capsys):
    assert cli.main(["report", *map(str, folders)]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "report.html")


def test_the_page_needs_no_other_file(shown):
    tags = {tag for tag, _ in Page(shown).tags}
    assert not tags & {"script", "link", "img", "iframe", "object"} and "http" not in shown


def test_the_page_has_a_chart_for_each_quantity_and_one_for_positions(shown):
    assert Page(shown).count("svg") == 8 + 1


@pytest.mark.parametrize(
    "part", ["rollout.precision.weights", "1␣+␣<b>", "Discrepancy by source", "0.02 ± 0.001"]
)
def test_the_page_shows_settings_tokens_and_sources(shown, part):
    assert part in Page(shown).text


@pytest.mark.parametrize("name", "abcd")
def test_the_page_has_the_verdict_of_each_run(shown, name):
    assert f"{name} Held-out reward" in Page(shown).text


@pytest.mark.parametrize("part", ["Worst tokens of step 4", "0–7"])
def test_the_page_of_one_run_shows_its_gaps_too(folders, part):
    (folders[0] / "gaps.jsonl").write_text(json.dumps(GAPS) + "\n")
    assert cli.main(["report", str(folders[0])]) == 0
    page = Page((folders[0] / "report.html").read_text(encoding="utf-8"))
    assert part in page.text and page.count("mark") == 1


# Refusals


def test_a_run_that_is_given_twice_is_named(folders):
    with pytest.raises(ValueError, match="a is given twice; give each run once"):
        comparison.write([folders[0], folders[0]])


def test_a_run_without_a_step_is_named(folders, tmp_path):
    with pytest.raises(ValueError, match="empty has not finished a step; leave it out"):
        comparison.write([folders[0], make_run(tmp_path / "empty", [])])


def test_a_runs_own_page_is_not_overwritten(folders):
    with pytest.raises(ValueError, match="is a run's own page; give another --output"):
        comparison.write(folders[:2], folders[0] / "report.html")


def test_the_command_refuses_in_one_sentence(folders, capsys):
    assert cli.main(["report", str(folders[0]), str(folders[0])]) == 2
    assert capsys.readouterr().err.count("\n") == 1
