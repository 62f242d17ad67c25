"""The page of a run: it stands alone, and holds every curve and figure."""

import re

import pytest

from dcmdp_jax.report import line_chart, run_page, run_verdict
from support.pages import CONFIG, ROWS, Page, make_run


def page(folder, rows, config=CONFIG):
    return Page(run_page.write(make_run(folder, rows, config)).read_text(encoding="utf-8"))


@pytest.fixture
def shown(tmp_path):
    """The page of the run of four steps."""
    return page(tmp_path, ROWS)


def test_the_page_needs_no_other_file(shown, tmp_path):
    assert not {tag for tag, _ in shown.tags} & {"script", "link", "img", "iframe", "object"}
    assert not [attributes for _, attributes in shown.tags if attributes.keys() & {"src", "href"}]
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "http" not in text and "url(" not in text and "@import" not in text


def test_the_page_holds_a_chart_for_the_rewards_and_each_other_quantity(shown):
    assert shown.count("svg") == 6


def test_the_page_holds_a_row_for_each_quantity_and_the_header(shown):
    assert shown.count("tr") == 8 + 1


def test_the_page_holds_the_verdict(shown):
    assert "".join(run_verdict.verdict(CONFIG, ROWS)) in shown.text


def test_the_page_holds_the_configuration(shown):
    assert shown.count("details") == 1 and '"multiplier_max": 0.2' in shown.text


def test_the_page_holds_the_cost(shown):
    cost = "4 steps took 8.0 s (median 2 s); 2,000 tokens were sampled, 250 per second"
    assert cost in shown.text


@pytest.mark.parametrize("unit", ["mean reward", "nats per token", "tokens", "step"])
def test_the_page_names_units(shown, unit):
    assert unit in shown.text


def test_a_run_of_one_step_is_named_so(tmp_path):
    assert "1 step · int4 engine" in page(tmp_path, ROWS[:1], CONFIG | {"steps": 1}).text


def test_values_of_more_than_two_curves_are_marked_with_their_colours(shown, tmp_path):
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    rewards, *others = re.findall(r"<b>step 1\n(.*?)</b>", text, flags=re.S)
    assert re.findall(r"background:(\S+)\"></i>(.*)", rewards) == [
        (line_chart.NEUTRAL, "training 0.000"),
        (line_chart.TRAINER, "held-out trainer 0.375"),
        (line_chart.ENGINE, "held-out engine 0.250"),
    ]
    assert not any("background" in values for values in others)


def test_curves_have_the_colours_of_their_policies(shown):
    colors = {attributes.get("stroke") for _, attributes in shown.tags}
    assert {line_chart.ENGINE, line_chart.TRAINER, line_chart.INSIDE} <= colors


def test_each_evaluation_is_a_dot(shown):
    dots = [attributes["fill"] for tag, attributes in shown.tags if tag == "circle"]
    assert sorted(dots) == sorted(2 * [line_chart.ENGINE] + 2 * [line_chart.TRAINER])


@pytest.mark.parametrize(
    "title, cells",
    [
        ("Held-out reward, engine", ["0.250", "0.750", "0.750"]),
        ("Mean delta", ["0.03", "0.004", "0.004"]),
        ("Entropy", ["0.500", "–", "0.200"]),
    ],
)
def test_the_table_has_first_best_and_last(shown, tmp_path, title, cells):
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    (row,) = re.findall(rf"<tr><td>{title} <small>.*?</small></td>(.*?)</tr>", text)
    assert [cell.strip() for cell in re.findall(r"<td>([^<]*)", row)] == cells


def test_everything_read_from_files_is_escaped(tmp_path):
    attack = "<script>alert('x')</script>\"&"
    config = CONFIG | {
        "name": attack,
        "seed": attack,
        "rollout": {"precision": {"weights": attack}},
        attack: attack,
    }
    shown = page(tmp_path, ROWS, config)
    assert shown.count("script") == 0 and shown.text.count(attack) >= 4


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
    shown = page(tmp_path, rows)
    assert shown.count("svg") == len(run_page.panels(CONFIG, rows)) and shown.count("h1") == 1
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"\b(nan|inf|None)\b", re.sub(r"<pre>.*</pre>", "", text, flags=re.S))


@pytest.mark.parametrize(
    "config", [{}, {"name": "x"}, CONFIG | {"constraint": {}}, CONFIG | {"eval": None}]
)
def test_a_configuration_that_lacks_fields_is_no_obstacle(tmp_path, config):
    assert page(tmp_path, ROWS, config).count("svg") == 6


LONG = [
    ROWS[0] | {"step": step, "delta_mean": 0.01 + 0.001 * (step * 7919 % 997), "reward/a": 0.5}
    for step in range(1, 5001)
]


def test_a_page_of_5000_steps_is_small(tmp_path):
    assert run_page.write(make_run(tmp_path, LONG)).stat().st_size < 200_000


def test_a_page_is_the_same_when_it_is_written_again(tmp_path):
    folder = make_run(tmp_path, LONG)
    assert run_page.write(folder).read_bytes() == run_page.write(folder).read_bytes()


def test_a_torn_last_line_is_an_interrupted_run(tmp_path):
    make_run(tmp_path, ROWS[:2])
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "rew')
    assert "stopped at step 2 of 4" in run_page.write(tmp_path).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl"])
def test_a_missing_file_is_named(tmp_path, name):
    make_run(tmp_path, ROWS)
    (tmp_path / name).unlink()
    with pytest.raises(ValueError, match=f"{name} does not exist"):
        run_page.write(tmp_path)
