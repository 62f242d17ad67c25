"""Messages about exceptions: whose fault they are, and in which line."""

import json
import types

import jax
import jax.numpy as jnp
import pytest

from dcmdp_jax import config_checks, errors, optimizers
from dcmdp_jax.experiment import override, run_file
from dcmdp_jax.run.record import read_record


def caught(function):
    try:
        function()
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


def test_a_refusal_of_the_project_is_its_own_message(tmp_path):
    error = caught(lambda: read_record(tmp_path))
    assert errors.user_message(error) == str(error)


def test_a_user_s_function_that_the_project_calls_is_named_by_its_line(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("import json\n\n\ndef optimizer(algorithm):\n    return json.loads('{')\n")
    algorithm = types.SimpleNamespace(optimizer=run_file(str(file), "experiment")["optimizer"])
    error = caught(lambda: optimizers.from_config(algorithm))
    assert errors.user_message(error).startswith(
        f"{file}, line 5: JSONDecodeError: Expecting property name"
    )


def error_of(tmp_path, source):
    """The exception of an experiment file, whose only one is of a user's function."""
    file = tmp_path / "mine.py"
    file.write_text(source)
    return file, caught(lambda: run_file(str(file), "experiment"))


def test_the_user_s_lines_are_shown_as_in_a_traceback(tmp_path):
    source = "def table(name):\n    return {}[name]\n\n\nCONFIG = table('b')\n"
    file, error = error_of(tmp_path, source)
    shown = [line for line in errors.user_code(error).splitlines() if set(line) - set(" ^~")]
    assert shown == [
        f'  File "{file}", line 5, in <module>',
        "    CONFIG = table('b')",
        f'  File "{file}", line 2, in table',
        "    return {}[name]",
    ]


def test_the_line_of_a_syntax_error_is_shown(tmp_path):
    file, error = error_of(tmp_path, "x = (1,\ny = 2\n")
    assert errors.user_code(error).splitlines()[:2] == [f'  File "{file}", line 1', "    x = (1,"]


def test_an_error_without_lines_of_a_user_shows_none():
    assert errors.user_code(caught(lambda: config_checks.scalar_fields(3))) == ""


@pytest.mark.parametrize(
    "folder, of_library",
    [
        ("home/.local/lib/python3/site-packages/helper", True),  # pip install --user
        ("venv/lib64/python3/site-packages", True),
        ("base/lib/python3/dist-packages", True),
        ("my-site-packages", False),
        ("site-packages.old", False),
        ("lib/python3", False),
    ],
)
def test_a_library_s_line_is_not_the_user_s_wherever_it_is_installed(tmp_path, folder, of_library):
    library = tmp_path / folder / "library.py"
    mine = tmp_path / "mine.py"
    library.parent.mkdir(parents=True)
    library.write_text("def fail():\n    raise RuntimeError('no')\n")
    mine.write_text(
        "import runpy\n"
        f"fail = runpy.run_path({str(library)!r})['fail']\n"
        "def optimizer(algorithm):\n"
        "    return fail()\n"
    )
    algorithm = types.SimpleNamespace(optimizer=run_file(str(mine), "experiment")["optimizer"])
    line = errors.user_code_line(caught(lambda: optimizers.from_config(algorithm)))
    assert line == (f"{mine}, line 4" if of_library else f"{library}, line 2")


def test_a_fault_of_the_project_s_own_keeps_its_traceback():
    """An error of another kind that no line of a user's has to do with."""
    assert errors.user_message(caught(lambda: config_checks.scalar_fields(3))) is None


def test_what_comes_before_the_project_is_no_user_s_fault():
    assert errors.user_code_line(caught(lambda: override(None, {}))) is None


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), ImportError("no module\nof that name")]
)
def test_the_machine_s_faults_are_one_line(error):
    said = errors.user_message(error)
    assert said == " ".join(str(error).split()) and "\n" not in said


def test_too_little_memory_on_a_device_names_the_plan():
    said = errors.user_message(caught(lambda: jax.block_until_ready(jnp.zeros(1 << 48))))
    assert said.startswith("a device has too little memory (RESOURCE_EXHAUSTED: ")
    assert said.endswith("dcmdp plan shows what each program of the experiment needs")


def test_long_messages_are_cut():
    assert len(errors.one_line(ValueError("x" * 9999))) == errors.LONGEST + 3


def test_an_error_s_type_stands_before_its_message():
    error = caught(lambda: json.loads(""))
    assert errors.type_and_message(error).startswith("JSONDecodeError: Expecting value")
