"""`dcmdp launch` against a stand-in for gcloud, and the recipes: nothing here rents a TPU."""

import json
import os
import pathlib
import shlex
import shutil
import subprocess
import sys

import pytest
import yaml

from dcmdp_jax.cli import main
from dcmdp_jax.cli.fields import overrides
from dcmdp_jax.experiment import load_experiment, override
from dcmdp_jax.tools import launch
from support import fake_gcloud

ROOT = pathlib.Path(__file__).parents[1]
PODS = ROOT / "experiments" / "pods"
WORKDIR = "gs://bucket/runs/one"
WHERE = ("--workdir", WORKDIR, "--zone", "us-east5-a", "--accelerator-type", "v5p-16")
EXPERIMENT = "experiments/mine.py"
QUOTED = ("--spot", "--data.path", "gs://bucket/it's here.jsonl", "--delete")
GOES_ON = "130 SUSPENDED"
FINISHES = "0 ACTIVE"


def make_cloud(folder):
    """Returns the folder of the stand-in, and the environment in which it alone is `gcloud`."""
    cloud = folder / "cloud"
    cloud.mkdir()
    (cloud / "dcmdp").write_text(fake_gcloud.DCMDP)
    (cloud / "dcmdp").chmod(0o755)
    program = folder / "bin" / "gcloud"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} {fake_gcloud.__file__} "$@"\n')
    program.chmod(0o755)
    return cloud, {"PATH": f"{program.parent}:{os.environ['PATH']}", "CLOUD": str(cloud)}


def make_checkout(folder):
    """Returns a checkout with an experiment that git has not been told of."""
    checkout = folder / "a checkout"
    (checkout / "experiments").mkdir(parents=True)
    subprocess.run(["git", "init", "-q", checkout], check=True)
    (checkout / ".gitignore").write_text("runs/\n")
    (checkout / launch.LOCK).write_text("jax\n")
    shutil.copy(ROOT / "experiments" / "quickstart.py", checkout / EXPERIMENT)
    return checkout


class Launched:
    """`dcmdp launch` in a process of its own: what it printed, and what it left."""

    def __init__(self, folder, *options, ends=""):
        self.cloud, environment = make_cloud(folder)
        self.checkout = make_checkout(folder)
        (self.cloud / "ends").write_text(ends)
        program = (
            "import sys; from dcmdp_jax.cli import main; from dcmdp_jax.tools import launch; "
            "launch.POLL_SECONDS = 0.0; sys.exit(main(sys.argv[1:]))"
        )
        words = [sys.executable, "-c", program, "launch", "pod", EXPERIMENT, *WHERE, *options]
        done = subprocess.run(
            words,
            cwd=self.checkout,
            env=os.environ | environment | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        self.status = done.returncode
        self.out = done.stdout
        self.err = done.stderr


@pytest.fixture
def cloud(tmp_path, monkeypatch):
    """The folder of the stand-in."""
    folder, environment = make_cloud(tmp_path)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(launch, "POLL_SECONDS", 0.0)
    return folder


@pytest.fixture
def experiment(tmp_path, monkeypatch):
    """An experiment, from the folder that is now the current one."""
    monkeypatch.chdir(make_checkout(tmp_path))
    return EXPERIMENT


def calls(cloud):
    lines = (cloud / "calls").read_text().splitlines() if (cloud / "calls").exists() else []
    return [json.loads(line) for line in lines]


def verbs(cloud):
    """What was done, without looks at the state."""
    done = [words[3] if words[0] == "compute" else words[0] for words in calls(cloud)]
    return [verb for verb in done if verb != "list"]


def runs(cloud):
    return [json.loads(line) for line in (cloud / "runs").read_text().splitlines()]


# A dry run


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory):
    return Launched(tmp_path_factory.mktemp("dry"), *QUOTED, "--dry-run")


@pytest.fixture(scope="module")
def dry(dry_run):
    """The commands of a dry run, as words."""
    return [shlex.split(line, comments=True) for line in dry_run.out.splitlines()]


def remote(words):
    return [word.partition("=")[2] for word in words if word.startswith("--command=")]


def test_a_dry_run_runs_nothing(dry_run):
    assert dry_run.status == 0
    assert calls(dry_run.cloud) == []
    assert not (dry_run.checkout / "runs").exists()


def test_each_command_of_a_dry_run_is_valid_bash_on_the_workstation_and_on_the_hosts(dry):
    for script in [shlex.join(words) for words in dry] + sum(map(remote, dry), []):
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_a_dry_run_has_the_lock(dry):
    installs = [command for words in dry for command in remote(words) if "uv pip" in command]
    assert len(installs) == 1 and f"--no-deps -r {launch.LOCK}" in installs[0]


def test_a_dry_run_has_the_experiment_and_its_options_as_they_were_typed(dry):
    [start] = [command for words in dry for command in remote(words) if "setsid" in command]
    words = shlex.split(start)
    script = shlex.split(words[words.index("-c") + 1])
    assert script[script.index("train") : script.index("--distributed;") + 1] == [
        "train",
        EXPERIMENT,
        "--workdir",
        WORKDIR,
        *QUOTED[1:3],
        "--distributed;",
    ]


