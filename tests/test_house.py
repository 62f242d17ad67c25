"""Habits of this repository that ruff does not check."""

import ast
import pathlib

ROOT = pathlib.Path(__file__).parents[1]
FOLDERS = ("dcmdp_jax", "tests", "experiments", "benchmarks", "docs")
TEXTS = {
    path.relative_to(ROOT): path.read_text(encoding="utf-8")
    for folder in FOLDERS
    for path in sorted((ROOT / folder).rglob("*.py"))
}
TREES = {path: ast.parse(text) for path, text in TEXTS.items()}


def test_no_file_has_more_than_600_lines():
    lengths = {str(path): len(text.splitlines()) for path, text in TEXTS.items()}
    assert {path: length for path, length in lengths.items() if length > 600} == {}


def test_no_line_has_more_than_100_columns():
    long = [
        f"{path}:{number}"
        for path, text in TEXTS.items()
        for number, line in enumerate(text.splitlines(), 1)
        if len(line) > 100
    ]
    assert long == []


def imported_modules(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


def test_no_test_module_imports_another():
    importers = [
        str(path)
        for path, tree in TREES.items()
        if any(module.startswith("test_") for module in imported_modules(tree))
    ]
    assert importers == []


def packs_values(assignment):
    """True for `a, b = x, y`, unless the values read a target, as in `a, b = b, a`."""
    target = assignment.targets[0]
    value = assignment.value
    if not (isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple)):
        return False
    read = {ast.unparse(part) for part in ast.walk(value) if isinstance(part, ast.expr)}
    return not any(ast.unparse(part) in read for part in target.elts)


def test_fewer_than_1_percent_of_assignments_pack_values():
    assignments = [
        (path, node)
        for path, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
    ]
    packed = [f"{path}:{node.lineno}" for path, node in assignments if packs_values(node)]
    assert len(packed) < 0.01 * len(assignments), packed
