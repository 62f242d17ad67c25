"""The log: what is written can be read back, a resumed file equals an uninterrupted one, one
process writes.
"""

import json
import math
import re
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcmdp_jax import constraint, files, losses
from dcmdp_jax.config import (
    AlgorithmConfig,
    Config,
    ConstraintConfig,
    DataConfig,
    ModelSource,
    RolloutConfig,
)
from dcmdp_jax.monitoring import metrics, terminal


def make_config(steps=10, **fields):
    algorithm = AlgorithmConfig(
        losses.advantages.grpo,
        losses.corrections.decoupled(losses.policy.clipped),
        losses.reduce.token_mean,
    )
    dual = ConstraintConfig(constraint.shape_advantage, constraint.projected_ascent, tolerance=0.01)
    data = DataConfig(verifier=max, task=object())
    return Config("trial", ModelSource(), data, RolloutConfig(), algorithm, dual, steps, **fields)


def values(step):
    return {
        "reward": np.float32(step / 7),
        "delta_mean": 0.01 + step / 1000,
        "multiplier": 0.1,
        "entropy": 0.5,
        "seconds": 2.0,
        "tokens": 100 * step,
    }


def fill(workdir, steps, first_step=1):
    with metrics.Log(workdir, make_config(), first_step=first_step) as log:
        for step in steps:
            log.write(step, values(step))


@pytest.fixture
def written(tmp_path):
    """The row of a step whose values are Python's, NumPy's and JAX's, read before the log closes: a
    killed run keeps its rows.
    """
    more = {"loss": jnp.float32(0.25), "skipped": jnp.int32(3), "k3": jnp.bfloat16(1.5)}
    with metrics.Log(tmp_path / "new", make_config()) as log:
        log.write(1, values(1) | more)
        (row,) = metrics.read(tmp_path / "new")
    return row


def test_a_row_holds_what_was_written(written):
    more = {"reward": float(np.float32(1 / 7)), "loss": 0.25, "skipped": 3, "k3": 1.5}
    assert written == {"step": 1, **values(1), **more}


def test_a_row_begins_with_its_step(written):
    assert next(iter(written)) == "step"


def test_integers_stay_integers(written):
    types = [type(written[key]) for key in ("tokens", "skipped", "seconds")]
    assert types == [int, int, float]


def test_values_that_are_not_finite_are_null_and_named(tmp_path):
    with metrics.Log(tmp_path, make_config()) as log:
        log.write(
            1, {"reward": 1.0, "loss": math.nan, "grad_norm": np.float32(np.inf), "low": -math.inf}
        )

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    row = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert row == {
        "step": 1,
        "reward": 1.0,
        "loss": None,
        "grad_norm": None,
        "low": None,
        "non_finite": {"loss": "nan", "grad_norm": "inf", "low": "-inf"},
    }


@pytest.mark.parametrize("bad", [{"reward": np.zeros(3)}, {"reward": "high"}, {"reward": None}])
def test_a_value_that_is_not_one_number_is_refused_by_name(tmp_path, bad):
    message = "'reward' must be one number"
    with metrics.Log(tmp_path, make_config()) as log, pytest.raises(ValueError, match=message):
        log.write(1, bad)
    assert metrics.read(tmp_path) == []


@pytest.mark.parametrize("name", ["step", "non_finite"])
def test_a_name_that_the_log_uses_itself_is_refused(tmp_path, name):
    message = "'step' and 'non_finite'"
    with metrics.Log(tmp_path, make_config()) as log, pytest.raises(ValueError, match=message):
        log.write(1, {name: 1})