def test_a_dry_run_sets_the_secret_on_all_hosts(dry, dry_run):
    secret = dry_run.checkout / "runs" / "launch" / "pod" / "dcmdp.secret"
    [copy] = [words for words in dry if "scp" in words]
    assert str(secret) in copy and {"--node=all", "--worker=all"} <= set(copy)
    [start] = [command for words in dry for command in remote(words) if "setsid" in command]
    assert 'DCMDP_SECRET="$(cat ../dcmdp.secret)"' in start


@pytest.mark.full
def test_a_run_calls_what_the_dry_run_says(dry, dry_run, tmp_path):
    launched = Launched(tmp_path, *QUOTED, ends=FINISHES)
    said = [[word.replace(str(dry_run.checkout.parent), "") for word in words] for words in dry]
    called = [
        [word.replace(str(tmp_path), "") for word in words] for words in calls(launched.cloud)
    ]
    assert called and all(["gcloud", *words] in said for words in called)


@pytest.mark.parametrize(
    ("options", "flags"),
    [
        ((), {"--node-id=pod"}),
        (("--slices", "2", "--mesh.data", "2"), {"--node-count=2", "--node-prefix=pod"}),
        (("--spot",), {"--node-id=pod", "--spot"}),
        (("--project", "mine"), {"--node-id=pod", "--project=mine"}),
    ],
)
def test_what_is_requested(options, flags, cloud, experiment, capfd):
    assert main(["launch", "pod", experiment, *WHERE, *options, "--dry-run"]) == 0
    lines = [shlex.split(line, comments=True) for line in capfd.readouterr().out.splitlines()]
    [create] = [words[5:] for words in lines if "create" in words[:5]]
    standard = {"--accelerator-type=v5p-16", "--runtime-version=v2-alpha-tpuv5"}
    assert set(create) == {"pod", "--zone=us-east5-a"} | standard | flags


# A run


@pytest.fixture(scope="module")
def preempted(tmp_path_factory):
    """A run of two slices whose machines are taken away once."""
    options = ["--slices", "2", "--mesh.data", "2", "--output", "page"]
    folder = tmp_path_factory.mktemp("preempted")
    launched = Launched(folder, *options, ends=f"{GOES_ON} {FINISHES}")
    assert launched.status == 0, launched.err
    return launched


def test_after_a_preemption_other_machines_are_requested(preempted):
    attempt = ["scp", "ssh", "ssh", "ssh"]  # install, start, follow
    expected = ["create", "ssh", *attempt, "delete", "create", *attempt, "storage"]
    assert verbs(preempted.cloud) == expected


def test_after_a_preemption_the_same_run_goes_on(preempted):
    done = runs(preempted.cloud)
    assert sorted(run["host"] for run in done) == sorted(["0-0", "0-1", "1-0", "1-1"] * 2)
    expected = ["train", EXPERIMENT, "--workdir", WORKDIR, "--mesh.data", "2", "--distributed"]
    assert all(run["arguments"] == expected for run in done)


def test_the_hosts_of_an_attempt_share_a_secret_that_the_next_has_not(preempted):
    secrets = [run["secret"] for run in runs(preempted.cloud)]
    assert all(len(secret) == 64 for secret in secrets)
    assert [secrets.count(secret) for secret in secrets] == [4] * 8


def test_the_secret_does_not_stay_on_the_workstation(preempted):
    folder = preempted.checkout / "runs" / "launch" / "pod"
    assert [path.name for path in folder.iterdir()] == ["dcmdp.tar.gz"]


def test_every_host_gets_the_experiment_as_it_is_on_the_workstation(preempted):
    text = (preempted.checkout / EXPERIMENT).read_text()
    assert {run["experiment"] for run in runs(preempted.cloud)} == {text}


def test_the_log_of_process_0_is_shown(preempted):
    assert preempted.out.split("\n").count("step 1") == 2  # once an attempt


def test_the_report_is_downloaded(preempted):
    report = preempted.checkout / "page" / "report.html"
    assert report.read_text() == f"{WORKDIR}/report.html"


def test_what_still_costs_is_said(preempted):
    assert "gcloud compute tpus queued-resources delete pod --force" in preempted.err


@pytest.mark.full
@pytest.mark.parametrize("status", [1, 2, 130])
def test_a_run_that_ends_on_machines_that_stay_is_not_started_again(status, cloud, experiment):
    (cloud / "ends").write_text(f"{status} ACTIVE")
    assert main(["launch", "pod", experiment, *WHERE]) == status
    assert len(runs(cloud)) == 2  # one for each host


@pytest.mark.full
def test_preemptions_beyond_restarts_end_it(cloud, experiment, capfd):
    """What still costs is said even with --delete."""
    (cloud / "ends").write_text(f"{GOES_ON} {GOES_ON}")
    assert main(["launch", "pod", experiment, *WHERE, "--restarts", "1", "--delete"]) == 1
    said = capfd.readouterr().err
    assert "pod was preempted 2 times" in said
    assert "costs until it is deleted: gcloud compute tpus queued-resources delete pod" in said


