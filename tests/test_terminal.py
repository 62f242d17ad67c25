"""The block on a terminal: what it says, where it is drawn, and that it fits."""

import math
import os
import re
import sys

import pytest

from dcmdp_jax.monitoring import phases, terminal
from dcmdp_jax.monitoring import screen as screens
from dcmdp_jax.monitoring.screen import Style

VALUES = {
    "reward": 0.5,
    "reward_eval_infer": 0.25,
    "reward_eval_train": 0.375,
    "delta_mean": 0.02,
    "multiplier": 0.1,
    "entropy": 0.5,
    "seconds": 2.0,
    "tokens": 4000,
}


@pytest.fixture(autouse=True)
def own_screen(monkeypatch):
    """A test does not draw over the block of the one before."""
    monkeypatch.setattr(terminal, "screen", screens.Screen())


@pytest.fixture
def screen(monkeypatch):
    """The lines a terminal of 100 columns shows after what was written so far; it knows the three
    sequences in use.
    """
    monkeypatch.setattr(screens.shutil, "get_terminal_size", lambda: os.terminal_size((100, 24)))
    monkeypatch.setenv("NO_COLOR", "1")

    def replay(text):
        lines = [""]
        row = 0
        for part in re.findall(r"\x1b\[\d*[AKJ]|\r|\n|[^\x1b\r\n]+", text):
            if part.endswith("A") and part.startswith("\x1b"):
                row -= int(part[2:-1])
            elif part == "\x1b[2K":
                lines[row] = ""
            elif part == "\x1b[J":
                lines[row:] = [""]
            elif part == "\n":
                row += 1
                lines += [""] * (row == len(lines))
            elif part != "\r":
                lines[row] += part
        return lines

    return replay


def view(**changes):
    return terminal.View(
        **{"name": "trial", "first_step": 1, "total": 10, "tolerance": 0.01, "multiplier_max": 0.2}
        | changes
    )


@pytest.fixture
def block(screen, capsys):
    """What three steps leave on the screen; lambda reaches its bound in the second."""
    shown = view()
    for step in range(1, 4):
        changes = {"reward": step / 4, "delta_mean": 0.03 - 0.01 * step, "multiplier": 0.1 * step}
        shown.draw(step, VALUES | changes)
    return screen(capsys.readouterr().err)


def test_the_block_is_redrawn_in_place(block):
    assert len(block) == 5 and block[-1] == ""


def test_the_block_begins_with_the_step_and_the_speed(block):
    assert block[0].startswith("trial  step 3/10") and block[0].endswith("2,000 tokens/s")


def test_the_reward_has_a_curve_and_the_held_out_rewards(block):
    held_out = r"held-out engine 0\.250  held-out trainer 0\.375"
    assert re.fullmatch(rf"reward   0\.750 +▁▅█  {held_out}", block[1])


def test_delta_has_a_curve_and_its_place_against_the_tolerance(block):
    assert block[2].endswith("█▅▁  within 0.01")


def test_the_other_quantities_share_a_line(block):
    assert block[3] == "lambda   0.3 (at its bound)  entropy 0.500"


@pytest.mark.parametrize(
    "values, floor, says",
    [
        ({}, None, []),
        ({"skipped": 0, "saturated": 0, "truncated": 0.99}, 0.009, []),
        ({"skipped": 4}, None, ["4 updates skipped, whose loss or gradient was not finite"]),
        (
            {"saturated": 7},
            None,
            ["lambda at its bound and delta above the tolerance, 7 steps in a row"],
        ),
        (
            {},
            0.0123,
            [
                "the tolerance 0.01 is under the floor 0.012, delta of the weights that the run "
                "began with"
            ],
        ),
        (
            {"unfilled": 0.25, "refills": 3},
            None,
            ["25.0% of the prompts have no spread after 3 refills"],
        ),
        ({"verifier_failed": 1 / 64}, None, ["the verifier failed on 1.6% of the completions"]),
        ({"unfilled": 0.0, "refills": 3, "verifier_failed": 0.0}, None, []),
        ({"truncated": 1.0}, None, ["all completions cut off at rollout.max_tokens"]),
    ],
)
def test_what_asks_for_attention_is_said(values, floor, says):
    assert terminal.warnings(VALUES | values, 0.01, floor) == says
    block = view()
    block.floor = floor
    shown = [line for line in block.lines(1, VALUES | values, 120) if line.startswith("warning")]
    assert shown == [f"warning  {said}" for said in says]


def test_a_warning_that_holds_no_more_is_wiped_out(screen, capsys):
    block = view()
    block.draw(1, VALUES | {"saturated": 3, "skipped": 2})
    block.draw(2, VALUES | {"skipped": 2})
    block.draw(3, VALUES)
    lines = screen(capsys.readouterr().err)
    assert lines[0].startswith("trial  step 3/10") and not any("warning" in line for line in lines)


def test_delta_that_was_not_measured_is_neither_within_nor_above():
    lines = "\n".join(view().lines(1, VALUES | {"delta_mean": math.nan}, 99))
    assert "NOT MEASURED" in lines and "within" not in lines and "ABOVE" not in lines


def test_a_new_width_begins_a_new_block(screen, capsys, monkeypatch):
    block = view()
    block.draw(1, VALUES)
    monkeypatch.setattr(screens.shutil, "get_terminal_size", lambda: os.terminal_size((60, 24)))
    block.draw(2, VALUES)
    lines = screen(capsys.readouterr().err)
    assert lines[0].startswith("trial  step 1/10")
    assert lines[4].startswith("trial  step 2/10")


