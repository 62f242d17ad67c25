"""What `mkdocs.yml` needs of the repository: pages in their places, and docstrings as Markdown.

MkDocs reads one folder. Here the site gets the README, RESULTS.md, the pages of docs/ and all that
they link to, each at its path in the repository: a link then leads to the same place in both. The
reference is made of the docstrings by mkdocstrings.
"""

from __future__ import annotations

import pathlib
import pkgutil
import posixpath
import re
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel

ROOT = pathlib.Path(__file__).parents[1]
PAGES = ("README.md", "RESULTS.md", *(f"docs/{x.name}" for x in sorted(ROOT.glob("docs/*.md"))))
AS_THEY_ARE = (".svg", ".png", ".ipynb")  # other files that are linked become texts
REFERENCE = ("losses", "constraint", "models", "rollout")  # each a page of the site
LINK = re.compile(r"\]\(([^)#\s]+)\)")
FIELDS = re.compile(r"^(Formula|Needs|Default|Paper): (.+(?:\n[ \t]+.+)*)", re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Replaces the files of docs/ by the pages, what they link to, and the reference."""
    for file in list(files):
        if file.src_dir == config.docs_dir:
            files.remove(file)
    for name in PAGES:
        files.append(_from_repository(name, config))
    for name in sorted(_linked() - set(PAGES)):
        file = _from_repository(name, config)
        if not name.endswith(AS_THEY_ARE):
            # a browser shows a text, and hosts leave out what begins with a dot
            file.dest_uri = f"source/{name.lstrip('.')}.txt"
        files.append(file)
    for name in REFERENCE:
        text = "\n\n".join(f"::: dcmdp_jax.{module}" for module in modules_of(name))
        page = f"# dcmdp_jax.{name}\n\n{text}\n"
        files.append(File.generated(config, f"reference/{name}.md", content=page))
    return files


def _from_repository(name: str, config: MkDocsConfig) -> File:
    included = InclusionLevel.INCLUDED
    return File.generated(config, name, abs_src_path=str(ROOT / name), inclusion=included)


def _linked() -> set[str]:
    """Returns the paths of the files that pages link to; MkDocs reports those that do not exist."""
    found = set()
    for page in PAGES:
        for target in LINK.findall((ROOT / page).read_text(encoding="utf-8")):
            name = posixpath.normpath(posixpath.join(posixpath.dirname(page), target))
            if "://" not in target and (ROOT / name).is_file():
                found.add(name)
    return found


def modules_of(name: str) -> list[str]:
    """Returns a module of the package, and all public ones under it if it is a folder."""
    folder = ROOT / "dcmdp_jax" / name.replace(".", "/")
    names = sorted(module.name for module in pkgutil.iter_modules([str(folder)]))
    public = [part for part in names if not part.startswith("_")]
    return [name, *(module for part in public for module in modules_of(f"{name}.{part}"))]


class StatedFields(griffe.Extension):
    """Makes a list of the fields that docstrings state, the formula as code."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrites a docstring before it is parsed."""
        if obj.docstring:
            obj.docstring.value = FIELDS.sub(_as_item, obj.docstring.value)


def _as_item(field: re.Match) -> str:
    name, value = field[1], re.sub(r"\s*\n\s*", " ", field[2])
    return f"- **{name}:** {f'`{value}`' if name == 'Formula' else value}"
