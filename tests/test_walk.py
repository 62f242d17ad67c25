"""Every station of the walk once, on tiny models; the stations' own files test each in full."""

import os
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from dcmdp_jax import cli
from dcmdp_jax.experiment import load_experiment, override
from dcmdp_jax.models import decoder, weights
from support import engines, hosts_experiment, reference_hf, training
from support.pages import Page

EXPERIMENT = hosts_experiment.__file__
OPTIONS = {
    "rollout.precision.weights": "float32",
    "constraint.tolerance": "0.01",
    "warmup.steps": "0",
    "eval.every": "0",
    "checkpoint.every": "2",
}
WORDS = [word for name, value in OPTIONS.items() for word in (f"--{name}", value)]


def command(workdir, steps):
    return ["train", EXPERIMENT, "--workdir", str(workdir), *WORDS, "--steps", str(steps)]


def dcmdp(words):
    """The status of the command line with these words, on two devices."""
    return cli.main(words, jax.devices()[:2])


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """Returns the folder of a run of four steps on two devices."""
    folder = tmp_path_factory.mktemp("walk") / "run"
    assert dcmdp(command(folder, steps=4)) == 0
    return folder


def test_the_decoder_computes_what_transformers_computes(tmp_path):
    model = reference_hf.make("dense")
    model.save_pretrained(tmp_path)
    config, params = weights.load(tmp_path)
    tokens = reference_hf.tokens("dense", 2, 20)
    logits = jax.jit(decoder.logits, static_argnums=2)(params, tokens, config)
    np.testing.assert_allclose(logits, reference_hf.logits(model, tokens), atol=2e-5, rtol=0)


def test_the_engine_reports_the_trainers_log_probs():
    rollout = engines.sample(engines.DENSE)
    for logp, tokens, rollout_logp in engines.scored(engines.DENSE, rollout, 0.8):
        expected = logp[np.arange(len(tokens)), tokens]
        np.testing.assert_allclose(rollout_logp, expected, atol=1e-5, rtol=0)


def test_a_run_learns_from_a_float32_engine_without_a_gap(workdir):
    rows = training.rows(workdir)
    assert len(rows) == 4
    assert all(row["logp_diff_max"] < 1e-5 for row in rows)
    assert all(row["grad_norm"] > 1e-3 for row in rows)


def test_a_resumed_run_equals_an_uninterrupted_one(workdir, tmp_path):
    """Metrics, parameters, optimizer, multiplier and the position in the data, bit for bit."""
    assert dcmdp(command(tmp_path / "resumed", steps=2)) == 0
    assert dcmdp(command(tmp_path / "resumed", steps=4)) == 0
    config = override(load_experiment(EXPERIMENT), OPTIONS)
    training.assert_same_run(workdir, tmp_path / "resumed", config)


def test_two_processes_train_as_one_does(workdir, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")
    main = "import sys; from dcmdp_jax.cli import main; sys.exit(main())"
    together = [*command(tmp_path / "two", steps=4), "--coordinator", address, "--processes", "2"]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", main, *together, "--process", str(number)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"XLA_FLAGS": flags},
        )
        for number in range(2)
    ]
    printed = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], printed
    assert training.rows(tmp_path / "two") == training.rows(workdir)


def test_a_run_leaves_a_well_formed_page(workdir):
    page = Page((workdir / "report.html").read_text(encoding="utf-8"))
    assert page.count("svg") > 0


def test_a_run_becomes_a_folder_that_generates(workdir, tmp_path, capsys):
    folder = str(tmp_path / "model")
    assert dcmdp(["convert", EXPERIMENT, folder, "--workdir", str(workdir)]) == 0
    capsys.readouterr()
    assert dcmdp(["generate", folder, "1+2=", "--max-tokens", "8"]) == 0
    assert capsys.readouterr().out


def test_a_misspelt_option_is_refused_in_one_sentence(tmp_path, capsys):
    assert dcmdp([*command(tmp_path / "run", steps=4), "--stepz", "1"]) == 2
    assert "did you mean --steps" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