def test_held_out_rewards_have_a_line_of_their_own_on_a_narrow_terminal(monkeypatch):
    monkeypatch.setattr(screens.shutil, "get_terminal_size", lambda: os.terminal_size((60, 24)))
    lines = view().lines(1, VALUES, 59)
    assert "held-out engine 0.250  held-out trainer 0.375" in lines


@pytest.mark.parametrize("columns", [20, 40, 60, 80, 200])
def test_no_line_is_wider_than_the_terminal(columns, monkeypatch, capsys):
    monkeypatch.setattr(
        screens.shutil, "get_terminal_size", lambda: os.terminal_size((columns, 24))
    )
    monkeypatch.setenv("NO_COLOR", "1")
    block = view(name="a-long-name-of-an-experiment", total=10000)
    for step in range(1, 300):
        block.draw(step, VALUES)
    shown = re.sub(r"\x1b\[\d*[AKJ]|\r", "", capsys.readouterr().err).split("\n")
    assert max(map(len, shown)) <= max(columns - 1, 20)


@pytest.fixture
def clock(monkeypatch):
    """The seconds that `time.monotonic` returns, in a list of one."""
    seconds = [100.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: seconds[0])
    return seconds


def test_the_time_left_counts_the_steps_of_this_process_after_its_first(clock, capsys):
    block = view(first_step=5)
    block.draw(5, VALUES)  # took 2 s, compilation included; five steps are left
    clock[0] += 4
    block.draw(6, VALUES)
    clock[0] += 6
    block.draw(7, VALUES)
    left = re.findall(r"  ((?:at most )?\S+ s) left", capsys.readouterr().err)
    assert left == ["at most 10 s", "16 s", "15 s"]


def test_the_time_left_does_not_count_compilations(clock, capsys):
    with phases.told("training") as recorder:
        block = view()
        block.draw(1, VALUES)
        recorder.on_event(phases.LOWERED, 0.1, fun_name="jit(step)")
        clock[0] += 50
        recorder.on_event(phases.COMPILED, 50.0, fun_name="jit(step)")
        clock[0] += 2
        block.draw(2, VALUES)
    assert "  16 s left" in capsys.readouterr().err


def test_until_the_second_step_a_step_of_the_run_before_counts(capsys):
    last = phases.Times("trial", "1 x cpu", 60.0, 3.0, 0, {})
    with phases.told("training", last):
        view().draw(1, VALUES)
    assert "  27 s left" in capsys.readouterr().err


@pytest.mark.parametrize(
    "values, width, drawn",
    [
        ([0, 1, 2, 3, 4, 5, 6, 7], 8, "▁▂▃▄▅▆▇█"),
        ([1.0], 8, "▄"),
        ([2, 2, 2], 8, "▄▄▄"),
        ([0, math.nan, 7], 8, "▁·█"),
        ([math.nan], 8, "·"),
        ([], 8, ""),
        ([1, 2], 5, ""),
        ([0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6], 7, "▁▂▃▅▆▇█"),
    ],
)
def test_sparklines_by_hand(values, width, drawn):
    assert terminal.sparkline(values, width) == drawn


@pytest.mark.parametrize(
    "tty, term, style, fits",
    [
        (True, "xterm", Style.AUTOMATIC, True),
        (True, "dumb", Style.AUTOMATIC, False),
        (False, "xterm", Style.AUTOMATIC, False),
        (True, "xterm", Style.PLAIN, False),
        (True, "xterm", Style.QUIET, False),
    ],
)
def test_only_a_terminal_that_may_move_its_cursor_gets_the_block(
    tty, term, style, fits, monkeypatch
):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: tty)
    monkeypatch.setenv("TERM", term)
    terminal.screen.style = style
    assert terminal.screen.redraws == fits


def shown_lines(capsys, steps=3):
    block = view()
    for step in range(1, steps + 1):
        block.show(step, VALUES, evaluated=1)
    return capsys.readouterr().err.splitlines()


def test_elsewhere_a_line_comes_now_and_then(capsys):
    assert [line.split("  ")[0] for line in shown_lines(capsys)] == ["trial: step 1/10"]


def test_plain_is_a_line_a_step_without_control_characters(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    terminal.screen.style = Style.PLAIN
    lines = shown_lines(capsys)
    assert [line.split("  ")[0] for line in lines] == [f"trial: step {i}/10" for i in (1, 2, 3)]
    assert all(line.isprintable() for line in lines)


def test_quiet_shows_no_step(capsys):
    terminal.screen.style = Style.QUIET
    terminal.screen.say("warm-up")
    assert shown_lines(capsys) == [] and capsys.readouterr().out == ""


def test_a_line_tells_a_warning_that_the_line_before_did_not(capsys):
    terminal.screen.style = Style.PLAIN
    block = view()
    block.floor = 0.02
    for step in (1, 2):
        block.show(step, VALUES | {"skipped": step}, evaluated=1)
    counts = [line.count("warning: ") for line in capsys.readouterr().err.splitlines()]
    assert counts == [2, 1]


def test_colour_stops_at_no_color(monkeypatch, capsys):
    monkeypatch.delenv("NO_COLOR", raising=False)
    view().draw(1, VALUES)
    assert "\x1b[31mABOVE\x1b[0m" in capsys.readouterr().err
    monkeypatch.setenv("NO_COLOR", "1")
    view().draw(1, VALUES)
    assert "\x1b[31m" not in capsys.readouterr().err
