"""What a run goes through: twenty faults, each with the figure that says whether it was borne.

Each entry: the fault, the target of its figure, the tests that hold it.

 1. Killed, resumed. Target: max difference of parameters and multiplier 0, data order equal. Held
    by test_train: resumed_equals_uninterrupted, a_killed_process_resumes_bit_equal.
 2. SIGKILL in every phase. Target: resumable N of N; steps lost <= checkpoint.every. Held by this
    file.
 3. SIGTERM in every phase, a hanging verifier among them. Target: saved n of N, no step lost; <=
    30 s to the end. Held by this file.
 4. Learning rate 0: sampler against trainer, by length. Target: worst difference of a log-prob <=
    1e-5, mean <= 1e-6. Held by test_parity: an_exact_engine_is_within_1e_5_nats; test_rollout:
    the_gate_holds_in_every_length_bucket.
 5. Weights that are one step old. Target: the gate fires at k = 1, is silent at k = 0. Held by
    this file.
 6. NaN in loss, gradient, weight, log-prob, reward, advantage. Target: parameters bit-unchanged,
    counted; the run ends after n skipped steps. Held by test_step:
    non_finite_updates_are_skipped_and_counted; test_recovery:
    a_run_that_makes_no_update_stops_with_a_sentence_and_is_saved,
    weights_that_are_not_finite_are_named_before_the_first_step; test_rewards:
    a_reward_that_is_no_finite_number_is_refused_with_prompt_and_verifier.
 7. A byte of a checkpoint flipped, a file cut. Target: the checkpoint is named, the one before it
    goes on: bit-equal. Held by this file; test_checkpoint: no_flipped_bit_gives_another_state,
    a_damaged_file_is_fallen_back_from_or_is_no_harm; safetensors: test_weights:
    missing_and_damaged_files_are_refused, test_gsm8k: a_damaged_shard_is_refused.
 8. Other processes, other mesh. Target: data equal, losses to 1e-5. Held by test_processes:
    a_run_of_two_processes_that_is_stopped_goes_on_as_one,
    a_killed_process_ends_the_others_and_is_resumed_exactly.
 9. Hostile answers. Target: exploits 0; <= 1 s an answer; the trainer lives. Held by
    test_answers_cost: hostile_answers_cost_little; test_answers_judge:
    a_process_that_hangs_or_dies_gives_no_verdict; test_answers_spellings:
    hostile_text_costs_nothing; this file.
10. Nothing in a mask, equal rewards, a group of one, an empty completion. Target: finite;
    advantage and gradient 0. Held by test_losses_contract: nothing_in_the_mask; test_step:
    nothing_to_learn_changes_nothing; test_losses_golden: all_masked.
11. A mistyped option, a mesh that does not fit, a batch that does not divide. Target: one
    sentence, nothing compiled, the nearest name. Held by test_inputs:
    bad_input_is_one_sentence_and_leaves_nothing; test_config:
    bad_overrides_are_refused_in_one_sentence.
12. Weight sync interrupted. Target: version not advanced, old weights serve. Held by test_driver:
    an_interrupted_exchange_leaves_the_old_weights, damaged_weights_leave_nothing_in_the_cache.
13. Server: long text, full queue, clients that leave. Target: refused; slot freed; process alive.
    There is no key: it listens to its own machine alone. Held by test_service:
    an_impossible_request_is_refused, a_full_server_refuses_and_recovers,
    a_connection_that_closes_frees_its_slot, the_default_host_is_reachable_from_this_machine_alone.
14. Pickled weights. Target: refused in a sentence. Held by test_weights:
    missing_and_damaged_files_are_refused.
15. Top-k, top-p: which log-prob is stored. Target: rollout_logp + log kept = the trainer's. Held
    by test_rollout: log_probs_over_a_support_are_the_trainers_less_the_mass_kept.
16. Completions cut off by the limit. Target: their share beside the reward, exact. Held by this
    file; of an evaluation: test_scores.
17. Memory planned against measured. Target: <= 5 %. Held by test_plan_memory:
    a_run_holds_what_is_planned, without the compiler's temporaries: those need a device.
18. A process that is absent. Target: named, <= 120 s. Held by test_rendezvous:
    every_process_names_those_that_are_missing, a_missing_process_0_is_named.
19. No room on the disk. Target: a sentence; the last checkpoint whole, resumed bit-equal. Held by
    this file.
20. The same seed twice. Target: metrics and parameters bit-equal. Held by this file.
"""

import json
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

