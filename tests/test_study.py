"""Studies: every arm with every seed, from shared starts, into one table."""

import csv
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from dcmdp_jax import cli
from dcmdp_jax.experiment import load_experiment, replace_fields
from dcmdp_jax.monitoring import metrics
from dcmdp_jax.tools import study

pytestmark = pytest.mark.full

ROOT = pathlib.Path(__file__).parents[1]
STUDIES = sorted(path for path in ROOT.glob("experiments/*/*.py") if "STUDY = " in path.read_text())

SMALL = """
import dataclasses
from chain import ARMS, GRPO
from dcmdp_jax.config import EvalConfig, WarmupConfig
from dcmdp_jax.tools.study import Study

def small(arm, verifier=None):
    data = dataclasses.replace(arm.data, prompts_per_step=4, verifier=verifier or arm.data.verifier)
    return dataclasses.replace(arm, steps=2, data=data,
                               warmup=WarmupConfig(steps=2, batch_size=8, learning_rate=3e-3),
                               eval=EvalConfig(every=2, prompts=8))

def broken(example, text):
    raise RuntimeError("no verdict")

STUDY = Study(
    {"none": small(ARMS["none"]), "grpo": small(ARMS["grpo"]), "broken": small(GRPO, broken)},
    seeds=1,
)
"""


def write_small(folder):
    """Writes a study of three tiny arms, of which one fails, and returns its file."""
    (folder / "chain.py").write_text((ROOT / "experiments/laptop/chain.py").read_text())
    (folder / "small.py").write_text(SMALL)
    return str(folder / "small.py")


@pytest.fixture
def two_evaluations():
    """The table's rows for four steps, of which the first and the third are evaluated."""
    rows = [
        {"step": 1, "seconds": 2.0, "reward": 0.0, "delta_mean": 0.1}
        | {"reward_eval_infer": 0.3, "reward_eval_train": 0.4},
        {"step": 2, "seconds": 1.0, "reward": 0.5, "delta_mean": None},
        {"step": 3, "seconds": 1.0, "reward": 1.0, "delta_mean": 0.3}
        | {"reward_eval_infer": 0.5, "reward_eval_train": 0.6},
        {"step": 4, "seconds": 1.0, "reward": 1.0, "delta_mean": 0.3},
    ]
    return list(study.evaluations(rows, 512))


def values(row, *names):
    return tuple(row[name] for name in names)


def test_a_row_has_the_pass_rates_of_its_evaluation(two_evaluations):
    first, second = two_evaluations
    assert values(first, "step", "reward_eval_infer", "reward_eval_train") == (1, 0.3, 0.4)
    assert values(second, "step", "reward_eval_infer", "reward_eval_train") == (3, 0.5, 0.6)


def test_measures_are_means_since_the_evaluation_before(two_evaluations):
    first, second = two_evaluations
    assert values(first, "reward", "delta_mean") == (0.0, 0.1)
    assert values(second, "reward", "delta_mean") == (0.75, 0.3)


def test_seconds_count_from_the_start(two_evaluations):
    assert [row["seconds"] for row in two_evaluations] == [2.0, 4.0]


def test_a_measure_that_no_step_has_is_empty(two_evaluations):
    assert two_evaluations[1]["entropy"] == ""


def test_the_line_of_a_run_has_its_last_evaluation(two_evaluations):
    line = "held-out engine 0.500  held-out trainer 0.600  delta 0.3  4 s"
    assert study.describe(two_evaluations[1]) == line


def test_the_line_of_a_run_leaves_out_a_policy_that_was_not_evaluated(two_evaluations):
    last = two_evaluations[1] | {"reward_eval_train": ""}
    assert "nan" not in study.describe(last) and "trainer" not in study.describe(last)


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_shipped_studies_evaluate_the_last_step(path):
    for config in study.load(str(path)).arms.values():
        assert config.steps % config.eval.every == 0


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        study.load(str(tmp_path / "nothing.py"))