@pytest.mark.parametrize("torn", ["", '{"step": 8, "rew', '{"step": 8', "{", "\0\0\0\0", "\u00e9"])
def test_a_resumed_file_equals_an_uninterrupted_one(tmp_path, torn):
    fill(tmp_path / "whole", range(1, 11))
    fill(tmp_path / "killed", range(1, 8))
    with open(tmp_path / "killed" / "metrics.jsonl", "a") as file:
        file.write(torn)
    assert [row["step"] for row in metrics.read(tmp_path / "killed")] == list(range(1, 8))
    # the last checkpoint was taken after step 4
    fill(tmp_path / "killed", range(5, 11), first_step=5)
    assert (tmp_path / "killed" / "metrics.jsonl").read_bytes() == (
        tmp_path / "whole" / "metrics.jsonl"
    ).read_bytes()


def test_every_cut_of_the_file_reads_as_its_whole_lines(tmp_path):
    fill(tmp_path, (1, 2, 3))
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    rows = metrics.read(tmp_path)
    ends = [i for i, byte in enumerate(whole) if byte == ord("\n")]
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        assert metrics.read(tmp_path) == rows[: sum(cut >= end for end in ends)], cut


def test_truncating_leaves_the_rows_up_to_the_step(tmp_path):
    fill(tmp_path, range(1, 5))
    before = (tmp_path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    metrics.truncate(tmp_path, 2)
    assert (tmp_path / "metrics.jsonl").read_bytes() == b"".join(before[:2])
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_truncating_keeps_the_old_file_if_it_crashes(tmp_path, monkeypatch):
    fill(tmp_path, range(1, 5))
    before = (tmp_path / "metrics.jsonl").read_bytes()

    def crash(*_):
        raise OSError("power cut")

    monkeypatch.setattr(files.os, "replace", crash)
    with pytest.raises(OSError, match="power cut"):
        metrics.truncate(tmp_path, 2)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_truncating_no_file_is_nothing(tmp_path):
    metrics.truncate(tmp_path, 3)
    assert not list(tmp_path.iterdir())


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"metrics\.jsonl does not exist"):
        metrics.read(tmp_path)


