"""docs/metrics.md explains every key of a row of metrics.jsonl, and no other."""

import ast
import csv
import dataclasses
import inspect
import math
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcmdp_jax import acceptance, compiled_step, dynamic_sampling, step, step_metrics, train_state
from dcmdp_jax.batches import Collected
from dcmdp_jax.dynamic_sampling import Draw
from dcmdp_jax.evaluation import held_out
from dcmdp_jax.losses import kl
from dcmdp_jax.monitoring import measurements, metrics, quantities
from dcmdp_jax.run.recovery import NOT_IN_ROW, StepTaken
from dcmdp_jax.tokens import packing
from support.steps import MODEL, ONE, B, make_config, make_scored

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "metrics.md"
RESULTS = pathlib.Path(__file__).parents[1] / "experiments" / "laptop" / "results" / "main.csv"
RANGES = {
    "delta over delta at step 1": "delta_mean",
    "k3": "k3",
    "entropy": "entropy",
    "gradient norm": "grad_norm",
}
SOURCES = ("SOURCE",) * B
# modules whose dictionaries are metrics, but for what `of_samples` names
MEASURING = (
    acceptance,
    compiled_step,
    dynamic_sampling,
    held_out,
    measurements,
    step,
    step_metrics,
)
OF_SAMPLES = {"prompt", "completion", "reward"}  # what `held_out` keeps of a completion


def explained():
    """The keys in the first cells of the page's tables."""
    cells = re.findall(r"^\| (`[^|]+) \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    return [key for cell in cells for key in re.findall(r"`([^`]+)`", cell)]


def of_step(config):
    """The keys of a step's metrics; the step is traced, and not compiled."""
    batch = packing.pack(
        make_scored(),
        minibatches=1,
        microbatches=1,
        row_length=24,
        share_prompts=True,
        with_versions=config.rollout.in_flight,
    )
    state = train_state.abstract(config, MODEL, ONE)
    _, values = jax.eval_shape(compiled_step.compile_step(config, MODEL, ONE), state, batch)
    return values


def with_options():
    """Configurations that measure, together, all that a step can measure."""
    config = make_config(
        reference_penalty=kl.k3,
        entropy_coefficient=0.01,
        update_scale=lambda logp, rollout_logp, mask, steps: jnp.float32(1.0),
    )
    rollout = dataclasses.replace(
        config.rollout, staleness=1, in_flight=True, server="http://127.0.0.1:1"
    )
    return (
        dataclasses.replace(config, rollout=rollout),
        make_config(accept=lambda old_logp, rollout_logp, advantage, mask: jnp.bool_(True)),
    )


def of_host():
    """What the host measures of a batch with refills, and of a verifier with a time limit."""
    scored = make_scored()
    scored = scored._replace(failed=np.zeros(len(scored.reward), bool))
    draw = Draw(dynamic_sampling.arrays_of(scored), SOURCES)
    rounds = [dynamic_sampling.summary(draw)]
    batch = packing.pack(scored, minibatches=1, microbatches=1, row_length=24)
    return (
        measurements.measure(*draw)
        | measurements.measure_rows(scored, batch)
        | dynamic_sampling.measure(rounds, draw)
    )


@pytest.fixture(scope="module")
def row(tmp_path_factory):
    """The row of a step, as a run writes it, that has all keys that any run's has."""
    values = {}
    for config in with_options():
        values |= of_step(config)
    values = {name: np.float32(0) for name in values}
    taken = StepTaken(None, values, Collected(None, of_host(), None), 0.0)
    folder = tmp_path_factory.mktemp("run")
    with metrics.Log(folder, make_config()) as log:
        log.write(1, taken.row() | dict.fromkeys(dict(quantities.HELD_OUT), math.nan))
    return metrics.read(folder)[0]


def test_every_key_of_a_row_is_explained(row):
    assert sorted(row.keys() - set(explained())) == []


def test_every_key_that_is_explained_is_in_a_row(row):
    assert sorted(set(explained()) - row.keys()) == []


def test_no_key_is_explained_twice():
    keys = explained()
    assert len(set(keys)) == len(keys) > 60


def test_the_row_has_all_that_the_package_measures(row):
    """Every literal key in the modules that measure: an option that adds one is to be switched on
    in `with_options`.
    """
    literal = set()
    for module in MEASURING:
        for node in ast.walk(ast.parse(inspect.getsource(module))):
            keys = node.keys if isinstance(node, ast.Dict) else []
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Subscript):
                keys = [node.targets[0].slice]
            literal |= {key.value for key in keys if isinstance(key, ast.Constant)}
    assert len(literal) > 30
    assert sorted(literal - row.keys() - {*NOT_IN_ROW, *OF_SAMPLES}) == []


def test_every_quantity_that_people_look_at_has_its_name_on_the_page():
    text = PAGE.read_text(encoding="utf-8")
    assert [each.name for each in quantities.QUANTITIES if f'"{each.name}"' not in text] == []


def test_the_ranges_are_those_of_the_study():
    """Of each run with a gap the last evaluation, by whether its engine's policy was lost."""
    runs = {}
    with open(RESULTS, encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if not row["arm"].startswith("none"):
                runs.setdefault((row["arm"], row["seed"]), []).append(row)
    kept = {True: [], False: []}
    for rows in runs.values():
        rows.sort(key=lambda row: int(row["step"]))
        last = {name: float(rows[-1][name]) for name in RANGES.values()}
        last["delta_mean"] /= float(rows[0]["delta_mean"])
        pass_rates = [float(rows[i]["reward_eval_infer"]) for i in (0, -1)]
        kept[pass_rates[1] >= pass_rates[0] - 0.06].append(last)
    text = PAGE.read_text(encoding="utf-8")
    assert f"| | {len(kept[True])} other runs | {len(kept[False])} runs collapsed |" in text
    for name, key in RANGES.items():
        ranges = [spread(kept[is_kept], key) for is_kept in (True, False)]
        assert f"| {name} | {' | '.join(ranges)} |" in text


def spread(runs, key):
    values = [run[key] for run in runs]
    return f"{min(values):.2g} to {max(values):.2g}"