from dcmdp_jax import rewards, sync, train_state
from dcmdp_jax.answers import judge
from dcmdp_jax.records import Example
from dcmdp_jax.run import checkpoint
from dcmdp_jax.run.inputs import read_inputs
from support.training import (
    CHILD,
    MAIN,
    ONE_DEVICE,
    QUICKSTART,
    assert_same_run,
    child_environment,
    command,
    dcmdp,
    rows,
    tiny,
    train,
)

pytestmark = pytest.mark.full

FAULTY = str(pathlib.Path(__file__).parent / "support" / "faulty.py")
# No file of this child may grow past a size, as none can on a full disk.
FULL = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({0}, {0})); "


def run(words, child=CHILD) -> subprocess.CompletedProcess:
    return subprocess.run(
        [*child, *words], env=child_environment(), capture_output=True, text=True, timeout=300
    )


def strike(
    phase: str, number: int, what: signal.Signals, folder: pathlib.Path, words
) -> tuple[int, float, str]:
    """(status, seconds from the signal to the end, what was said) of a run that has the fault."""
    note = folder / "struck"
    note.unlink(missing_ok=True)
    child = [sys.executable, FAULTY, phase, str(number), str(int(what)), str(note), *words]
    done = subprocess.run(
        child, env=child_environment(), capture_output=True, text=True, timeout=300
    )
    said = done.stdout + done.stderr
    assert note.exists(), f"the run did not come to {phase} for the {number}-th time\n{said}"
    return done.returncode, time.time() - float(note.read_text()), said


def saved_step(workdir: pathlib.Path) -> int | None:
    found = checkpoint.steps(workdir)
    return found[-1] if found else None


