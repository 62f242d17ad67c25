"""The README: short, with an example that runs. All pages: links, files and options that exist."""

import pathlib
import re
import subprocess
import sys

import pytest

from dcmdp_jax.config_checks import scalar_fields
from dcmdp_jax.experiment import load_experiment

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]


def test_it_has_at_most_900_words():
    assert len(README.split()) <= 900


def test_it_has_the_two_commands_that_ci_runs():
    assert len(re.findall(r"```bash\n", README)) == 2


def test_the_python_example_prints_what_it_says():
    example = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    printed = subprocess.run(
        [sys.executable, "-c", example], check=True, capture_output=True, text=True
    ).stdout
    assert printed.strip() == example.strip().rpartition("# ")[2]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    targets = re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8"))
    local = [target for target in targets if not target.startswith("http")]
    assert not [target for target in local if not (page.parent / target).exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_names_exist(page):
    names = set(re.findall(r"`([\w.]+/[\w./]+\.(?:py|yaml|sh))`", page.read_text("utf-8")))
    roots = (ROOT, ROOT / "dcmdp_jax")
    assert not [name for name in names if not any((root / name).exists() for root in roots)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_options_that_a_page_names_exist(page):
    fields = scalar_fields(load_experiment(str(ROOT / "experiments" / "gsm8k.py")))
    options = set(re.findall(r"--([a-z_]+\.[a-z0-9_.]*[a-z0-9_])", page.read_text("utf-8")))
    assert not options - set(fields)


def test_the_walk_names_files_of_the_package():
    walk = README.split("## The walk")[1].split("## More")[0]
    names = re.findall(r"`([\w/]+(?:\.py|/))`", walk)
    assert len(names) > 20
    assert not [name for name in names if not (ROOT / "dcmdp_jax" / name).exists()]


def test_the_walk_names_every_module_at_the_top_of_the_package():
    modules = {path.name for path in (ROOT / "dcmdp_jax").glob("[!_]*.py")}
    assert not {name for name in modules if f"`{name}`" not in README}
