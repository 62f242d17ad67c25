"""A quantity that is added to the list is on the terminal, on both pages and in a study's table."""

import pathlib

import pytest

from dcmdp_jax.monitoring import quantities, terminal
from dcmdp_jax.monitoring.quantities import Quantity
from dcmdp_jax.report import comparison, run_page
from dcmdp_jax.tools import study
from support.pages import CONFIG, ROWS, Page, make_run

ADDED = Quantity("bananas", "ripe", "Bananas that are ripe", "per bunch", "{:.1f} b", max)


@pytest.fixture
def bananas(monkeypatch):
    """The rows of a run that counts bananas, once they are a quantity."""
    monkeypatch.setattr(quantities, "QUANTITIES", (*quantities.QUANTITIES, ADDED))
    return [row | {"bananas": 2.0 * row["step"]} for row in ROWS]


def test_it_is_on_the_terminal(bananas):
    lines = terminal.View("trial", 1, 4, 0.01, 0.2).lines(4, bananas[-1], 99)
    assert any("ripe 8.0 b" in line for line in lines)


def test_it_is_in_the_line_of_a_batch_job(bananas):
    assert "  ripe 8.0 b  " in terminal.status(bananas[-1], 0.01)


def test_it_has_a_curve_and_a_row_on_the_page_of_a_run(bananas, tmp_path):
    path = run_page.write(make_run(tmp_path, bananas))
    text = Page(path.read_text(encoding="utf-8")).text
    assert text.count("Bananas that are ripe") == 2
    assert "2.0 b at 18.0 b at 48.0 b at 4" in text, "first, best and last"


def test_it_has_a_curve_and_a_column_where_runs_are_compared(bananas, tmp_path):
    folders = [
        make_run(tmp_path / name, bananas, CONFIG | {"steps": i})
        for i, name in ((4, "a"), (5, "b"))
    ]
    text = pathlib.Path(comparison.write(folders)).read_text(encoding="utf-8")
    assert "<h2>Bananas that are ripe</h2>" in text
    assert "<th>ripe</th>" in text and "<td>8.0 b</td>" in text


def test_it_has_a_column_in_the_table_of_a_study(bananas):
    (row,) = list(study.evaluations(bananas[:1], prompts=512))
    assert row["bananas"] == 2.0


@pytest.fixture
def two_sources():
    return [row | {"reward/gsm8k": 0.5, "reward/<b>": 0.25} for row in ROWS]


def test_the_reward_of_each_source_is_on_the_page_of_a_run(two_sources, tmp_path):
    path = run_page.write(make_run(tmp_path, two_sources))
    text = Page(path.read_text(encoding="utf-8")).text
    assert text.count("Training reward, gsm8k") == text.count("Training reward, <b>") == 2


def test_the_reward_of_each_source_is_on_the_page_that_compares_runs(two_sources, tmp_path):
    folders = [make_run(tmp_path / "a", two_sources), make_run(tmp_path / "b", ROWS)]
    text = Page(pathlib.Path(comparison.write(folders)).read_text(encoding="utf-8")).text
    assert "Training reward, gsm8k" in text


def test_the_reward_of_the_only_source_is_left_out():
    """Rows average in float32 and float64."""
    rows = [row | {"reward/gsm8k": row["reward"] * (1 + 1e-7)} for row in ROWS]
    assert quantities.of_rows(rows) == list(quantities.QUANTITIES)


def test_the_only_source_with_a_name_is_shown_beside_problems_without_one():
    rows = [row | {"reward/gsm8k": 0.5} for row in ROWS]
    assert [quantity.key for quantity in quantities.of_rows(rows)][-1] == "reward/gsm8k"


def test_keys_are_unique():
    keys = [quantity.key for quantity in quantities.QUANTITIES]
    assert len(set(keys)) == len(keys)


def test_every_quantity_formats_a_number():
    for quantity in quantities.QUANTITIES:
        assert quantity.format.format(0.123456789)
