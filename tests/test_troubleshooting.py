"""docs/troubleshooting.md quotes the program's own messages, and names what there is."""

import ast
import dataclasses
import operator
import pathlib
import re

import pytest

from dcmdp_jax import constraint
from dcmdp_jax.experiment import load_experiment
from dcmdp_jax.losses import advantages, corrections, step_size

ROOT = pathlib.Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
QUOTED = [
    line
    for block in re.findall(r"```text\n(.*?)```", PAGE, re.DOTALL)
    for line in block.splitlines()
]
CONFIG = load_experiment(str(ROOT / "experiments" / "quickstart.py"))
NAMESPACES = {
    "constraint": constraint,
    "advantages": advantages,
    "corrections": corrections,
    "step_size": step_size,
}
FIELD = "\0"  # where a message has a value


def templates():
    """The texts of the package, with FIELD for each value in one."""
    for path in sorted((ROOT / "dcmdp_jax").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (getattr(part, "value", FIELD) for part in node.values)
                yield "".join(part if isinstance(part, str) else FIELD for part in parts)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


# long enough to be told apart
TEMPLATES = {text.rstrip() for text in templates() if len(text.replace(FIELD, "").strip()) >= 12}
SHORT = 30  # characters that a value may have unseen


def is_said(line):
    """True if a template makes the line, or its end, and what fills its fields is short, another
    template's, or less than half of the line.
    """
    if len(line) <= SHORT:
        return True
    for text in TEMPLATES:
        pattern = "(.*?)" + "(.+?)".join(map(re.escape, text.split(FIELD)))
        found = re.fullmatch(pattern, line)
        if not found:
            continue
        if len(text.replace(FIELD, "")) >= len(line) / 2 or all(map(is_said, found.groups())):
            return True
    return False


@pytest.mark.parametrize("line", QUOTED)
def test_a_quoted_message_is_the_programs(line):
    assert is_said(line)


def test_a_message_of_no_program_is_none():
    assert not is_said("rollout.slots=63 does not divide over the 2 batch shards of the mesh")


def test_many_messages_are_quoted():
    assert len(QUOTED) > 20


def exists(name):
    """True for a field of the configuration, and for a public name of the losses or `constraint`,
    by its dotted name.
    """
    try:
        operator.attrgetter(name)(CONFIG)
    except AttributeError:
        module, _, function = name.partition(".")
        return hasattr(NAMESPACES.get(module), function)
    return True


@pytest.mark.parametrize("page", ["metrics.md", "troubleshooting.md"])
def test_settings_and_functions_that_a_page_names_exist(page):
    sections = "|".join(field.name for field in dataclasses.fields(CONFIG))
    names = set(
        re.findall(
            rf"`(?:--|\w+=)?((?:{sections}|{'|'.join(NAMESPACES)})\.(?!jsonl)[a-z_.0-9]*[a-z_0-9])",
            (ROOT / "docs" / page).read_text(encoding="utf-8"),
        )
    )
    assert len(names) > 15
    assert sorted(name for name in names if not exists(name)) == []
