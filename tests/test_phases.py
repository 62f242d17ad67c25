"""What a run is told to be doing, since when, and how long it took last time."""

import functools
import io
import json
import pathlib
import re
import sys
import threading
import time

import jax
import jax.numpy as jnp
import pytest

from dcmdp_jax import sharding
from dcmdp_jax.monitoring import phases, screen
from dcmdp_jax.monitoring.phases import Times, phase

DAMAGED = json.dumps(Times("trial", "1 x cpu", 60.0, 3.0, 0, {"sampling": "long"})._asdict())
LAST = Times("trial", "1 x cpu", 60.0, 3.0, 0, {"sampling": 4.0})
PACKAGE = pathlib.Path(phases.__file__).parents[1]


@pytest.fixture
def clock(monkeypatch):
    """The seconds that `time.monotonic` returns, in a list of one."""
    seconds = [100.0]
    monkeypatch.setattr(phases.time, "monotonic", lambda: seconds[0])
    return seconds


def test_a_phase_is_named_with_its_time_and_that_of_the_run_before(clock):
    with phases.told("training", LAST) as recorder, phase("sampling"):
        clock[0] += 12
        assert recorder.doing() == "sampling: 12 s so far, 4.0 s last time"


def test_the_last_time_is_of_the_run_before_alone(clock):
    with phases.told("training") as recorder:
        with phase("sampling"):
            clock[0] += 7
        with phase("sampling"):
            clock[0] += 2
            assert recorder.doing() == "sampling: 2.0 s so far"


def test_what_has_just_begun_is_not_named(clock):
    with phases.told("training") as recorder, phase("sampling"):
        clock[0] += 0.5
        assert recorder.doing() == ""


def test_a_phase_does_not_count_those_inside_of_it(clock):
    with phases.told("training") as recorder, phase("evaluating"):
        clock[0] += 3
        with phase("sampling"):
            clock[0] += 5
    assert recorder.seconds["evaluating"] == 3 and recorder.seconds["sampling"] == 5


def test_an_exception_ends_the_phases_that_it_leaves(clock):
    with phases.told("training") as recorder:
        with pytest.raises(ValueError), phase("evaluating"):
            recorder.on_event(phases.LOWERED, 0.0, fun_name="jit(step)")
            raise ValueError
        clock[0] += 2
        assert recorder.doing() == "training: 2.0 s so far"


def test_other_threads_have_no_phases():
    with phases.told("training") as recorder:
        thread = threading.Thread(target=phase("verifying").__enter__)
        thread.start()
        thread.join()
        assert [opened.name for opened in recorder.open] == ["training"]


def test_a_compilation_is_a_phase_of_what_the_program_does():
    def one_pass_step(x):
        return x * 2

    with phases.told("training") as recorder:
        jax.jit(one_pass_step)(jnp.ones(3))
    assert recorder.seconds["compiling the step"] > 0
    assert recorder.compiled >= recorder.seconds["compiling the step"]


def test_a_step_with_a_mesh_keeps_its_name():
    mesh = jax.sharding.Mesh(jax.devices()[:1], ("data",))

    def one_pass_step(x, *, by):
        return x * by

    with phases.told("training") as recorder:
        jax.jit(sharding.with_mesh(mesh, functools.partial(one_pass_step, by=2)))(jnp.ones(3))
    assert recorder.seconds["compiling the step"] > 0


def test_each_program_that_has_a_name_is_a_function():
    text = "".join(path.read_text() for path in PACKAGE.rglob("*.py"))
    assert phases.PROGRAMS.keys() <= set(re.findall(r"def (\w+)\(", text))


def test_of_several_compilations_the_longest_is_kept(clock):
    with phases.told("training") as recorder:
        for seconds in (5, 2):
            recorder.on_event(phases.LOWERED, 0.0, fun_name="jit(prefill)")
            clock[0] += seconds
            recorder.on_event(phases.COMPILED, 0.0, fun_name="jit(prefill)")
    assert recorder.seconds["compiling prefill"] == 5 and recorder.compiled == 7


