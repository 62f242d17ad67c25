"""What a run is doing now, and how long it took last time.

A phase is a part of the program with a name, `with phase("saving a checkpoint"):`, or a
compilation, which JAX reports. The times of a run are in `times.json` of its folder: the next run
in that folder, or in one beside it, shows them.
"""

from __future__ import annotations

import contextlib
import math
import pathlib
import statistics
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from dcmdp_jax import files
from dcmdp_jax.monitoring.screen import screen

FILE = "times.json"
SHORT = 1.0  # seconds of a phase that nobody needs to be told of
LOWERED = "/jax/core/compile/jaxpr_to_mlir_module_duration"  # events: XLA compiles after this one
COMPILED = "/jax/core/compile/backend_compile_duration"  # and until this one
# What the programs do that take long to compile, by the functions that JAX names.
PROGRAMS = {
    "one_pass_step": "the step",
    "constrained_step": "the step",
    "_take_steps": "the warm-up",
    "take_step": "the warm-up",
    "prefill": "prefill",
    "_generate_packed": "decode",
    "_convert": "the weight sync",
    "_feed": "replay",
    "_measure": "scoring",
    "_packed_logp": "scoring",
    "score_blocks": "scoring",
    "hidden": "scoring",
    "block": "scoring",
}
OTHER = "another program"
RECORDED = {
    "experiment": files.STRING,
    "devices": files.STRING,
    "before_steps": files.NUMBER,
    "a_step": files.NUMBER,
    "warmup_steps": files.NUMBER,
    "phases": files.OBJECT,
}


class Times(NamedTuple):
    """How long a run took, in seconds."""

    experiment: str  # its name
    devices: str  # their number and kind
    before_steps: float  # until the first step was taken, that step included
    a_step: float  # the median of the further ones that compiled nothing
    warmup_steps: int  # that this run took, 0 where it went on from a checkpoint
    phases: dict[str, float]  # of each phase the last one, without those inside of it; of a
    # function's compilations the longest

    def estimate(self, steps: int, warmup_steps: int) -> float:
        """Returns the seconds that a new run of so many steps takes: without its warm-up if the run
        before had none.
        """
        warmup = self.phases.get("warming up", 0.0)
        start = self.before_steps - warmup
        if self.warmup_steps:
            start += warmup * warmup_steps / self.warmup_steps
        return start + max(steps - 1, 0) * self.a_step


@dataclass
class _Open:
    """A phase that has not ended."""

    name: str
    began: float
    inside: float = 0.0  # seconds of the phases inside of it that have ended
    compiles: bool = False


@dataclass
class Recorder:
    """The phases of a run. Those of other threads than the one that made it do not count."""

    last: Times | None = None  # of the run before
    seconds: dict[str, float] = field(default_factory=dict)
    compiled: float = 0.0  # seconds of all compilations
    open: list[_Open] = field(default_factory=list)
    began: float = field(default_factory=lambda: time.monotonic())
    before_steps: float = 0.0  # seconds until the first step was taken
    steps: list[float] = field(default_factory=list)  # seconds of the others that compiled nothing
    step_ended: float | None = None  # when the last one was taken
    step_compiled: float = 0.0  # `compiled` then
    warmup_steps: int = 0
    warmup_first: tuple[int, float] = (0, 0.0)  # the steps that compiled, when they had been taken
    thread: int = field(default_factory=threading.get_ident)

    def begin(self, name: str, compiles: bool = False) -> int:
        """Begins a phase and returns what `end` takes."""
        now = time.monotonic()
        self.open.append(_Open(name, now, compiles=compiles))
        return len(self.open) - 1

    def end(self, depth: int) -> None:
        """Ends a phase, and those inside of it that an exception has left."""
        now = time.monotonic()
        ended = self.open[depth]
        del self.open[depth:]
        elapsed = now - ended.began
        own = elapsed - ended.inside
        if ended.compiles:  # once for each shape of the arguments
            own = max(own, self.seconds.get(ended.name, 0.0))
            self.compiled += elapsed
        self.seconds[ended.name] = own
        if self.open:
            self.open[-1].inside += elapsed

    def on_event(self, event: str, seconds: float, fun_name: str = "", **others: Any) -> None:
        """Follows the compilations that JAX reports."""
        if threading.get_ident() != self.thread or not self.open:
            return
        if self.open[-1].compiles and event in (LOWERED, COMPILED):
            self.end(len(self.open) - 1)
        if event == LOWERED:
            program = PROGRAMS.get(fun_name.removeprefix("jit(").removesuffix(")"), OTHER)
            self.begin(f"compiling {program}", True)

    def note_step(self) -> None:
        """To be called after each step."""
        now = time.monotonic()
        if self.step_ended is None:
            self.before_steps = now - self.began
        elif self.compiled == self.step_compiled:
            self.steps.append(now - self.step_ended)
        self.step_ended = now
        self.step_compiled = self.compiled

    def note_warmup(self, steps: int, left: int) -> str:
        """To be called after `steps` steps of the warm-up; returns the time that the `left` others
        take, "" if there is none, and after the first, which compile.
        """
        now = time.monotonic() - self.compiled
        if not self.warmup_steps:
            self.warmup_first = (steps, now)
        self.warmup_steps += steps
        first, began = self.warmup_first
        done = self.warmup_steps - first
        return f"  {clock((now - began) / done * left)} left" if done and left else ""

    def doing(self) -> str:
        """Returns what the run is doing, how long it has and how long it took in the run before; ""
        if it has just begun to do it.
        """
        current = self.open[-1]
        elapsed = time.monotonic() - current.began - current.inside
        if elapsed < SHORT:
            return ""
        before = self.last.phases.get(current.name) if self.last else None
        took = "" if before is None else f", {clock(before)} last time"
        return f"{current.name}: {clock(elapsed)} so far{took}"