def test_a_file_without_a_study_is_refused(tmp_path):
    (tmp_path / "other.py").write_text("STUDY = 1")
    with pytest.raises(ValueError, match="defines no STUDY"):
        study.load(str(tmp_path / "other.py"))


def test_a_study_without_arms_is_refused():
    with pytest.raises(ValueError, match="at least one arm"):
        study.Study({})


def two_arms(folder):
    """Writes a study of the arms a and b and the seeds 3 to 5."""
    file = pathlib.Path(write_small(folder))
    file.write_text(f"{SMALL}\nSTUDY = Study({{'a': GRPO, 'b': GRPO}}, seeds=3, first_seed=3)\n")
    return str(file)


@pytest.mark.parametrize(
    "arms, seeds, runs",
    [
        (None, None, ["a3", "b3", "a4", "b4", "a5", "b5"]),
        (["b", "a"], None, ["b3", "a3", "b4", "a4", "b5", "a5"]),
        (["b"], [5, 3], ["b5", "b3"]),
        (["a", "a"], [4, 4], ["a4"]),
    ],
)
def test_named_arms_and_seeds_run_alone_in_their_order(arms, seeds, runs, tmp_path):
    selected = study.select(two_arms(tmp_path), arms, seeds)
    assert [f"{arm}{seed}" for arm, seed in selected] == runs


@pytest.mark.parametrize(
    "options, message",
    [
        (["--arms", "c"], "has no arm c; it has a, b"),
        (["--seeds", "3", "0"], "has no seed 0; it has 3, 4, 5"),
    ],
)
def test_an_arm_or_a_seed_that_a_study_does_not_have_is_refused(options, message, tmp_path, capsys):
    assert cli.main(["study", two_arms(tmp_path), *options]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"eval.every": 0}, "arm 'a' needs evaluations; set eval.every"),
        ({"warmup.steps": 0}, "arm 'a' needs weights to start from: either a model.folder, or"),
        ({"model.folder": "m"}, "arm 'a' needs weights to start from: either a model.folder, or"),
        ({"model.folder": "m", "warmup.steps": 0}, "and arm 'a' starts from a model.folder"),
    ],
)
def test_an_arm_that_no_study_can_run_is_refused(changes, message):
    arm = load_experiment(str(ROOT / "experiments" / "quickstart.py"))
    arm = replace_fields(arm, {tuple(name.split(".")): value for name, value in changes.items()})
    with pytest.raises(ValueError, match=message):
        study.Study({"a": arm}, alter=lambda params: params)


@pytest.fixture(scope="module")
def finished_study(tmp_path_factory):
    """A study of three arms, of which one fails: its file, its folder, and the failures."""
    file = write_small(tmp_path_factory.mktemp("study"))
    root = tmp_path_factory.mktemp("runs") / "small"
    return file, root, study.run_all(file, root, 2, lambda line: None)


@pytest.mark.slow
def test_a_failing_arm_is_named_with_its_line(finished_study):
    _, root, failures = finished_study
    (failure,) = failures
    assert failure.startswith("broken s0: the verifier broken fails on a completion")
    line = SMALL.split("\n").index('    raise RuntimeError("no verdict")') + 1
    assert failure.endswith(f"line {line}: RuntimeError: no verdict; fix the verifier")
    assert "RuntimeError: no verdict" in (root / "broken" / "s0" / "run.log").read_text()


@pytest.mark.slow
def test_the_other_arms_are_in_the_table(finished_study):
    _, root, _ = finished_study
    rows = list(csv.DictReader((root / "table.csv").open()))
    assert [(row["arm"], row["seed"], row["step"]) for row in rows] == [
        (arm, "0", step) for arm in ("none", "grpo") for step in ("1", "2")
    ]
    assert rows[0]["reward_eval_train"] == rows[0]["reward_eval_infer"], (
        "an exact engine's policy is the trainer's"
    )
    assert float(rows[0]["delta_mean"]) < 1e-6 < float(rows[2]["delta_mean"])


