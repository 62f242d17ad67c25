"""A verifier in processes of its own: it may hang, crash, print and start programs."""

import dataclasses
import os
import pathlib
import subprocess
import sys
import threading
import time
import types
from functools import partial

import jax
import numpy as np
import pytest

from dcmdp_jax import rewards, stopping
from dcmdp_jax.batches import Batches
from dcmdp_jax.experiment import run_file
from dcmdp_jax.losses import advantages
from dcmdp_jax.monitoring import measurements
from dcmdp_jax.records import Columns, Example, Prompts, TrainState
from dcmdp_jax.run.inputs import read_inputs
from dcmdp_jax.seeds import Stream
from dcmdp_jax.verifier_pool import Call, Failure, VerifierPool
from support.rollouts import CannedSampler, make_rollout
from support.training import ONE_DEVICE, child_environment, rows, saved, tiny, train

SECONDS = 10.0  # far more than an answer takes, even of a process that has to start
EXPERIMENT = """
import contextlib, os, pathlib, signal, subprocess, sys, time
import neighbour

def judge(example, text, stopped=True):
    if text == "hang":
        program = subprocess.Popen(["sleep", "600"])
        pathlib.Path(example.columns["file"]).write_text(f"{os.getpid()} {program.pid}")
        while True:
            pass
    if text.startswith("answer "):
        for number in range(3, 16):
            with contextlib.suppress(OSError):  # the others are closed, or are read
                os.write(number, text.removeprefix("answer ").encode("latin-1") + b"\\n")
    if text == "exit":
        os._exit(3)
    if text == "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    if text == "raise":
        raise KeyError("gold")
    if text == "nan":
        return float("nan")
    if not text and example.answer == "never":
        sys.exit(1)
    print("judged", text)
    os.write(1, b"and more")
    return neighbour.plus_minus(text == example.answer)

def surroundings(example, text):
    if text == "killed first":
        return int(pathlib.Path("/proc/self/oom_score_adj").read_text())
    if text == "CPU limit":
        return signal.getitimer(signal.ITIMER_PROF)[0]
    return os.environ["JAX_PLATFORMS"] == "cpu"
"""


ASKS = """
import os, pathlib, subprocess, sys, time
from dcmdp_jax.records import Example
from dcmdp_jax.verifier_pool import Call, VerifierPool

def wait(example, text):
    program = subprocess.Popen(["sleep", "600"])
    pathlib.Path(text).write_text(f"{os.getpid()} {program.pid}")
    time.sleep(600)

VerifierPool(wait, 600.0, 1).judge([Call(Example("", ""), sys.argv[1], {})], lambda: False)
"""