_recorder: Recorder | None = None  # of the run that this process is in


@contextlib.contextmanager
def phase(name: str) -> Iterator[None]:
    """A part of the program that may take long; also a decorator of a function that is one."""
    recorder = _recorder
    if recorder is None or threading.get_ident() != recorder.thread:
        yield
        return
    depth = recorder.begin(name)
    try:
        yield
    finally:
        recorder.end(depth)


@contextlib.contextmanager
def told(doing: str, last: Times | None = None) -> Iterator[Recorder]:
    """A block of the program in which a thread tells what takes long.

    Args:
        doing: what takes long where no other phase has begun.
        last: times of the run before.
    """
    global _recorder
    import jax.monitoring

    previous = _recorder
    _recorder = recorder = Recorder(last)
    recorder.begin(doing)
    jax.monitoring.register_event_duration_secs_listener(recorder.on_event)
    try:
        with screen.opened(recorder.doing):
            yield recorder
    finally:
        jax.monitoring.unregister_event_duration_listener(recorder.on_event)
        _recorder = previous


@contextlib.contextmanager
def of_run(workdir: pathlib.Path, name: str, mesh: Any) -> Iterator[None]:
    """A run, of which process 0 tells what takes long; its times are in `workdir` in the end.

    Args:
        name: of the experiment.
        mesh: the jax.sharding.Mesh that trains.
    """
    import jax

    if jax.process_index() != 0:
        yield
        return
    devices = devices_of(mesh)
    last = read(workdir, name, devices)
    said = f"{name} on {devices}"
    if last:
        said += f"; last time a step took {clock(last.a_step)}"
    screen.line(said)
    with told("training", last) as recorder:
        try:
            yield
        finally:
            try:
                write(workdir, name, devices, recorder)
            except OSError as error:  # of no consequence beside what ends the run
                screen.line(f"{workdir / FILE} is not written: {error}")


def devices_of(mesh: Any) -> str:
    """Returns number and kind of the devices of a mesh."""
    devices = mesh.devices.reshape(-1)
    return f"{len(devices)} x {devices[0].device_kind}"


def note_step() -> None:
    """To be called after each step."""
    if _recorder:
        _recorder.note_step()


def note_warmup(steps: int, left: int) -> str:
    """See `Recorder.note_warmup`; "" where nothing is recorded."""
    return _recorder.note_warmup(steps, left) if _recorder else ""


def compiled_seconds() -> float:
    """Returns how long the run has compiled."""
    return _recorder.compiled if _recorder else 0.0


def step_before() -> float | None:
    """Returns the seconds that a step took in the run before, if they are known."""
    return _recorder.last.a_step if _recorder and _recorder.last else None


def read(workdir: pathlib.Path, experiment: str, devices: str) -> Times | None:
    """Returns the times of the run that ended last in `workdir` or in a folder beside it, if it is
    of this experiment on these devices. A file that cannot be read is none.
    """
    found = []
    for path in workdir.absolute().parent.glob(f"*/{FILE}"):
        with contextlib.suppress(OSError, ValueError):
            record = files.read_json_object(path)
            files.check_fields(record, RECORDED, str(path))
            numbers = dict.fromkeys(record["phases"], files.NUMBER)
            files.check_fields(record["phases"], numbers, str(path))
            found.append((path.stat().st_mtime, Times(**{key: record[key] for key in RECORDED})))
    same = [item for item in found if item[1][:2] == (experiment, devices)]
    return max(same, key=lambda item: item[0])[1] if same else None


def write(workdir: pathlib.Path, experiment: str, devices: str, recorder: Recorder) -> None:
    """Writes the times of a run if a step after its first one compiled nothing."""
    if not recorder.steps:
        return
    record = Times(
        experiment,
        devices,
        recorder.before_steps,
        statistics.median(recorder.steps),
        recorder.warmup_steps,
        {name: round(seconds, 2) for name, seconds in recorder.seconds.items()},
    )
    files.write_json(workdir / FILE, record._asdict())


def clock(seconds: float) -> str:
    """Returns seconds as "12 s", from a minute on as "1:05" or "2:00:00"; "?" if not finite."""
    if not math.isfinite(seconds):
        return "?"
    if round(seconds) < 60:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