def test_nothing_listens_after_the_run():
    with phases.told("training") as recorder:
        pass
    before = dict(recorder.seconds)
    jax.jit(lambda x: x + 3)(jnp.ones(4))
    assert recorder.seconds == before


def test_no_thread_outlives_the_run():
    before = threading.active_count()
    with phases.told("training"):
        assert threading.active_count() == before + 1
    assert threading.active_count() == before


def recorded(clock, steps=3):
    with phases.told("training") as recorder:
        with phase("sampling"):
            clock[0] += 10
        for _ in range(steps):
            phases.note_step()
            clock[0] += 2
    return recorder


def test_the_next_run_in_the_folder_reads_the_times(tmp_path, clock):
    phases.write(tmp_path / "a", "trial", "1 x cpu", recorded(clock))
    expected = Times("trial", "1 x cpu", 10.0, 2.0, 0, {"sampling": 10.0})
    assert phases.read(tmp_path / "a", "trial", "1 x cpu") == expected


def test_a_run_in_a_folder_beside_it_reads_them_too(tmp_path, clock):
    phases.write(tmp_path / "a", "trial", "1 x cpu", recorded(clock))
    assert phases.read(tmp_path / "b", "trial", "1 x cpu").a_step == 2


@pytest.mark.parametrize("experiment, devices", [("other", "1 x cpu"), ("trial", "8 x TPU v5e")])
def test_times_of_another_experiment_or_other_devices_are_not_read(
    tmp_path, clock, experiment, devices
):
    phases.write(tmp_path / "a", "trial", "1 x cpu", recorded(clock))
    assert phases.read(tmp_path / "a", experiment, devices) is None


@pytest.mark.parametrize("text", ["", "[]", "{}", DAMAGED])
def test_a_damaged_file_is_none(tmp_path, text):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / phases.FILE).write_text(text)
    assert phases.read(tmp_path / "a", "trial", "1 x cpu") is None


def test_a_single_step_leaves_no_times(tmp_path, clock):
    phases.write(tmp_path / "a", "trial", "1 x cpu", recorded(clock, steps=1))
    assert not (tmp_path / "a").exists()


def test_a_step_that_compiles_does_not_count(tmp_path, clock):
    with phases.told("training") as recorder:
        phases.note_step()
        for compiling, seconds in ((8, 3), (0, 1), (0, 2), (0, 9)):
            if compiling:
                recorder.on_event(phases.LOWERED, 0.0, fun_name="jit(one_pass_step)")
                clock[0] += compiling
                recorder.on_event(phases.COMPILED, 0.0, fun_name="jit(one_pass_step)")
            clock[0] += seconds
            phases.note_step()
    phases.write(tmp_path / "a", "trial", "1 x cpu", recorder)
    assert phases.read(tmp_path / "a", "trial", "1 x cpu").a_step == 2


def test_a_run_whose_steps_all_compiled_leaves_the_times_that_there_are(tmp_path, clock):
    phases.write(tmp_path / "a", "trial", "1 x cpu", recorded(clock))
    with phases.told("training") as recorder:
        phases.note_step()
        recorder.on_event(phases.LOWERED, 0.0, fun_name="jit(one_pass_step)")
        clock[0] += 8
        recorder.on_event(phases.COMPILED, 0.0, fun_name="jit(one_pass_step)")
        phases.note_step()
    phases.write(tmp_path / "a", "trial", "1 x cpu", recorder)
    assert phases.read(tmp_path / "a", "trial", "1 x cpu").a_step == 2


