"""A run's steps on stderr: a block of lines that is redrawn in place, or a line now and then."""

from __future__ import annotations

import math
import os
import sys
import textwrap
import time
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from dcmdp_jax.monitoring import phases, quantities
from dcmdp_jax.monitoring.screen import Style, columns, screen


class _LossyStream:
    """A stream that raises nothing if its reader is gone or its disk is full; what is written from
    then on is lost.
    """

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        """Writes the text and returns its length, as `TextIO.write` does."""
        try:
            return self._stream.write(text)
        except OSError:
            self._discard()
            return len(text)

    def flush(self) -> None:
        """Flushes the stream."""
        try:
            self._stream.flush()
        except OSError:
            self._discard()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _discard(self) -> None:
        """Redirects the stream, with what is still in its buffer, to nowhere."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)


def ignore_broken_streams() -> None:
    """Lets the process go on if stdout or stderr is closed, or is on a full disk."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, _LossyStream):
            setattr(sys, name, _LossyStream(stream))


SECONDS_BETWEEN_LINES = 5.0  # so that the logs of batch jobs stay short
BLOCKS = "▁▂▃▄▅▆▇█"
CURVE = 30  # columns of a sparkline, if the terminal is wide enough
SHORTEST_CURVE = 6
LABEL = 21  # columns of a row before its sparkline, and the blanks after it


class View:
    """A run's progress: a block of lines on a terminal, which stays when the run ends; else a line
    at the first step, at the last, and every five seconds, or at each step if it is to be plain.
    """

    def __init__(
        self,
        name: str,
        first_step: int,
        total: int,
        tolerance: float | None,  # None: set before the first step is shown
        multiplier_max: float | None,
    ):
        self._name = name
        self._total = total
        self.tolerance = tolerance
        self._bound = multiplier_max
        self._before = first_step - 1  # steps of earlier processes
        self._began: float | None = None  # when this process had taken its first step
        self._compiled = 0.0  # `phases.compiled_seconds()` then
        self.floor: float | None = None  # see `metrics.floor_lower_bound`
        self._evaluated = 0  # step of the last evaluation, which is shown until the next
        self._rewards: list[float] = []
        self._deltas: list[float] = []
        self._last_line = -math.inf  # when it was printed
        self._told: list[str] = []  # warnings of that line

    def show(self, step: int, values: Mapping[str, Any], evaluated: int) -> None:
        """Shows the values of a step: draws the block, or prints a line if one is due.

        Those of an evaluation are of step `evaluated`.
        """
        self._evaluated = evaluated
        if screen.redraws:
            self.draw(step, values)
            return
        now = time.monotonic()
        left = self._left(step, values)
        is_due = step == self._total or now - self._last_line >= SECONDS_BETWEEN_LINES
        if is_due or screen.style is Style.PLAIN:
            held_out = self._measured_before(step)
            line = status(values, self.tolerance, self.floor, held_out, left, self._told)
            self._told = warnings(values, self.tolerance, self.floor)
            screen.line(f"{self._name}: step {step}/{self._total}  {line}")
            self._last_line = now

    def draw(self, step: int, values: Mapping[str, Any]) -> None:
        """Draws the block with the values of a step over that of the step before."""
        self._rewards.append(values.get("reward", math.nan))
        self._deltas.append(values.get("delta_mean", math.nan))
        screen.draw(self.lines(step, values, columns()))

    def lines(self, step: int, values: Mapping[str, Any], width: int) -> list[str]:
        """Returns the block's text, without colour. A line may be longer than `width`: what matters
        most stands first in it.
        """
        shown = [quantity for quantity in quantities.headline() if quantity.key in values]
        text = {quantity.key: quantity.format.format(values[quantity.key]) for quantity in shown}
        held_out = "  ".join(
            f"{quantity.name} {text[quantity.key]}"
            for quantity in shown
            if quantity.key in (quantities.HELD_OUT_ENGINE, quantities.HELD_OUT_TRAINER)
        )
        if held_out:
            held_out += self._measured_before(step)
        has_room = width >= len(held_out) + LABEL + SHORTEST_CURVE
        curve = min(CURVE, width - LABEL - (len(held_out) if has_room else 0))
        lines = [self._progress(step, values, width)]
        if "reward" in text:
            note = held_out if has_room else ""
            lines.append(_row("reward", text["reward"], sparkline(self._rewards, curve), note))
        if "delta_mean" in text:
            note = self._against_tolerance(values["delta_mean"])
            lines.append(_row("delta", text["delta_mean"], sparkline(self._deltas, curve), note))
        if held_out and not has_room:
            lines.append(held_out)
        rest = []
        for quantity in shown:
            if quantity.key == "multiplier":
                bound = self._bound_note(values["multiplier"])
                rest.append(f"{quantity.name:<7}  {text[quantity.key]}{bound}")
            elif quantity.key not in ("reward", "delta_mean", *dict(quantities.HELD_OUT)):
                rest.append(f"{quantity.name} {text[quantity.key]}")
        lines += _rows(rest, width)
        for alarm in warnings(values, self.tolerance, self.floor):
            lines += textwrap.wrap(f"warning  {alarm}", width, subsequent_indent=" " * 9)
        return lines

    def _measured_before(self, step: int) -> str:
        """Names the step of the last evaluation, if it was not this one."""
        return f" (step {self._evaluated})" if 0 < self._evaluated < step else ""

    def _left(self, step: int, values: Mapping[str, Any]) -> str:
        """Returns the time left, "" after the last step.

        That of the steps after this process's first one counts, without compilations; until there
        is one, a step of the run before, or the first one, which compiles.
        """
        steps = self._total - step
        now = time.monotonic()
        compiled = phases.compiled_seconds()
        if self._began is None:
            self._began = now
            self._compiled = compiled
        if not steps:
            return ""
        done = step - self._before - 1
        if done:
            seconds = (now - self._began - (compiled - self._compiled)) / done * steps
            return f"{phases.clock(seconds)} left"
        before = phases.step_before()
        if before is None:
            return f"at most {phases.clock(values.get('seconds', math.nan) * steps)} left"
        return f"{phases.clock(before * steps)} left"

    def _progress(self, step: int, values: Mapping[str, Any], width: int) -> str:
        """The block's first line: the step, a bar, the time left, and the speed."""
        speed = ""
        if values.get("seconds") and "tokens" in values:
            speed = f"{values['tokens'] / values['seconds']:,.0f} tokens/s"
        bar = max(min(width - 60, 30), 0)
        full = bar * step // max(self._total, 1)
        drawn = "━" * full + "╌" * (bar - full) if bar >= 6 else ""
        left = self._left(step, values)
        return "  ".join(
            part for part in (self._name, f"step {step}/{self._total}", drawn, left, speed) if part
        )

    def _against_tolerance(self, delta: float) -> str:
        if not math.isfinite(delta):
            return "NOT MEASURED"
        return f"{'within' if delta <= self.tolerance else 'ABOVE'} {self.tolerance:g}"

    def _bound_note(self, multiplier: float) -> str:
        if self._bound is None or not math.isfinite(self._bound):
            return ""
        # the run clips in float32
        reached = multiplier >= self._bound * (1 - 1e-6)
        return " (at its bound)" if reached else f" of {self._bound:g}"


