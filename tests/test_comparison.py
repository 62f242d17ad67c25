"""Several runs on one page: grouped by configuration, compared by hand-made figures."""

import copy
import json
import statistics

import pytest

from dcmdp_jax import cli, intervals
from dcmdp_jax.report import comparison
from support.pages import (
    CONFIG,
    GAPS,
    ROWS,
    SOURCES,
    Page,
    make_run,
)


def run(folder, seed, weights, end, steps=4):
    config = copy.deepcopy(CONFIG) | {"seed": seed, "name": f"{weights}-{seed}"}
    config["rollout"]["precision"]["weights"] = weights
    rows = [dict(row) for row in ROWS[:steps]]
    rows[-1] |= {"reward_eval_infer": end, "reward_eval_train": end}
    return make_run(folder, rows, config)


@pytest.fixture
def folders(tmp_path):
    return [
        run(tmp_path / "a", 0, "int4", 0.4),
        run(tmp_path / "b", 1, "int4", 0.5),
        run(tmp_path / "c", 0, "float32", 0.7),
        run(tmp_path / "d", 1, "float32", 0.78),
    ]


def load(folders):
    return comparison.group_runs(
        [
            comparison.Run(
                f, f.name, json.loads((f / "config.json").read_text()), comparison.metrics.read(f)
            )
            for f in folders
        ]
    )


def test_seeds_make_one_configuration_named_by_what_differs(folders):
    groups = load(folders)
    assert [(group.label, [run.name for run in group.runs]) for group in groups] == [
        ("weights int4", ["a", "b"]),
        ("weights float32", ["c", "d"]),
    ]
    assert len({group.color for group in groups}) == 2


def test_siblings_may_start_from_models_of_their_own(folders):
    for folder in folders[:2]:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"model": {"folder": folder.name}}))
    assert [len(group.runs) for group in load(folders[:2])] == [2]


def test_the_verdict_pairs_seeds(folders):
    said = comparison.verdict(load(folders))
    low, high = intervals.mean([0.3, 0.28])[1:]
    assert (
        f"weights float32 against it: engine +0.290 [{low:+.3f}, {high:+.3f}], higher;" in said[1]
    )
    assert said[0].startswith("weights int4 ends at a held-out reward of 0.450 [")


def test_single_runs_are_compared_over_prompts_and_the_page_says_so(folders):
    groups = load([folders[0], folders[2]])
    gap = intervals.difference(intervals.wilson(0.7, 512), intervals.wilson(0.4, 512))
    assert comparison.difference_from(groups[1], groups[0], "reward_eval_infer") == gap
    assert "counts held-out prompts and not seeds" in comparison.verdict(groups)[2]


def test_curves_are_means_in_a_band_as_far_as_every_seed_goes(folders, tmp_path):
    groups = load([*folders[:2], run(tmp_path / "e", 2, "int4", 0.9, steps=3)])
    panel = next(panel for panel in comparison.panels(groups) if panel.title == "Mean delta")
    assert [step for step, _ in panel.series[0].points] == [1, 2, 3] and panel.tolerance == 0.01
    assert panel.series[0].points[0][1] == pytest.approx(statistics.fmean([0.03] * 3))
    panel = next(
        panel
        for panel in comparison.panels(load(folders))
        if panel.title == "Held-out reward, engine"
    )
    assert panel.series[0].points[-1] == (4, pytest.approx(0.45)) and panel.series[0].band[-1] == (
        4,
        0.4,
        0.5,
    )


def test_the_page_stands_alone_and_shows_all_parts(folders, tmp_path, capsys):
    (folders[0] / "gaps.jsonl").write_text(json.dumps(GAPS) + "\n")
    (folders[0] / "diagnose.json").write_text(json.dumps(SOURCES))
    assert cli.main(["report", *map(str, folders)]) == 0
    path = tmp_path / "report.html"
    assert capsys.readouterr().out.strip() == str(path)
    text = path.read_text(encoding="utf-8")
    seen = Page(text)
    assert (
        not {tag for tag, _ in seen.tags} & {"script", "link", "img", "iframe", "object"}
        and "http" not in text
    )
    assert (
        seen.count("svg") == 8 + 1
        and "rollout.precision.weights" in seen.text
        and "1␣+␣<b>" in seen.text
    )
    assert "Discrepancy by source" in seen.text and "0.02 ± 0.001" in seen.text
    for folder in folders:
        assert f"{folder.name} Held-out reward" in seen.text


def test_one_run_shows_its_gaps_too(folders):
    (folders[0] / "gaps.jsonl").write_text(json.dumps(GAPS) + "\n")
    assert cli.main(["report", str(folders[0])]) == 0
    seen = Page((folders[0] / "report.html").read_text(encoding="utf-8"))
    assert "Worst tokens of step 4" in seen.text and "0–7" in seen.text and seen.count("mark") == 1


def test_what_cannot_be_compared_is_named(folders, tmp_path, capsys):
    empty = make_run(tmp_path / "empty", [])
    for runs, words in (
        ([folders[0], folders[0]], "given twice"),
        ([folders[0], empty], "has not finished a step"),
        ([*folders[:2], "--output", folders[0] / "report.html"], "a run's own page"),
    ):
        assert cli.main(["report", *map(str, runs)]) == 2
        assert words in capsys.readouterr().err
