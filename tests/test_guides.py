"""The guides: their snippets make configurations, their names exist, the diagram follows the walk.

Nothing is trained. `dcmdp_jax.config.Config` checks itself where it is made, and what depends on
the model is checked as a run does before it compiles.
"""

import dataclasses
import functools
import importlib
import pathlib
import re
import xml.etree.ElementTree

import jax
import numpy as np
import pytest

from dcmdp_jax import compiled_step, sharding
from dcmdp_jax.config import Config
from dcmdp_jax.run import inputs

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / "docs"
GUIDES = ("which_correction", "coming_from", "how_it_works")
WITH_SNIPPETS = ("which_correction", "coming_from")
SECTIONS = ("model", "data", "rollout", "algorithm", "constraint", "warmup", "eval", "checkpoint")
# where a name such as `corrections.tis` is found
MODULES = {
    name: f"dcmdp_jax.losses.{name}"
    for name in (
        *("advantages", "centering", "corrections", "covariance", "kl", "policy", "reduce"),
        *("rejection", "sequence", "step_size"),
    )
} | {name: f"dcmdp_jax.{name}" for name in ("constraint", "optimizers", "reference")}


def page(name):
    return (DOCS / f"{name}.md").read_text(encoding="utf-8")


@functools.cache
def configurations(name):
    """Runs the snippets of a page as one file; returns the configurations that they make."""
    source = "\n".join(re.findall(r"```python\n(.*?)```", page(name), re.DOTALL))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "experiments"))
        namespace = {}
        exec(compile(source, f"{name}.md", "exec"), namespace)
    quickstart = namespace.pop("QUICKSTART")
    made = {key: value for key, value in namespace.items() if isinstance(value, Config)}
    return quickstart, made


@pytest.mark.parametrize("name", WITH_SNIPPETS)
def test_each_snippet_makes_another_experiment(name):
    quickstart, made = configurations(name)
    made_twice = [a for a in made for b in made if a < b and made[a] == made[b]]
    assert made and quickstart not in made.values() and not made_twice
    snippets = re.findall(r"```python\n(.*?)```", page(name), re.DOTALL)
    without = [s for s in snippets if not any(re.search(rf"^{key} =", s, re.M) for key in made)]
    assert len(without) <= 1  # the imports


@pytest.mark.parametrize("name", WITH_SNIPPETS)
def test_what_a_snippet_makes_is_accepted_by_a_run(name):
    for config in configurations(name)[1].values():
        meshes = sharding.meshes(config, jax.devices()[:1])
        inputs.check(config, config.model.architecture, *meshes, engines=1)
        compiled_step.in_one_pass(config)


@pytest.mark.parametrize("name", WITH_SNIPPETS)
def test_the_functions_of_a_snippet_give_finite_losses(name):
    """Each is called once, on arrays whose padding holds garbage."""
    random = np.random.default_rng(0)
    logp, old_logp, rollout_logp = np.log(random.uniform(0.1, 0.9, (3, 8, 5))).astype("float32")
    mask = np.arange(5) < np.arange(1, 9)[:, None]
    rollout_logp[~mask] = 1e4
    advantage = random.normal(size=(8, 5)).astype("float32")
    for config in configurations(name)[1].values():
        algorithm, shaping = config.algorithm, config.constraint.shaping
        top = {}
        if k := config.rollout.top_logprobs:
            top = dict.fromkeys(("top_logp", "top_rollout_logp"), np.full((8, 5, k), -3, "float32"))
        shaped = advantage
        if shaping:
            shaped = shaping(advantage, old_logp, rollout_logp, 0.1, 0.004, mask)
        loss = algorithm.reduce(
            *algorithm.surrogate(logp, old_logp, rollout_logp, shaped, mask, **top)
        )
        values = [loss]
        if config.constraint.penalty:
            values.append(config.constraint.penalty(logp, rollout_logp, mask, 0.1))
        if algorithm.update_scale:
            values.append(algorithm.update_scale(logp, rollout_logp, mask, 1))
        if algorithm.accept:
            values.append(algorithm.accept(old_logp, rollout_logp, advantage, mask))
        assert float(loss) != 0 and all(np.isfinite(value).all() for value in values)


def fields(cls, prefix):
    """The dotted names of the fields of a configuration's section."""
    names = {f"{prefix}.{item.name}" for item in dataclasses.fields(cls)}
    for item in dataclasses.fields(cls):
        default = item.default
        if dataclasses.is_dataclass(default):
            names |= fields(type(default), f"{prefix}.{item.name}")
    return names


@pytest.fixture(scope="module")
def settings():
    quickstart, _ = configurations("which_correction")
    return set().union(*(fields(type(getattr(quickstart, name)), name) for name in SECTIONS))


def our_names(name):
    """The names of this project on a page; of tables of several programs, in their first cells."""
    text = page(name)
    if name == "coming_from":
        rows = re.findall(r"^\| (.*?) \|", text, re.MULTILINE)
        text = "\n".join(rows)
    prefixes = "|".join({*SECTIONS, *MODULES})
    return set(re.findall(rf"`((?:{prefixes})\.(?!py\b)[\w.]*\w)", text))


@pytest.mark.parametrize("name", GUIDES)
def test_names_exist(name, settings):
    used = our_names(name)
    assert len(used) > 5
    for dotted in used - settings:
        module, attribute = dotted.split(".", 1)
        home = MODULES.get(module)
        assert home and hasattr(importlib.import_module(home), attribute), dotted


def test_the_walk_is_explained_in_at_most_900_words():
    assert len(page("how_it_works").split()) <= 900


def test_the_diagram_has_the_stations_of_the_walk_in_order():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    walk = re.search(r"## The walk\n\n((?:> .*\n)+)", readme)[1]
    stations = re.sub(r"[>*\n]+", " ", walk).split(",")
    svg = xml.etree.ElementTree.parse(DOCS / "how_it_works.svg").getroot()
    texts = [
        "".join(element.itertext())
        for element in svg.iter("{http://www.w3.org/2000/svg}text")
        if element.get("class") == "station"
    ]
    assert texts == [" ".join(station.split()) for station in stations]


def test_the_diagram_names_files_that_exist():
    svg = xml.etree.ElementTree.parse(DOCS / "how_it_works.svg").getroot()
    files = set(re.findall(r"[\w/]+(?:\.py|/(?=\s|$))", " ".join(svg.itertext())))
    assert len(files) >= 10
    assert not [file for file in files if not (ROOT / "dcmdp_jax" / file).exists()]