def test_the_time_left_of_a_warmup_leaves_compilations_out(clock):
    """50 steps in 10 s after the first 50, beside 7 s of compilation; 100 are left."""
    with phases.told("training") as recorder:
        clock[0] += 99
        assert phases.note_warmup(50, 150) == ""
        recorder.on_event(phases.LOWERED, 0.0, fun_name="jit(take_step)")
        clock[0] += 7
        recorder.on_event(phases.COMPILED, 0.0, fun_name="jit(take_step)")
        clock[0] += 10
        assert phases.note_warmup(50, 100) == "  20 s left"
        clock[0] += 20
        assert phases.note_warmup(50, 50) == "  15 s left"
        assert phases.note_warmup(50, 0) == ""
    assert phases.note_warmup(50, 100) == ""


def test_an_estimate_scales_the_warmup_by_its_steps():
    before = Times("trial", "1 x cpu", 60.0, 3.0, 100, {"warming up": 40.0})
    assert before.estimate(11, 300) == 20 + 3 * 40 + 10 * 3


def test_the_estimate_from_a_run_without_a_warmup_leaves_it_out():
    assert LAST.estimate(11, 300) == 60 + 10 * 3


@pytest.mark.parametrize(
    "seconds, shown",
    [
        (0.04, "0.0 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (59.4, "59 s"),
        (59.6, "1:00"),
        (3661, "1:01:01"),
        (float("nan"), "?"),
    ],
)
def test_clocks_by_hand(seconds, shown):
    assert phases.clock(seconds) == shown


@pytest.fixture
def quick(monkeypatch):
    """A screen that looks at the clock without pause."""
    monkeypatch.setattr(screen, "TICK", 0.001)
    return screen.Screen()


def wait_for(condition):
    while not condition():
        time.sleep(0.001)


def test_silence_ends_with_what_the_run_is_doing(quick, monkeypatch):
    monkeypatch.setattr(screen, "SILENCE", 0.0)
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    with quick.opened(lambda: "sampling: 12 s so far"):
        wait_for(stream.getvalue)
    assert stream.getvalue().startswith("sampling: 12 s so far\n")


def test_what_is_said_in_time_is_no_silence(quick, monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    looks = []
    with quick.opened(lambda: looks.append(1) or "sampling"):
        wait_for(lambda: len(looks) > 5)
    assert stream.getvalue() == ""


class Terminal(io.StringIO):
    """A stream that is a terminal."""

    def isatty(self):
        """True."""
        return True


def test_what_the_program_prints_stands_above_the_block(quick, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(screen, "TICK", 60.0)
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    with quick.opened(lambda: ""):
        quick.draw(["first", "second"])
        print("from a verifier", file=sys.stderr)
        quick.draw(["first", "third"])
    block = "\x1b[2Kfirst\n\x1b[2K{}\n\x1b[J"
    begin = "\r" + block.format("second")
    assert stream.getvalue() == (
        begin
        + "\r\x1b[2A\x1b[Jfrom a verifier\n\r"
        + block.format("third")
        + "\r\x1b[2A"
        + block.format("third")
    )


def test_a_block_waits_for_the_end_of_a_line(quick, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    looks = []
    with quick.opened(lambda: looks.append(1) or "sampling"):
        wait_for(lambda: "sampling" in stream.getvalue())
        print("50 %", end="", file=sys.stderr)
        drawn = len(stream.getvalue())
        seen = len(looks)
        wait_for(lambda: len(looks) > seen + 5)
        assert len(stream.getvalue()) == drawn


def test_the_streams_are_put_back(quick, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    with pytest.raises(KeyError), quick.opened(lambda: ""):
        assert sys.stderr is not stream
        raise KeyError
    assert sys.stderr is stream


def test_a_forked_child_can_print_while_the_lock_is_held(quick, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(screen, "TICK", 60.0)  # no frame of the thread in between
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    with quick.opened(lambda: ""):
        quick.draw(["first"])
        before = stream.getvalue()
        holder = threading.Event()
        done = threading.Event()

        def hold():
            with quick._lock:
                holder.set()
                done.wait()

        thread = threading.Thread(target=hold)
        thread.start()
        holder.wait()
        quick.forget()  # as in the child
        print("from the child", file=sys.stderr)
        done.set()
        thread.join()
    assert stream.getvalue().startswith(before + "from the child\n")
