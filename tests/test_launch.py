"""The launch recipes, as far as they go without a TPU: parsed, run dry, with options that exist."""

import os
import pathlib
import shlex
import subprocess

import pytest
import yaml

from dcmdp_jax.cli.fields import overrides
from dcmdp_jax.experiment import load_experiment, override

ROOT = pathlib.Path(__file__).parents[1]
SCRIPT = ROOT / "experiments" / "pods" / "launch.sh"


def dry_run(*arguments):
    return subprocess.run(
        ["bash", SCRIPT, "--dry-run", *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"REPOSITORY": "https://example.org/it's here.git"},
    )


@pytest.fixture
def launched():
    """The dry run of a training command with quotes in its arguments."""
    return dry_run(
        "pod",
        "us-east5-a",
        "experiments/pods/dcgrpo_8b_bf16.py",
        "--workdir",
        "/bucket/run",
        "--model.folder",
        "a folder's name",
    )


def test_the_script_is_valid_bash():
    subprocess.run(["bash", "-n", SCRIPT], check=True)


def test_the_command_goes_to_all_workers(launched):
    assert launched.returncode == 0
    assert launched.stdout.startswith(
        "gcloud compute tpus tpu-vm ssh pod --zone us-east5-a --worker=all --command set -e"
    )


def test_the_command_on_the_workers_is_valid_bash_and_quotes_its_arguments(launched):
    script = launched.stdout.split("--command ", 1)[1]
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    assert shlex.split(script.strip().splitlines()[-1]) == [
        "exec",
        ".venv/bin/dcmdp",
        "train",
        "experiments/pods/dcgrpo_8b_bf16.py",
        "--workdir",
        "/bucket/run",
        "--model.folder",
        "a folder's name",
        "--distributed",
    ]


def test_a_missing_workdir_is_named():
    refused = dry_run("pod", "us-east5-a", "experiments/pods/dcgrpo_8b_bf16.py")
    assert refused.returncode == 2 and "give --workdir" in refused.stderr


def test_missing_arguments_are_refused():
    assert dry_run("pod").returncode == 2


@pytest.fixture
def pod():
    """The pod of the manifest's one job."""
    manifest = yaml.safe_load((ROOT / "experiments" / "pods" / "jobset.yaml").read_text())
    [job] = manifest["spec"]["replicatedJobs"]
    return job["template"]["spec"]


def test_the_manifest_runs_a_distributed_training_with_valid_options(pod, monkeypatch):
    monkeypatch.chdir(ROOT)
    [container] = pod["template"]["spec"]["containers"]
    program, command, experiment, *options = container["command"]
    assert (program, command) == ("dcmdp", "train")
    options.remove("--distributed")
    workdir = options.index("--workdir")
    del options[workdir : workdir + 2]
    override(load_experiment(experiment), overrides(options))


def test_the_manifest_starts_a_process_for_each_host_of_the_slice(pod):
    [container] = pod["template"]["spec"]["containers"]
    chips_of_a_host = container["resources"]["limits"]["google.com/tpu"]
    assert pod["parallelism"] == pod["completions"] == 4 * 4 * 4 // chips_of_a_host