# Twelve steps, a checkpoint at every second, an evaluation at the first and every fourth.
LONG = {"steps": 12, "checkpoint.every": 2, "checkpoint.keep": 3, "eval.every": 4}
KILLS = (
    ("warm-up", 1),
    ("rollout", 1),
    ("update", 1),
    ("evaluation", 1),
    ("reward", 2),
    ("sync", 4),
    ("saving", 2),
    ("log", 1),
    ("restore", 1),
    ("save", 3),
    ("report", 1),
)
STOPS = (
    ("warm-up", 1),
    ("rollout", 1),
    ("update", 1),
    ("sync", 2),
    ("evaluation", 1),
    ("reward", 2),
    ("saving", 2),
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run that nothing happened to."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    assert dcmdp(command(workdir, **LONG)) == 0
    return workdir


@pytest.mark.slow
def test_2_a_run_killed_in_every_phase_is_resumed_and_loses_no_more_than_an_interval(
    whole, tmp_path
):
    """One folder, killed eleven times; in the end it is the run that nothing happened to."""
    workdir = tmp_path / "run"
    words = command(tmp_path / "run", **LONG)
    for phase, number in KILLS:
        status, _, said = strike(phase, number, signal.SIGKILL, tmp_path, words)
        assert status == -signal.SIGKILL, f"{phase}: {said}"
        log = workdir / "metrics.jsonl"
        written = len(rows(workdir)) if log.exists() else 0
        assert written - (saved_step(workdir) or 0) <= LONG["checkpoint.every"], (
            f"steps lost in {phase}"
        )
    assert dcmdp(words) == 0
    assert_same_run(whole, workdir, tiny(**LONG))
    assert (workdir / "report.html").is_file()


@pytest.mark.slow
def test_3_a_run_told_to_stop_in_any_phase_saves_every_step_within_30_s(whole, tmp_path):
    """SIGTERM in one folder, seven times; in the end it is the run that nothing happened to."""
    workdir = tmp_path / "run"
    words = command(tmp_path / "run", **LONG)
    for phase, number in STOPS:
        status, seconds, said = strike(phase, number, signal.SIGTERM, tmp_path, words)
        assert status == 130 and seconds < 30, (
            f"{phase}: status {status} after {seconds:.0f} s\n{said}"
        )
        assert "Traceback" not in said, f"{phase}: {said}"
        log = workdir / "metrics.jsonl"
        assert (saved_step(workdir) or 0) == (len(rows(workdir)) if log.exists() else 0), (
            f"steps lost in {phase}"
        )
    assert dcmdp(words) == 0
    assert_same_run(whole, workdir, tiny(**LONG))


def write_experiment(folder: pathlib.Path, body: str) -> str:
    file = folder / "experiment.py"
    file.write_text(
        "import dataclasses, pathlib, time\n"
        "from dcmdp_jax.experiment import load_experiment\n"
        f"BASE = load_experiment({QUICKSTART!r})\n{body}"
    )
    return str(file)


@pytest.mark.slow
@pytest.mark.parametrize("what", [signal.SIGTERM, signal.SIGHUP])
def test_3_a_run_whose_verifier_hangs_obeys_a_signal_within_30_s(tmp_path, what):
    """The verifier of the first step never returns; the warmed-up start is saved."""
    begun = tmp_path / "begun"
    experiment = write_experiment(
        tmp_path,
        f"""
def hangs(example, text):
    pathlib.Path({str(begun)!r}).touch()
    time.sleep(3600)
CONFIG = dataclasses.replace(BASE, data=dataclasses.replace(BASE.data, verifier=hangs))
""",
    )
    # A long warm-up gives completions that end, which alone are asked about.
    words = command(tmp_path / "run", steps=4, **{"warmup.steps": 200})
    words[1] = experiment
    process = subprocess.Popen(
        [*CHILD, *words],
        env=child_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        deadline = time.monotonic() + 120
        while not begun.exists():
            assert process.poll() is None and time.monotonic() < deadline, (
                "the verifier was never asked"
            )
            time.sleep(0.05)
        process.send_signal(what)
        said, _ = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130 and "Traceback" not in said, said
    assert saved_step(tmp_path / "run") == 0


@pytest.mark.slow
def test_5_an_engine_whose_weights_are_one_step_old_does_not_pass_the_gate(
    tmp_path, monkeypatch, capsys
):
    """`dcmdp parity`, an engine that rounds nothing: k = 0 under 1e-5 nats, k = 1 over 1e-3."""
    exact = {"rollout.precision.weights": "float32", "checkpoint.every": 1, "warmup.steps": 100}
    workdir = tmp_path / "run"
    assert dcmdp(command(workdir, steps=2, **exact)) == 0
    gate = ["parity", *command(workdir, steps=2, **exact)[1:], "--batches", "2"]
    assert dcmdp(gate) == 0 and worst_gap(workdir) <= 1e-5
    run = tiny(steps=2, **exact)
    inputs = read_inputs(run, ONE_DEVICE)
    like = train_state.abstract(run, inputs.model_config, inputs.mesh)
    older, _ = checkpoint.read(workdir, like, before=2)
    converter = sync.converter
    monkeypatch.setattr(
        sync,
        "converter",
        lambda *args: lambda params, version: converter(*args)(older.params, version),
    )
    assert dcmdp(gate) == 1 and worst_gap(workdir) > 1e-3
    assert "exceeds the limit of 1e-05" in capsys.readouterr().err


def worst_gap(workdir: pathlib.Path) -> float:
    """The largest |log-prob difference| that `dcmdp parity` has written."""
    record = json.loads((workdir / "parity.json").read_text())
    return record["context"]["all"]["logp_diff_max"]


# ------------------------------------------------------------ 7: a damaged checkpoint


def data_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """The files that hold arrays: a file alone may be one that the checkpoint does not refer to."""
    return [path for path in folder.rglob("d/*") if path.is_file()]


def flip(folder):
    for file in data_files(folder):
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 0x10
        file.write_bytes(data)


def cut(folder):
    for file in data_files(folder):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def empty_metadata(folder):
    for file in folder.rglob("*METADATA*"):
        file.write_bytes(b"")


def without_data(folder):
    for file in data_files(folder):
        file.unlink()


def hollow(folder):
    shutil.rmtree(folder)
    folder.mkdir()


DAMAGES = {
    "a bit flipped": flip,
    "cut in half": cut,
    "metadata emptied": empty_metadata,
    "data gone": without_data,
    "an empty folder": hollow,
}


@pytest.fixture(scope="module")
def four_steps(tmp_path_factory):
    """(A run of four steps with checkpoints at 2 and 4, the same run of six)."""
    parts, six = (tmp_path_factory.mktemp("runs") / name for name in ("four", "six"))
    train(tiny(steps=4, **EVERY_SECOND), parts)
    train(tiny(steps=6, **EVERY_SECOND), six)
    return parts, six


EVERY_SECOND = {"checkpoint.every": 2, "checkpoint.keep": 5}


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=list(DAMAGES))
def test_7_a_damaged_checkpoint_is_named_and_the_one_before_it_goes_on(
    four_steps, tmp_path, capfd, damage
):
    """Status 0, checkpoint 4 named, and after two more steps the run that nothing happened to."""
    workdir = tmp_path / "run"
    shutil.copytree(four_steps[0], workdir)
    damage(workdir / "checkpoints" / "4")
    capfd.readouterr()
    status = dcmdp(command(workdir, steps=6, **EVERY_SECOND))
    captured = capfd.readouterr()
    said = captured.out + captured.err
    assert status == 0 and "Traceback" not in said, said[-2000:]
    assert re.search(r"checkpoints?[ /]4\b", said), said
    assert_same_run(four_steps[1], workdir, tiny(steps=6, **EVERY_SECOND))


# ------------------------------------------------------------ 9: answers


HOSTILE = (
    r"\boxed{" + r"\sqrt{" * 8 + "2" + "+3}" * 8 + "^{2^{2^{2}}}}",
    r"\boxed{" + "+".join(rf"\sqrt[{n + 2}]{{{n + 3}}}" for n in range(30)) + "}",
    r"\boxed{(" + "+".join(rf"\sqrt{{{n}}}" for n in (2, 3, 5, 7, 11, 13, 17)) + ")^{16}}",
    r"\boxed{" + "(x+1)" * 60 + "}",
    r"\boxed{" + "(1+x^{7})^{9}" * 12 + "}",
    r"\boxed{2^{3^{4^{5}}}}",
    r"\boxed{((9^{9})^{9})^{9}!}",
    r"\boxed{" + r"\frac{1+" * 40 + "1" + "}{3}" * 40 + "}",
    r"\boxed{" + "|" * 30 + "x" + "|" * 30 + "}",
    r"\boxed{" + r"\sin(" * 40 + "1" + ")" * 40 + "}",
    r"\boxed{" + ",".join(f"{n}/{n + 1}" for n in range(400)) + "}",
    r"\boxed{\sqrt{2+\sqrt{2+\sqrt{2+\sqrt{2+\sqrt{2}}}}}^{64}}",
    r"\boxed{((\sqrt{2}+1)^{99}+(\sqrt{3}+1)^{99})^{99}}",
    r"\boxed{\sqrt[3]{\sqrt[5]{\sqrt[7]{2^{99}}^{99}}^{99}}}",
    r"\boxed{(a+b+c+d+e+f+g+h+i+j)^{9}}",
)


@pytest.mark.parametrize("answer", HOSTILE, ids=range(len(HOSTILE)))
@pytest.mark.parametrize("gold", ["7", r"\sqrt{2}+\sqrt{3}", "x^2+2x+1"])
def test_9_no_answer_takes_the_trainer_longer_than_the_limit(answer, gold):
    """0.2 s of the trainer's own time; the judge's limit and its slack, where that is asked."""
    started = time.perf_counter()
    own = time.process_time()
    assert rewards.math_answer(Example("How many?", gold), answer) == 0.0
    assert time.process_time() - own <= 0.2
    assert time.perf_counter() - started <= judge.SECONDS + judge.SLACK


# ------------------------------------------------------------ 16, 19, 20


def test_16_the_share_of_completions_cut_off_stands_beside_the_reward(tmp_path, monkeypatch):
    """A limit of two tokens, which no answer fits in: none earns a reward, and most are cut off."""
    stopped = []
    score = rewards.score
    monkeypatch.setattr(
        rewards,
        "score",
        lambda sampled, *rest: stopped.extend(sampled.stopped) or score(sampled, *rest),
    )
    assert dcmdp(command(tmp_path / "short", steps=1, **{"rollout.max_tokens": 2})) == 0
    (row,) = rows(tmp_path / "short")
    assert len(stopped) == 16 and 8 < stopped.count(False) == 16 * row["truncated"]
    assert row["reward"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("room", [2_000, 20_000], ids=["2 kB a file", "20 kB a file"])
def test_19_a_run_without_room_on_the_disk_says_so_and_goes_on_where_it_was(
    four_steps, tmp_path, room
):
    """The last checkpoint is whole; with room again the run is the one that nothing happened to."""
    workdir = tmp_path / "run"
    words = command(tmp_path / "run", steps=6, **EVERY_SECOND)
    shutil.copytree(four_steps[0], workdir)
    full = run(words, (sys.executable, "-c", FULL.format(room) + MAIN))
    assert full.returncode not in (0, 130) and "Traceback" not in full.stderr, full.stderr[-3000:]
    assert re.search(r"(?i)too large|no space|cannot be written|disk", full.stderr), full.stderr
    assert saved_step(workdir) == 4
    assert dcmdp(words) == 0
    assert_same_run(four_steps[1], workdir, tiny(steps=6, **EVERY_SECOND))


@pytest.mark.slow
def test_20_the_same_seed_twice_is_the_same_run(tmp_path):
    """Metrics but for the seconds, parameters, optimizer, multiplier, data order: bit for bit."""
    for name in ("one", "two"):
        train(tiny(steps=3), tmp_path / name)
    assert_same_run(tmp_path / "one", tmp_path / "two", tiny(steps=3))
    with pytest.raises(AssertionError):
        train(tiny(steps=3, seed=1), tmp_path / "other")
        assert_same_run(tmp_path / "one", tmp_path / "other", tiny(steps=3, seed=1))
