"""The launch recipes, as far as they go without a TPU: parsed, dry-run, and speaking of options
that exist.
"""

import os
import pathlib
import shlex
import subprocess

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


def test_the_script_is_sound_and_quotes_what_it_is_given(tmp_path):
    subprocess.run(["bash", "-n", SCRIPT], check=True)
    done = dry_run(
        "pod",
        "us-east5-a",
        "experiments/pods/dcgrpo_8b_bf16.py",
        "--workdir",
        "/bucket/run",
        "--model.folder",
        "a folder's name",
    )
    assert done.returncode == 0 and done.stdout.startswith(
        "gcloud compute tpus tpu-vm ssh pod --zone us-east5-a --worker=all --command set -e"
    )
    script = done.stdout.split("--command ", 1)[1]
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    last = shlex.split(script.strip().splitlines()[-1])
    assert last == [
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
    refused = dry_run("pod", "us-east5-a", "experiments/pods/dcgrpo_8b_bf16.py")
    assert refused.returncode == 2 and "give --workdir" in refused.stderr
    assert dry_run("pod").returncode == 2


def test_the_manifest_starts_what_the_command_line_takes(monkeypatch):
    monkeypatch.chdir(ROOT)
    manifest = yaml.safe_load((ROOT / "experiments" / "pods" / "jobset.yaml").read_text())
    [job] = manifest["spec"]["replicatedJobs"]
    pod = job["template"]["spec"]
    [container] = pod["template"]["spec"]["containers"]
    program, command, experiment, *options = container["command"]
    assert (program, command) == ("dcmdp", "train") and "--distributed" in options
    fields = overrides(
        [
            word
            for word in options
            if word not in ("--distributed",)
            and not word.startswith("--workdir")
            and word != "/bucket/runs/dcgrpo_8b_bf16"
        ]
    )
    override(load_experiment(experiment), fields)
    assert (
        pod["parallelism"]
        == pod["completions"]
        == 4 * 4 * 4 // container["resources"]["limits"]["google.com/tpu"]
    )
