"""The measurement of an accelerator: parts that fail cost themselves alone; all of it on a CPU."""

import json
import subprocess
import sys

import pytest

from benchmarks import bounded
from support.training import child_environment

PARTS = """
import os, sys, time
from benchmarks import bounded

def measure(name):
    if name == "hangs":
        yield "before"
        time.sleep(3600)
    if name == "raises":
        yield "before"
        raise RuntimeError("no memory")
    if name == "ends":
        os._exit(3)
    yield name

bounded.answer(sys.argv[1], sys.argv[2:], measure, str)
"""
LIMITS = {"one": 60, "hangs": 1, "raises": 60, "ends": 60, "two": 60}


def test_a_part_that_fails_is_named_and_the_others_go_on(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", child_environment()["PYTHONPATH"])
    results = list(bounded.run([sys.executable, "-c", PARTS], LIMITS, seconds=300))
    assert results == [
        ("one", ["one"], ""),
        ("hangs", ["before"], "it took more than 1 s"),
        ("raises", ["before"], "no memory"),
        ("ends", [], "its process ended with 3"),
        ("two", ["two"], ""),
    ]


def test_parts_that_no_time_is_left_for_are_named():
    results = list(bounded.run([sys.executable, "-c", PARTS], LIMITS, seconds=0))
    assert [result.part for result in results] == list(LIMITS)
    assert {result.failure for result in results} == {"no time was left of 0 s"}


@pytest.mark.slow
def test_every_kind_of_part_is_measured_on_a_cpu(tmp_path):
    parts = ["device", "train 8B", "decode MoE", "attention", "quickstart"]
    file = tmp_path / "figures.json"
    words = ["--toy", "--minutes", "20", "--json", str(file), "--parts", *parts]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.accelerator", *words],
        env=child_environment(),
        capture_output=True,
        text=True,
    )
    record = json.loads(file.read_text())
    assert not record["failures"] and done.returncode == 0, done.stderr
    assert list(dict.fromkeys(figure["part"] for figure in record["figures"])) == parts
    assert all(figure["value"] > 0 and figure["device"] == "cpu" for figure in record["figures"])
    errors = [figure["value"] for figure in record["figures"] if "error" in figure["name"]]
    assert len(errors) == 4 and max(errors) < 2**-6  # of bfloat16
    assert all(figure["name"] in done.stdout for figure in record["figures"])
