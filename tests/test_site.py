"""The documentation site has every page, and its workflow builds it strictly.

The build itself needs the extra `docs`: .github/workflows/docs.yml runs it.
"""

import pathlib
import re

import pytest
import yaml

ROOT = pathlib.Path(__file__).parents[1]
# pages that docs/site.py makes of docstrings
REFERENCE = {f"reference/{name}.md" for name in ("losses", "constraint", "models", "rollout")}


class Loader(yaml.SafeLoader):
    """Reads MkDocs' `!ENV` as the name of the variable."""


Loader.add_constructor("!ENV", Loader.construct_scalar)


@pytest.fixture(scope="module")
def site():
    return yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Loader)


@pytest.fixture(scope="module")
def workflow():
    return yaml.safe_load((ROOT / ".github" / "workflows" / "docs.yml").read_text("utf-8"))


def leaves(nav):
    for entry in nav:
        for value in entry.values():
            yield from [value] if isinstance(value, str) else leaves(value)


def test_the_navigation_has_every_page_once(site):
    pages = {f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")}
    assert sorted(leaves(site["nav"])) == sorted({"README.md", "RESULTS.md"} | pages | REFERENCE)


def test_links_that_lead_nowhere_fail_a_strict_build(site):
    assert {"omitted_files", "unrecognized_links", "anchors"} <= site["validation"].keys()
    assert set(site["validation"].values()) == {"warn"}


def test_the_workflow_builds_strictly_what_it_publishes(site, workflow):
    steps = workflow["jobs"]["build"]["steps"]
    (build,) = (step for step in steps if step.get("run", "").startswith("mkdocs"))
    assert build["run"] == "mkdocs build --strict"
    assert {site["repo_url"], site["site_url"]} == build["env"].keys()
    (upload,) = (step for step in steps if "upload-pages-artifact" in step.get("uses", ""))
    assert upload["with"]["path"] == site["site_dir"]


def test_only_main_is_published(workflow):
    publish = workflow["jobs"]["publish"]
    assert publish["if"] == "github.ref == 'refs/heads/main'" and publish["needs"] == "build"
    assert workflow["permissions"] == {"contents": "read"}


def test_the_packages_that_build_it_are_pinned():
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    docs = re.search(r"^DOCS = \[(.*?)^\]", setup, re.DOTALL | re.MULTILINE)[1]
    needed = re.findall(r'"(.+?)"', docs)
    assert len(needed) > 4 and all(re.fullmatch(r"[\w-]+==[\d.]+", name) for name in needed)
