"""Studies: every arm with every seed, from shared starts, into one table; what is finished is not
run again.
"""

import csv
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from dcmdp_jax.tools import study

ROOT = pathlib.Path(__file__).parents[1]
STUDIES = sorted(
    path for path in ROOT.glob("experiments/laptop/*.py") if "STUDY = " in path.read_text()
)

SMALL = """
import dataclasses
from chain import ARMS, GRPO
from dcmdp_jax.config import EvalConfig, WarmupConfig
from dcmdp_jax.study import Study

def small(arm, verifier=None):
    data = dataclasses.replace(arm.data, prompts_per_step=4, verifier=verifier or arm.data.verifier)
    return dataclasses.replace(arm, steps=2, data=data, warmup=WarmupConfig(steps=2, batch_size=8),
                               eval=EvalConfig(every=2, prompts=8))

def broken(example, text):
    raise RuntimeError("no verdict")

STUDY = Study({"none": small(ARMS["none"]), "grpo": small(ARMS["grpo"]), "broken": small(GRPO, broken)}, seeds=1)
"""


@pytest.fixture
def small(tmp_path):
    (tmp_path / "chain.py").write_text((ROOT / "experiments/laptop/chain.py").read_text())
    (tmp_path / "small.py").write_text(SMALL)
    return str(tmp_path / "small.py")


def test_evaluations_average_the_steps_since_the_one_before():
    rows = [
        {
            "step": 1,
            "seconds": 2.0,
            "reward": 0.0,
            "delta_mean": 0.1,
            "reward_eval_infer": 0.3,
            "reward_eval_train": 0.4,
        },
        {"step": 2, "seconds": 1.0, "reward": 0.5, "delta_mean": None},
        {
            "step": 3,
            "seconds": 1.0,
            "reward": 1.0,
            "delta_mean": 0.3,
            "reward_eval_infer": 0.5,
            "reward_eval_train": 0.6,
        },
        {"step": 4, "seconds": 1.0, "reward": 1.0, "delta_mean": 0.3},
    ]
    first, second = study.evaluations(rows, 512)
    assert (
        first["step"],
        first["engine"],
        first["trainer"],
        first["reward"],
        first["seconds"],
    ) == (1, 0.3, 0.4, 0.0, 2.0)
    assert (second["step"], second["reward"], second["delta"], second["seconds"]) == (
        3,
        0.75,
        0.3,
        4.0,
    )
    assert second["entropy"] == "", "a measure that no row has is empty"


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_shipped_studies_load(path):
    found = study.load(str(path))
    assert all(config.steps % config.eval.every == 0 for config in found.arms.values()), (
        "the last step is evaluated"
    )


def test_what_is_no_study_is_refused(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        study.load(str(tmp_path / "nothing.py"))
    (tmp_path / "other.py").write_text("STUDY = 1")
    with pytest.raises(ValueError, match="defines no STUDY"):
        study.load(str(tmp_path / "other.py"))
    with pytest.raises(ValueError, match="at least one arm"):
        study.Study({})


@pytest.mark.slow
def test_arms_share_their_start_and_a_failure_spares_the_others(small, tmp_path):
    root = tmp_path / "runs" / "small"
    said = []
    failed = study.run(small, root, 2, said.append)
    assert len(failed) == 1 and failed[0].startswith(
        "broken s0: the verifier broken fails on a completion"
    )
    assert failed[0].endswith("line 13: RuntimeError: no verdict")
    assert "RuntimeError: no verdict" in (root / "broken" / "s0" / "run.log").read_text()
    rows = list(csv.DictReader((root / "table.csv").open()))
    assert [(row["arm"], row["seed"], row["step"]) for row in rows] == [
        (arm, "0", step) for arm in ("none", "grpo") for step in ("1", "2")
    ]
    assert rows[0]["trainer"] == rows[0]["engine"], "an exact engine's policy is the trainer's"
    assert float(rows[0]["delta"]) < 1e-6 < float(rows[2]["delta"])
    assert len([path for path in (root.parent / "starts").iterdir() if path.is_dir()]) == 1

    before = (root / "none" / "s0" / "metrics.jsonl").stat().st_mtime_ns
    assert len(study.run(small, root, 1, said.append)) == 1
    assert "3 runs, 2 of them finished already" in said
    assert (root / "none" / "s0" / "metrics.jsonl").stat().st_mtime_ns == before

    one = study.Run(small, "none", 0, str(root))
    assert study.edited(study.load(small), one) == []
    file = pathlib.Path(small)
    file.write_text(file.read_text().replace("prompts_per_step=4", "prompts_per_step=8"))
    assert study.edited(study.load(small), one) == ["data.prompts_per_step"], (
        "and it is kept, but said"
    )


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_study_that_is_stopped_leaves_nothing_running(small, tmp_path, number):
    """SIGTERM saves what has begun; after SIGKILL the runs see that their parent is gone, and do
    the same.
    """
    file = pathlib.Path(small)
    root = tmp_path / "runs" / "small"
    file.write_text(
        file.read_text()
        .replace("steps=2, data", "steps=1000, data")
        .replace("every=2", "every=500")
    )
    command = [pathlib.Path(sys.executable).with_name("dcmdp"), "study", small, "--workdir", root]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as study_:
        logs = [root / arm / "s0" for arm in ("none", "grpo")]
        wait_for(
            lambda: all(
                (log / "metrics.jsonl").exists() and (log / "metrics.jsonl").read_text()
                for log in logs
            ),
            300,
        )
        study_.send_signal(number)
        said = study_.stderr.read()  # until the last process that holds it has ended
    assert study_.returncode == (130 if number == signal.SIGTERM else -number)
    assert (f"stopped; go on with: dcmdp study {small} --workdir {root}" in said) == (
        number == signal.SIGTERM
    )
    assert all("everything is saved" in (log / "run.log").read_text() for log in logs)


def wait_for(done, seconds):
    ends = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < ends, "it does not come"
        time.sleep(0.5)