def status(
    values: Mapping[str, Any],
    tolerance: float,
    floor: float | None = None,
    held_out: str = "",
    left: str = "",
    told: Sequence[str] = (),
) -> str:
    """Returns the headline quantities of `values` in one line, with speed, time left and warnings;
    `held_out` follows those of an evaluation. Warnings of `told` are left out.
    """
    parts = []
    for quantity in quantities.headline():
        if quantity.key in values:
            note = f" (tolerance {tolerance:g})" if quantity.key == "delta_mean" else ""
            if quantity.key in (quantities.HELD_OUT_ENGINE, quantities.HELD_OUT_TRAINER):
                note = held_out
            parts.append(f"{quantity.name} {quantity.format.format(values[quantity.key])}{note}")
    if values.get("seconds", 0) > 0 and "tokens" in values:
        parts.append(f"{values['tokens'] / values['seconds']:,.0f} tokens/s")
    parts += [left] if left else []
    alarms = warnings(values, tolerance, floor)
    parts += [f"warning: {alarm}" for alarm in alarms if alarm not in told]
    return "  ".join(parts)


def warnings(values: Mapping[str, Any], tolerance: float, floor: float | None) -> list[str]:
    """Returns what a reader of a step's values must know; `floor`: `metrics.floor_lower_bound`."""
    alarms = []
    if skipped := values.get("skipped", 0):
        alarms.append(f"{skipped} updates skipped, whose loss or gradient was not finite")
    if saturated := values.get("saturated", 0):
        alarms.append(
            f"lambda at its bound and delta above the tolerance, {saturated} steps in a row"
        )
    if floor is not None and tolerance < floor:
        alarms.append(
            f"the tolerance {tolerance:g} is under the floor {floor:.2g}, delta of the "
            "weights that the run began with"
        )
    if unfilled := values.get("unfilled", 0):
        alarms.append(
            f"{unfilled:.1%} of the prompts have no spread after {values['refills']} refills"
        )
    if failed := values.get("verifier_failed", 0):
        alarms.append(f"the verifier failed on {failed:.1%} of the completions")
    if values.get("truncated") == 1:
        alarms.append("all completions cut off at rollout.max_tokens")
    return alarms


def sparkline(values: list[float], width: int) -> str:
    """Returns the values as at most `width` blocks, scaled from the least to the largest; means if
    there are more values, dots for gaps.
    """
    if width < SHORTEST_CURVE or not values:
        return ""
    count = min(width, len(values))
    means = []
    for i in range(count):
        part = values[len(values) * i // count : len(values) * (i + 1) // count]
        part = [value for value in part if math.isfinite(value)]
        means.append(sum(part) / len(part) if part else math.nan)
    finite = [value for value in means if math.isfinite(value)]
    low = min(finite, default=0.0)
    span = max(finite, default=0.0) - low
    return "".join(
        "·" if math.isnan(value) else BLOCKS[round((value - low) / span * 7) if span else 3]
        for value in means
    )


def _rows(parts: Sequence[str], width: int) -> list[str]:
    """Returns the parts in as few lines as they fit in."""
    lines: list[str] = []
    for part in parts:
        if lines and len(lines[-1]) + 2 + len(part) <= width:
            lines[-1] += f"  {part}"
        else:
            lines.append(part)
    return lines


def _row(name: str, value: str, curve: str, note: str) -> str:
    return "  ".join(part for part in (f"{name:<7}", f"{value:<8}", curve, note) if part)
