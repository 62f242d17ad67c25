"""The command line: overrides, and messages that name options as they were typed."""

import argparse
import fnmatch
import io
import os
import pathlib
import subprocess
import sys

import pytest

from dcmdp_jax import cli
from dcmdp_jax.cli import fields, parser
from dcmdp_jax.monitoring import screen

ROOT = pathlib.Path(__file__).parents[1]
QUICKSTART = str(ROOT / "experiments" / "quickstart.py")


def test_overrides_are_read_with_and_without_an_equals_sign():
    assert fields.overrides(["--a.b", "1", "--c=2"]) == {"a.b": "1", "c": "2"}


def test_dashes_in_an_override_are_underscores():
    assert fields.overrides(["--rollout.max-tokens", "4"]) == {"rollout.max_tokens": "4"}


@pytest.mark.parametrize(
    "words, message",
    [(["a.b"], "'a.b' is not an option"), (["--a.b"], "--a.b needs a value")],
)
def test_words_that_are_no_overrides_are_refused(words, message):
    with pytest.raises(ValueError, match=message):
        fields.overrides(words)


@pytest.mark.parametrize(
    "message, options, typed",
    [
        ("rollout.devices=-3 must be", ["--rollout.devices", "-3"], "--rollout.devices=-3 must be"),
        ("rollout.devices=-3 must be", ["--steps", "3"], "rollout.devices=-3 must be"),
        ("rollout.max_tokens=0", ["--rollout.max-tokens=0"], "--rollout.max-tokens=0"),
        ("--steps takes", ["--steps", "x"], "--steps takes"),
        ("warmup.steps=1 and steps=2", ["--steps", "2"], "warmup.steps=1 and --steps=2"),
        ("set rollout.mesh.data", ["--rollout.mesh", "2"], "set rollout.mesh.data"),
        ("wandb=True needs wandb", ["--wandb", "yes"], "--wandb=True needs wandb"),
        ("leave data.path.", ["--data.path", "x"], "leave --data.path."),
    ],
)
def test_fields_are_named_as_the_options_that_set_them(message, options, typed):
    assert fields.as_typed(message, argparse.Namespace(), options) == typed


def test_a_refusal_of_a_folder_command_names_its_own_option():
    args = parser.make().parse_args(["generate", "folder", "prompt", "--weights", "int3"])
    message = fields.as_typed("rollout.precision.weights='int3' is not", args, [])
    assert message == "--weights='int3' is not"


def test_an_import_that_takes_long_is_told(tmp_path, monkeypatch):
    """The experiment waits for the line, five seconds at most, and then ends the command."""
    wait = "next(s for s in range(5000) if 'JAX:' in sys.stderr.getvalue() or time.sleep(1e-3))"
    file = tmp_path / "slow.py"
    file.write_text(f"import sys, time\n{wait}\n1 / 0\n")
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(screen, "SILENCE", 0.0)
    monkeypatch.setattr(screen, "TICK", 0.001)
    assert cli.main(["train", str(file)]) == 2
    assert "\nloading the experiment and JAX: " in stream.getvalue()
    assert "ZeroDivisionError" in stream.getvalue()


def test_a_refusal_names_the_option_that_was_typed(capsys):
    assert cli.main(["train", QUICKSTART, "--rollout.max-tokens", "0"]) == 2
    assert "dcmdp: --rollout.max-tokens=0 must be at least 1" in capsys.readouterr().err


def test_paths_complete_as_shtab_completes_them():
    shtab = pytest.importorskip("shtab")
    assert {shell: shtab.FILE[shell] for shell in parser.PATHS} == parser.PATHS


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_shtab_writes_a_script_for_the_command(shell):
    script = pytest.importorskip("shtab").complete(parser.make(), shell=shell)
    assert "--dry-run" in script and parser.PATHS[shell] in script


def test_every_command_has_a_help_page(capsys):
    commands = (
        "train parity calibrate diagnose doctor study experiments plan generate chat eval serve "
        "convert push report"
    )
    for command in commands.split():
        with pytest.raises(SystemExit) as end:
            parser.make().parse_args([command, "--help"])
        assert end.value.code == 0


def test_a_command_whose_reader_is_gone_keeps_its_status():
    reading, writing = os.pipe()
    os.close(reading)
    code = "import sys; from dcmdp_jax import cli; sys.exit(cli.main(['experiments']))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, stdout=writing, stderr=subprocess.PIPE, text=True
    )
    os.close(writing)
    assert done.returncode == 0 and done.stderr == ""


@pytest.mark.parametrize(
    "modules, devices, variables, platform",
    [
        (["libtpu"], [], {}, "cpu"),
        ([], [], {}, None),
        (["libtpu", "jax_plugins"], [], {}, None),
        (["libtpu"], ["/dev/accel0"], {}, None),
        (["libtpu"], ["/dev/vfio/0"], {}, None),
        (["libtpu"], [], {"TPU_WORKER_ID": "0"}, None),
        (["libtpu"], [], {"JAX_PLATFORMS": "tpu"}, "tpu"),
    ],
)
def test_jax_computes_on_the_cpu_where_libtpu_has_no_tpu(
    modules, devices, variables, platform, monkeypatch
):
    for name in [name for name in os.environ if name.startswith(("JAX_PLATFORMS", "TPU_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(os, "environ", dict(os.environ) | variables)
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: name in modules)
    monkeypatch.setattr(cli.glob, "glob", lambda pattern: fnmatch.filter(devices, pattern))
    cli._leave_out_tpu()
    assert os.environ.get("JAX_PLATFORMS") == platform