def always_go_on():
    return False


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    """The functions of an experiment file, which imports a module beside it."""
    folder = tmp_path_factory.mktemp("experiment")
    (folder / "neighbour.py").write_text("def plus_minus(right):\n    return 1 if right else -1\n")
    (folder / "file.py").write_text(EXPERIMENT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", list(sys.path))
        yield run_file(str(folder / "file.py"), "experiment")


@pytest.fixture(scope="module")
def pool(experiment):
    return VerifierPool(experiment["judge"], SECONDS, 2)


def asked(pool, *texts, answer="right"):
    calls = [Call(Example("How many?", answer), text, {}) for text in texts]
    return pool.judge(calls, always_go_on)


def test_answers_come_in_the_order_of_the_calls(pool):
    texts = ["right", "wrong", "", "right", "wrong"]
    assert asked(pool, *texts) == [1.0, -1.0, -1.0, 1.0, -1.0]


@pytest.mark.parametrize(
    "text, reason",
    [
        ("exit", "ends its process (status 3)"),
        ("segfault", "ends its process (SIGSEGV)"),
    ],
)
def test_a_process_that_ends_costs_its_own_call(pool, text, reason):
    calls = asked(pool, "right", text, "wrong", "right")
    assert calls == [1.0, Failure(reason), -1.0, 1.0]


def test_an_exception_has_its_line_and_costs_its_own_call(pool):
    failure, other = asked(pool, "raise", "right")
    line = 1 + EXPERIMENT.splitlines().index('        raise KeyError("gold")')
    assert failure.raised and other == 1.0
    assert failure.reason.startswith(
        "the verifier judge fails on a completion of the prompt 'How many?'"
    )
    assert failure.reason.endswith(f"file.py, line {line}: KeyError: 'gold'; fix the verifier")


def test_what_is_no_finite_number_is_a_failure(pool):
    (failure,) = asked(pool, "nan")
    assert failure.raised and "gives nan for a completion of the prompt" in failure.reason


@pytest.mark.parametrize("line", ["[]", "{}", "1", "\xff"])
def test_a_line_that_the_verifier_writes_itself_is_no_answer(pool, line):
    calls = asked(pool, "right", f"answer {line}", "right")
    assert calls == [1.0, Failure("writes to the file that its answers go to"), 1.0]


def test_a_call_that_waits_ends_where_the_process_that_asks_is_killed(tmp_path):
    """With what it started; it uses no CPU time."""
    file = tmp_path / "pids"
    script = tmp_path / "asks.py"
    script.write_text(ASKS)
    asks = subprocess.Popen([sys.executable, str(script), str(file)], env=child_environment())
    while not (file.exists() and file.read_text()):
        assert asks.poll() is None
        time.sleep(0.1)
    asks.kill()
    asks.wait()
    assert all(is_gone(int(pid)) for pid in file.read_text().split())


def test_a_call_over_its_time_is_ended_with_what_it_started(experiment, tmp_path):
    pool = VerifierPool(experiment["judge"], 1.0, 1)
    pool.start()
    example = Example("", "right", columns=Columns({"file": str(tmp_path / "pids")}))
    outcomes = pool.judge([Call(example, text, {}) for text in ("hang", "right")], always_go_on)
    assert outcomes == [Failure("takes longer than data.verifier_timeout=1 s"), 1.0]
    for pid in map(int, (tmp_path / "pids").read_text().split()):
        assert is_gone(pid)


def is_gone(pid):
    """True if a process has ended, perhaps without its parent's notice, within ten seconds."""
    status = pathlib.Path(f"/proc/{pid}/stat")
    for _ in range(100):
        if not status.exists() or status.read_text().split()[2] == "Z":
            return True
        time.sleep(0.1)
    return False


def test_a_request_to_stop_ends_calls_that_hang(experiment, tmp_path):
    file = tmp_path / "pids"
    pool = VerifierPool(experiment["judge"], 600.0, 2)
    example = Example("", "right", columns=Columns({"file": str(file)}))
    calls = [Call(example, text, {}) for text in ("hang", "right", "hang", "right")]
    with pytest.raises(stopping.Interrupted):
        pool.judge(calls, lambda: file.exists() and bool(file.read_text()))
    assert all(is_gone(int(pid)) for pid in file.read_text().split())
    assert asked(pool, "right") == [1.0]


def test_a_process_ends_before_others_and_by_itself(experiment):
    """Where memory runs out, and where the trainer was killed; JAX leaves the accelerator alone."""
    pool = VerifierPool(experiment["surroundings"], SECONDS, 1)
    first, cpu_limit, on_cpu = asked(pool, "killed first", "CPU limit", "JAX")
    assert (first, on_cpu) == (1000, 1) and cpu_limit > SECONDS


@pytest.mark.parametrize("kind", ["lambda", "partial", "bound method"])
def test_any_kind_of_function_can_be_sent(kind):
    class Judge:
        def judge(self, example, text):
            return len(text)

    verifier = {
        "lambda": lambda example, text: len(text),
        "partial": partial(lambda extra, example, text: len(text) + extra, 0),
        "bound method": Judge().judge,
    }[kind]
    assert asked(VerifierPool(verifier, SECONDS, 1), "abc") == [3.0]


def test_what_cannot_be_sent_is_refused_at_once():
    lock = threading.Lock()
    with pytest.raises(ValueError, match=r"cannot be sent to a process \(TypeError: cannot pickle"):
        VerifierPool(lambda example, text: lock.locked(), SECONDS, 1)


def test_what_cannot_be_loaded_is_refused_before_any_call(monkeypatch):
    only_here = types.ModuleType("only_here")
    monkeypatch.setitem(sys.modules, "only_here", only_here)
    pool = VerifierPool(lambda example, text: only_here.judge(text), SECONDS, 1)
    with pytest.raises(ValueError, match="process of its own: .*No module named 'only_here'"):
        pool.start()
    with pytest.raises(ValueError, match="process of its own: .*No module named 'only_here'"):
        asked(pool, "text")


# ------------------------------------------------------------ rewards.score


def scored(pool, *texts, answer="right", stopped=None):
    """The texts as completions of one prompt."""
    stopped = [True] * len(texts) if stopped is None else stopped
    rollout = make_rollout(
        Prompts(np.zeros((1, 1), np.int32), np.ones(1, np.int32), (Example("Why?", answer),)),
        np.arange(len(texts))[:, None].repeat(2, axis=1),
        [2] * len(texts),
        np.zeros((len(texts), 2)),
        stopped,
    )
    return rewards.score(rollout, lambda ids: texts[ids[0]], pool)


def test_a_call_that_failed_earns_what_an_empty_text_earns(pool, capfd):
    """Seven wrong completions and one that crashed teach nothing, with a verifier of -1 and +1."""
    result = scored(pool, *["wrong"] * 7, "segfault")
    np.testing.assert_array_equal(result.reward, [-1] * 8)
    np.testing.assert_array_equal(result.failed, [False] * 7 + [True])
    advantage = advantages.grpo(result.reward, np.zeros(8, np.int32), num_groups=1)
    np.testing.assert_array_equal(advantage, np.zeros(8))
    assert measurements.measure(result, [""])["verifier_failed"] == 1 / 8
    assert (
        "1 of 8 completions earn what an empty text earns: the verifier judge ends its process "
        "(SIGSEGV) on a completion of the prompt 'Why?'\n"
    ) in capfd.readouterr().err


@pytest.mark.parametrize("others, earned", [(["never", "wrong"], -1), (["exit"], 0)])
def test_where_an_empty_text_fails_too_the_lowest_reward_counts(pool, others, earned):
    """Of the prompt's other completions; 0 if they all failed."""
    assert scored(pool, "exit", *others, answer="never").reward[0] == earned


def test_it_is_known_on_which_completions_the_verifier_raised(pool, capfd):
    result = scored(pool, "raise", "exit", "wrong")
    np.testing.assert_array_equal(result.raised, [True, False, False])
    np.testing.assert_array_equal(result.failed, [True, True, False])
    assert "KeyError: 'gold'" in capfd.readouterr().err


def test_completions_of_one_process_that_all_raise_do_not_end_a_run(pool):
    """They may be those of one broken problem; `batches` sees those of all processes."""
    assert scored(pool, "raise", "raise").raised.all()


def test_a_pool_tells_the_verifier_what_it_asks_for():
    def judge(example, text, stopped, length):
        return len(text) + 10 * stopped + length

    result = scored(VerifierPool(judge, SECONDS, 1), "abc", "abcd", stopped=[True, False])
    np.testing.assert_array_equal(result.reward, [15, 6])


def test_the_library_s_own_verifier_gives_the_same_in_a_pool():
    texts = [r"\boxed{2}", "#### 3", r"\boxed{\sqrt{4}}", "two", r"\boxed{\frac{4}{2}}"]
    pool = VerifierPool(rewards.math_answer, 60.0, 2)
    expected = scored(rewards.math_answer, *texts, answer="2")
    np.testing.assert_array_equal(scored(pool, *texts, answer="2").reward, expected.reward)
    assert expected.failed is None and 0 < expected.reward.sum() < len(texts)


# ------------------------------------------------------------ in a run


def batch_of(verifier):
    """The first batch of a run, of canned completions."""
    run = tiny(steps=1, **{"warmup.steps": 0, "data.verifier_timeout": SECONDS})
    run = dataclasses.replace(
        run,
        data=dataclasses.replace(run.data, verifier=verifier),
        rollout=dataclasses.replace(run.rollout, sampler=lambda *_: CannedSampler()),
    )
    state = TrainState((), (), (), np.int32(0), np.int32(0), ())
    batches = Batches(run, read_inputs(run, ONE_DEVICE), state, lambda: False)
    return batches.collect(Stream.ROLLOUT, 0)


def test_a_verifier_that_raises_on_all_completions_is_broken(capfd):
    def judge(example, text):
        raise KeyError("gold")

    with pytest.raises(ValueError, match="^data.verifier raises on all 16 completions of a batch"):
        batch_of(judge)
    assert "KeyError: 'gold'" in capfd.readouterr().err


@pytest.mark.full
def test_a_run_whose_verifier_crashes_now_and_then_goes_on(tmp_path):
    """It is the run of a verifier that gives such texts what it gives an empty one."""

    def judge(example, text):
        return float(sum(map(ord, text)) % 2 == 0)

    def crash(example, text):
        return os._exit(1) if sum(map(ord, text)) % 9 == 1 else judge(example, text)

    def forgive(example, text):
        return judge(example, "" if sum(map(ord, text)) % 9 == 1 else text)

    def run_of(verifier, seconds):
        changes = {"warmup.steps": 0, "eval.every": 2, "data.verifier_timeout": seconds}
        run = tiny(steps=2, **changes)
        return dataclasses.replace(run, data=dataclasses.replace(run.data, verifier=verifier))

    train(run_of(crash, 60.0), tmp_path / "crash")
    train(run_of(forgive, 0.0), tmp_path / "forgive")
    measured = rows(tmp_path / "crash")
    assert sum(row.pop("verifier_failed") for row in measured) > 0
    assert measured == rows(tmp_path / "forgive")
    state, position = saved(tmp_path / "crash", run_of(crash, 60.0))
    expected = saved(tmp_path / "forgive", run_of(forgive, 0.0))
    jax.tree.map(np.testing.assert_array_equal, (state, position), expected)