@pytest.mark.parametrize("line", ["half a row", "[1]", '{"reward": 1}', '{"step": "two"}'])
def test_a_damaged_line_is_named(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
    with pytest.raises(ValueError, match="line 2 is not a row"):
        metrics.read(tmp_path)


def test_only_process_0_writes(tmp_path, monkeypatch, capsys):
    fill(tmp_path, (1, 2, 3))
    before = (tmp_path / "metrics.jsonl").read_bytes()
    capsys.readouterr()
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    fill(tmp_path, (1,))
    metrics.truncate(tmp_path, 0)
    fill(tmp_path / "absent", (1,))
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    assert not (tmp_path / "absent").exists() and capsys.readouterr().err == ""


def test_status_lines_are_few_and_say_what_matters(tmp_path, monkeypatch, capsys):
    seconds = [0.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: seconds[0])
    with metrics.Log(tmp_path, make_config(steps=40)) as log:
        for step in range(1, 41):
            held_out = {"reward_eval_infer": 0.25, "reward_eval_train": 0.375} if step == 1 else {}
            log.write(step, values(step) | held_out)
            seconds[0] += 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 9  # one each five seconds, and the last
    assert lines[0].startswith("trial: step 1/40  ") and lines[-1].startswith("trial: step 40/40  ")
    assert "held-out engine 0.250  held-out trainer 0.375  " in lines[0]
    assert lines[-1].split("  ")[1:] == [
        "reward 5.714",
        "held-out engine 0.250 (step 1)",
        "held-out trainer 0.375 (step 1)",
        "delta 0.05 (tolerance 0.01)",
        "lambda 0.1",
        "entropy 0.500",
        "2,000 tokens/s",
    ]
    assert lines[-2].endswith("1,800 tokens/s  4.0 s left")


FIRST = values(1) | {"delta_mean": 0.05, "prob_diff_std": 0.1, "tokens": 100}


def test_the_floor_is_at_least_three_standard_errors_below_the_first_delta():
    """0.05 - 3 * 0.1 / sqrt(100)."""
    assert metrics.floor_lower_bound({"step": 1, **FIRST}) == pytest.approx(0.02)
    refilled = FIRST | {"tokens": 4 * FIRST["tokens"], "refills": 3}
    assert metrics.floor_lower_bound({"step": 1, **refilled}) == pytest.approx(0.02)


@pytest.mark.parametrize("lacking", [{"step": 2}, {"delta_mean": None}, {"tokens": 0}], ids=str)
def test_without_a_measured_first_step_the_floor_is_unknown(lacking):
    assert metrics.floor_lower_bound({"step": 1, **FIRST} | lacking) is None


def test_a_tolerance_under_the_floor_is_a_warning_also_in_a_resumed_run(tmp_path, capsys):
    for step in (1, 2):
        with metrics.Log(tmp_path, make_config(), first_step=step) as log:
            log.write(step, FIRST if step == 1 else values(2))
        warning = "warning: the tolerance 0.01 is under the floor 0.02"
        assert warning in capsys.readouterr().err


def test_a_tolerance_over_the_floor_is_no_warning(tmp_path, capsys):
    with metrics.Log(tmp_path, make_config()) as log:
        log.write(1, FIRST | {"prob_diff_std": 0.15})
    assert "warning" not in capsys.readouterr().err


def test_a_terminal_gets_a_block_that_starts_at_the_resumed_step(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    fill(tmp_path, range(5, 11), first_step=5)
    shown = capsys.readouterr().err
    assert re.findall(r"step (\d+)/10", shown) == ["5", "6", "7", "8", "9", "10"]
    monkeypatch.setenv("TERM", "dumb")
    fill(tmp_path, (1,))
    assert capsys.readouterr().err.startswith("trial: step 1/10  ")


def test_gaps_and_samples_are_cut_with_the_rows(tmp_path):
    """Rows of a step that is taken again are dropped from all files."""
    record = {"positions": [], "worst": []}
    sample = {"prompt": "1 + 1 =", "completion": " 2", "reward": math.nan}
    for folder, parts in (("whole", [(1, 11)]), ("killed", [(1, 8), (5, 11)])):
        for first, end in parts:
            with metrics.Log(tmp_path / folder, make_config(), first_step=first) as log:
                for step in range(first, end):
                    if step % 2:
                        log.write_gaps(step, record)
                        log.write_samples(step, [sample])
                    log.write_samples(step, [])
                    log.write(step, values(step))
    assert [row["step"] for row in metrics.read_gaps(tmp_path / "killed")] == [1, 3, 5, 7, 9]
    for name in metrics.FILES:
        killed, whole = (tmp_path / folder / name for folder in ("killed", "whole"))
        assert killed.read_bytes() == whole.read_bytes()
    (row, *_) = metrics.read_samples(tmp_path / "killed")
    assert row == {"step": 1, "samples": [{**sample, "reward": None}]}
    assert metrics.read_gaps(tmp_path) == metrics.read_samples(tmp_path) == []


def test_tensorboard_events_hold_every_scalar(tmp_path):
    pytest.importorskip("tensorboardX", reason="the extra 'report' is not installed")
    from tensorboardX.proto.event_pb2 import Event

    with metrics.Log(tmp_path, make_config(tensorboard=True), first_step=3) as log:
        log.write(3, {"reward": 0.5, "tokens": 7, "loss": math.nan})
    events = {}
    restarts = []
    for path in (tmp_path / "tensorboard").iterdir():
        data = path.read_bytes()
        while data:  # a record: 8 bytes of length, 4 of checksum, the event, 4 of checksum
            length = int.from_bytes(data[:8], "little")
            event = Event.FromString(data[12 : 12 + length])
            events |= {(event.step, value.tag): value.simple_value for value in event.summary.value}
            restarts += [event.step] if event.HasField("session_log") else []
            data = data[16 + length :]
    assert restarts == [3]  # what an earlier process wrote from this step on is hidden
    assert events[3, "reward"] == 0.5 and events[3, "tokens"] == 7 and math.isnan(events[3, "loss"])


def test_wandb_continues_the_run_of_the_folder(tmp_path, monkeypatch):
    opened = []
    logged = []
    run = types.SimpleNamespace(
        define_metric=lambda *a, **k: None, log=logged.append, finish=lambda: None
    )
    fake = types.SimpleNamespace(init=lambda **settings: opened.append(settings) or run)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for folder, step in (("a", 1), ("a", 2), ("b", 1)):
        with metrics.Log(tmp_path / folder, make_config(wandb=True), first_step=step) as log:
            log.write(step, {"reward": 0.5})
    first, resumed, other = (settings["id"] for settings in opened)
    assert first == resumed != other and all(settings["resume"] == "allow" for settings in opened)
    assert logged == [
        {"reward": 0.5, "step": 1},
        {"reward": 0.5, "step": 2},
        {"reward": 0.5, "step": 1},
    ]


def test_wandb_itself_takes_the_rows(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for first in (1, 3):  # the second time as a resumed run
        with metrics.Log(tmp_path, make_config(wandb=True), first_step=first) as log:
            log.write(first, values(first) | {"loss": math.nan})
    assert len(list(tmp_path.glob("wandb/offline-run-*/*.wandb"))) == 2


@pytest.mark.parametrize(
    "flag, module, package",
    [("tensorboard", "tensorboardX", "'dcmdp-jax[report]'"), ("wandb", "wandb", "wandb")],
)
def test_an_absent_logger_says_what_to_install(monkeypatch, flag, module, package):
    metrics.check_loggers(make_config())
    monkeypatch.setitem(sys.modules, module, None)
    metrics.check_loggers(make_config())
    with pytest.raises(
        ImportError, match=re.escape(f"{flag}=True needs {module}; pip install {package}")
    ):
        metrics.check_loggers(make_config(**{flag: True}))


@pytest.mark.parametrize("fails", ["init", "define_metric", "log", "finish"])
def test_a_logger_that_fails_is_one_warning_and_every_row_is_written(
    tmp_path, monkeypatch, capsys, fails
):
    def call(name, result=None):
        def method(*args, **kwargs):
            if name == fails:
                raise ConnectionError("unreachable\nfor a while")
            return result

        return method

    run = types.SimpleNamespace(**{name: call(name) for name in ("define_metric", "log", "finish")})
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=call("init", run)))
    with metrics.Log(tmp_path, make_config(wandb=True)) as log:
        for step in (1, 2, 3):
            log.write(step, values(step))
    assert [row["step"] for row in metrics.read(tmp_path)] == [1, 2, 3]
    warned = [line for line in capsys.readouterr().err.splitlines() if "failed" in line]
    assert warned == [
        "Weights & Biases failed (ConnectionError: unreachable for a while); "
        "the run goes on without it, and metrics.jsonl holds every row"
    ]


def test_rows_without_a_checkpoint_are_set_aside(tmp_path, capsys):
    fill(tmp_path, (1, 2))
    before = (tmp_path / "metrics.jsonl").read_bytes()
    metrics.set_aside(tmp_path)
    assert (tmp_path / "metrics.jsonl.1").read_bytes() == before
    assert not (tmp_path / "metrics.jsonl").exists()
    assert f"its old rows are now {tmp_path / 'metrics.jsonl.1'}" in capsys.readouterr().err


def test_rows_that_were_set_aside_stay(tmp_path):
    for steps in ((1, 2), (1,)):
        fill(tmp_path, steps)
        metrics.set_aside(tmp_path)
    metrics.set_aside(tmp_path)
    counts = {path.name: len(path.read_text().splitlines()) for path in tmp_path.iterdir()}
    assert counts == {"metrics.jsonl.1": 2, "metrics.jsonl.2": 1}