@pytest.mark.slow
def test_arms_share_their_start(finished_study):
    _, root, _ = finished_study
    assert len([path for path in (root.parent / "starts").iterdir() if path.is_dir()]) == 1


@pytest.mark.slow
def test_a_run_of_a_model_folder_is_that_of_the_warm_up_that_made_it(finished_study, tmp_path):
    _, root, _ = finished_study
    (start,) = (path for path in (root.parent / "starts").iterdir() if path.is_dir())
    file = write_small(tmp_path)
    arms = f"""
model = dataclasses.replace(GRPO.model, folder={str(start / "model")!r}, architecture=None)
arm = dataclasses.replace(small(ARMS["none"]), model=model, warmup=WarmupConfig())
STUDY = Study({{"folder": arm}}, seeds=1)
"""
    pathlib.Path(file).write_text(SMALL + arms)
    assert study.run_all(file, tmp_path / "runs", 1, lambda line: None) == []
    assert not (tmp_path / "starts").exists()
    rows, expected = (
        [{**row, "seconds": None} for row in metrics.read(folder)]
        for folder in (tmp_path / "runs" / "folder" / "s0", root / "none" / "s0")
    )
    assert rows == expected


@pytest.mark.slow
def test_finished_runs_are_not_run_again(finished_study):
    file, root, failures = finished_study
    rows = root / "none" / "s0" / "metrics.jsonl"
    written = rows.stat().st_mtime_ns
    lines = []
    assert len(study.run_all(file, root, 1, lines.append)) == len(failures)
    assert "3 runs, 2 of them finished already" in lines
    table = (root / "table.csv").read_text()
    assert study.run_all(file, root, 1, lines.append, study.select(file, ["none"], [0])) == []
    assert "1 run, 1 of them finished already" in lines
    assert (root / "table.csv").read_text() == table, "it has the finished runs of all arms"
    assert rows.stat().st_mtime_ns == written


@pytest.mark.slow
def test_settings_that_changed_since_a_run_are_named(finished_study, tmp_path):
    file, root, _ = finished_study
    assert study.changed_settings(study.load(file), study.Run(file, "none", 0, str(root))) == []
    edited = write_small(tmp_path)
    text = pathlib.Path(edited).read_text()
    pathlib.Path(edited).write_text(text.replace("prompts_per_step=4", "prompts_per_step=8"))
    run = study.Run(edited, "none", 0, str(root))
    assert study.changed_settings(study.load(edited), run) == ["data.prompts_per_step"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_study_leaves_nothing_running(tmp_path, number):
    """On SIGTERM the runs save their state; after SIGKILL they see that their parent is gone, and
    do the same.
    """
    file = pathlib.Path(write_small(tmp_path))
    root = tmp_path / "runs" / "small"
    text = file.read_text().replace("steps=2, data", "steps=1000, data")
    file.write_text(text.replace("every=2", "every=500"))
    program = pathlib.Path(sys.executable).with_name("dcmdp")
    command = [program, "study", file, "--workdir", root]
    folders = [root / arm / "s0" for arm in ("none", "grpo")]

    def both_have_stepped():
        files = [folder / "metrics.jsonl" for folder in folders]
        return all(file.exists() and file.read_text() for file in files)

    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        wait_for(both_have_stepped, 300)
        process.send_signal(number)
        output = process.stderr.read()  # until the last process that holds the pipe has ended
    stopped = f"stopped; go on with: dcmdp study {file} --workdir {root}"
    assert process.returncode == (130 if number == signal.SIGTERM else -number)
    assert (stopped in output) == (number == signal.SIGTERM)
    for folder in folders:
        assert "everything is saved" in (folder / "run.log").read_text()


def wait_for(done, seconds):
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.5)