@pytest.mark.full
def test_a_run_that_goes_on_is_shown_and_left_alone(cloud, experiment):
    home = cloud / "hosts" / "0-0"
    home.mkdir(parents=True)
    for name, text in {"pid": "999999999", "status": "0", "log": "step 9\n"}.items():
        (home / f"dcmdp.{name}").write_text(text)
    (cloud / "state").write_text("ACTIVE")
    (cloud / "running").touch()
    assert main(["launch", "pod", experiment, *WHERE]) == 0
    assert verbs(cloud) == ["ssh", "ssh", "storage"]  # whether it runs, its log


def test_a_request_that_failed_is_named_and_not_repeated(cloud, experiment, capfd):
    (cloud / "state").write_text("FAILED")
    assert main(["launch", "pod", experiment, *WHERE]) == 1
    assert verbs(cloud) == []
    assert "queued-resources describe pod" in capfd.readouterr().err


def test_ctrl_c_on_the_workstation_leaves_the_run_and_its_machines(
    cloud, experiment, monkeypatch, capfd
):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(launch, "_attempt", interrupt)
    assert main(["launch", "pod", experiment, *WHERE, "--delete"]) == 130
    assert "the run on pod goes on" in capfd.readouterr().err
    assert (cloud / "state").read_text() == "ACTIVE"


@pytest.mark.full
def test_with_delete_nothing_is_left(cloud, experiment):
    (cloud / "ends").write_text(FINISHES)
    assert main(["launch", "pod", experiment, *WHERE, "--delete"]) == 0
    assert not (cloud / "hosts").exists()


# What is refused


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (("--workdir", "runs/one"), "--workdir runs/one is not gs://BUCKET/FOLDER"),
        (("--accelerator-type", "v7x-8"), "--accelerator-type v7x-8 is none of v4, v5litepod"),
        (("--slices", "2"), "--slices 2 does not divide mesh.data=1"),
        (("--slices", "0"), "--slices must be at least 1"),
        (("--stepz", "3"), "--stepz is no option"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(changed, said, cloud, experiment, capsys):
    assert main(["launch", "pod", experiment, *WHERE, *changed]) == 2
    assert said in capsys.readouterr().err
    assert calls(cloud) == []


def test_an_experiment_outside_a_checkout_is_refused(cloud, tmp_path, capsys):
    path = tmp_path / "mine.py"
    shutil.copy(ROOT / "experiments" / "quickstart.py", path)
    assert main(["launch", "pod", str(path), *WHERE]) == 2
    assert "lies in no checkout of this repository" in capsys.readouterr().err


# The recipes


@pytest.fixture
def pod():
    """The pod of the manifest's one job."""
    manifest = yaml.safe_load((PODS / "jobset.yaml").read_text())
    [job] = manifest["spec"]["replicatedJobs"]
    return job["template"]["spec"]


def check_training(words, monkeypatch):
    """Checks that words are those of a distributed training with options that exist."""
    monkeypatch.chdir(ROOT)
    program, command, experiment, *options = words
    assert (pathlib.Path(program).name, command) == ("dcmdp", "train")
    options.remove("--distributed")
    workdir = options.index("--workdir")
    del options[workdir : workdir + 2]
    override(load_experiment(experiment), overrides(options))


def test_the_manifest_runs_a_distributed_training_with_valid_options(pod, monkeypatch):
    [container] = pod["template"]["spec"]["containers"]
    check_training(container["command"], monkeypatch)


def test_the_manifest_starts_a_process_for_each_host_of_the_slice(pod):
    [container] = pod["template"]["spec"]["containers"]
    chips_of_a_host = container["resources"]["limits"]["google.com/tpu"]
    assert pod["parallelism"] == pod["completions"] == 4 * 4 * 4 // chips_of_a_host


def test_the_manifest_takes_the_secret_from_a_kubernetes_secret(pod):
    [container] = pod["template"]["spec"]["containers"]
    [secret] = [entry for entry in container["env"] if entry["name"] == "DCMDP_SECRET"]
    assert secret["valueFrom"]["secretKeyRef"] == {"name": "dcmdp", "key": "secret"}


@pytest.fixture
def task():
    """The task of SkyPilot."""
    return yaml.safe_load((PODS / "sky.yaml").read_text())


def test_the_task_runs_a_distributed_training_with_valid_options(task, monkeypatch):
    words = shlex.split(task["run"].replace("\\\n", " "))
    check_training(words[words.index(".venv/bin/dcmdp") :], monkeypatch)


def test_the_task_installs_the_lock(task):
    assert f"--no-deps -r {launch.LOCK}" in task["setup"]


def test_the_task_has_a_secret_and_the_system_image_of_its_tpus(task):
    assert task["secrets"] == {"DCMDP_SECRET": None}
    resources = task["resources"]
    kind = resources["accelerators"].removeprefix("tpu-")
    assert resources["accelerator_args"] == {"runtime_version": launch.runtime_of(kind)}
