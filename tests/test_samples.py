"""The first and the last answers of a run, whatever characters are in them."""

import json

import pytest

from dcmdp_jax.report import samples
from support.pages import Page


@pytest.fixture
def section(tmp_path):
    """Writes rows of one problem each, and returns what the page has of them."""

    def write(*completions, prompt="1 + 1 ="):
        rows = [
            {"step": step, "samples": [{"prompt": prompt, "completion": text, "reward": reward}]}
            for step, (text, reward) in enumerate(completions, start=1)
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "samples.jsonl").write_text(text)
        return samples.section(tmp_path)

    return write


def test_the_first_and_the_last_answer_are_shown_with_their_rewards(section):
    shown = Page(section(("one", 0.0), ("two", 0.5), ("three", 1.0))).text
    assert "step 1, reward 0one" in shown and "step 3, reward 1three" in shown
    assert "two" not in shown


def test_a_single_evaluation_is_shown_once(section):
    assert Page(section(("one", 0.25))).text.endswith("problem1 + 1 =step 1, reward 0.25one")


def test_no_file_has_no_section(tmp_path):
    assert samples.section(tmp_path) == ""


def test_a_reward_that_was_not_finite_is_a_dash(section):
    assert "reward –" in section(("one", None))


@pytest.mark.parametrize("text", ["", " \n "])
def test_an_empty_text_is_said_to_be(section, text):
    assert Page(section((text, 0.0))).text.endswith("(empty)")


def test_markup_is_escaped(section):
    shown = Page(section(("<b>&amp;", 0.0), prompt="<i>"))
    assert "<b>&amp;" in shown.text and not shown.count("b") + shown.count("i")


def test_control_characters_are_signs_and_lines_are_kept(section):
    assert "␀␛[2J␡\na\tb" in section(("\0\x1b[2J\x7f\na\tb", 0.0))


def test_each_text_has_a_direction_of_its_own(section):
    tags = Page(section(("شيء", 0.0), ("one", 1.0))).tags
    texts = [attributes for _, attributes in tags if attributes.get("class") == "text"]
    assert len(texts) == 3 and all(attributes["dir"] == "auto" for attributes in texts)


def test_a_long_text_is_cut(section):
    shown = Page(section(("x" * 5000, 0.0))).text
    assert shown.count("x") == samples.LONGEST - 1 and shown.endswith("…")
