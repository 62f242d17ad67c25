"""benchmarks/engines: what the launcher of a real vLLM refuses, and the table that was recorded."""

import csv
import os
import pathlib
import socket

import pytest

from benchmarks.engines import gaps, process, vllm_server

REPOSITORY = pathlib.Path(__file__).parents[1]


@pytest.fixture
def program(tmp_path, monkeypatch):
    """A program in vLLM's place that ends at once."""
    path = tmp_path / "python"
    path.write_text("#!/bin/sh\necho $$\nexit 3\n")
    path.chmod(0o755)
    monkeypatch.setattr(vllm_server, "PYTHON", path)


def test_a_port_that_another_program_listens_on_is_refused(program, tmp_path):
    """Before anything is started: its log would exist."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(RuntimeError, match=f"another program listens on port {port}"):
            vllm_server.Server(tmp_path, port=port, log=tmp_path / "vllm.log")
    assert not (tmp_path / "vllm.log").exists()


def test_a_server_that_ended_is_not_ready_though_its_port_answers(program, tmp_path, monkeypatch):
    log = tmp_path / "vllm.log"

    def answers(url):
        if log.read_text().endswith("\n"):
            os.waitid(os.P_PID, int(log.read_text()), os.WEXITED | os.WNOWAIT)  # it has ended
            return True
        return False

    monkeypatch.setattr(process, "answers", answers)
    with pytest.raises(RuntimeError, match="vLLM ended with status 3:"):
        vllm_server.Server(tmp_path, log=log, seconds=60)


def recorded_gaps():
    """Returns the rows of gaps.csv."""
    with (REPOSITORY / "benchmarks" / "engines" / "gaps.csv").open() as table:
        return [list(row.values()) for row in csv.DictReader(table)]


def test_the_table_of_the_docs_is_the_recorded_one():
    recorded = recorded_gaps()
    page = (REPOSITORY / "docs" / "engine.md").read_text().split("\n## A real engine\n")[1]
    lines = [line for line in page.split("\n## ")[0].splitlines() if line.startswith("| ")][1:]
    assert len(recorded) == len(lines) == 11
    for (engine, form, _, delta, error, *rest, clipped), line in zip(recorded, lines):
        delta, error, *rest = (x.replace("e-0", "e-") for x in (delta, error, *rest))
        clipped = "0" if clipped == "0.00%" else clipped.replace("%", " %")
        cells = [engine, form, f"{delta} ± {error}", *rest, clipped]
        assert line == f"| {' | '.join(cells)} |"


def test_the_table_of_the_readme_is_the_recorded_one():
    deltas = {(engine, form): delta for engine, form, _, delta, *_ in recorded_gaps()}
    assert gaps.summary(deltas) in (REPOSITORY / "README.md").read_text()
