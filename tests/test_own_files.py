"""The experiment files of docs/bring_your_own.md: each trains two steps of a smaller model."""

import dataclasses
import pathlib

import jax
import numpy as np
import pytest

from dcmdp_jax import data
from dcmdp_jax.experiment import load_experiment, override
from dcmdp_jax.models import decoder
from dcmdp_jax.optimizers import matrices
from support.training import options, rows, saved, train

ROOT = pathlib.Path(__file__).parents[1]
# what the tiny model of the tests has, and a file's own problems do not fit
OWN_SIZES = {
    "own_reward": {},
    "own_task": {"data.max_prompt_tokens": 9, "rollout.max_tokens": 10},
    "own_data": {"data.max_prompt_tokens": 12, "rollout.max_tokens": 33},
    "own_model": {},
    "own_optimizer": {},
}
NOT_CHAIN = ("own_task", "own_data")  # their problems have a size of their own


def load(name):
    return load_experiment(str(ROOT / "experiments" / f"{name}.py"))


def small(name):
    changes = options(**OWN_SIZES[name], steps=2)
    if name in NOT_CHAIN:
        del changes["data.task.operations"]
    return override(load(name), changes)


@pytest.fixture(scope="module", params=OWN_SIZES)
def finished(request, tmp_path_factory):
    """An experiment, and the folder and the last state of its run."""
    workdir = tmp_path_factory.mktemp(request.param)
    experiment = small(request.param)
    return experiment, workdir, train(experiment, workdir)


@pytest.mark.full
def test_it_trains(finished):
    _, workdir, state = finished
    assert int(state.step) == 2 and int(state.skipped) == 0
    assert all(np.isfinite(row["reward"]) for row in rows(workdir))


@pytest.mark.full
def test_its_engine_has_a_gap_to_constrain(finished):
    assert all(row["delta_mean"] > 1e-5 for row in rows(finished[1]))


@pytest.mark.parametrize("name", [*OWN_SIZES, "own_sampler", "own_adapter"])
def test_a_file_is_short(name):
    text = (ROOT / "experiments" / f"{name}.py").read_text()
    lines = [line for line in text.split('"""', 2)[2].splitlines() if line.strip()]
    assert len(lines) <= 60


def test_the_page_links_to_every_file():
    page = (ROOT / "docs" / "bring_your_own.md").read_text(encoding="utf-8")
    files = sorted(path.name for path in (ROOT / "experiments").glob("own_*.py"))
    assert len(files) == 7 and not [name for name in files if f"../experiments/{name})" not in page]


@pytest.fixture(scope="module")
def chain():
    """A problem of the quickstart with two operations, 3+5*2=6, and its reward function."""
    example = load("own_data").data.task
    (problem,) = dataclasses.replace(example, operations=2).held_out(1)
    return problem._replace(prompt="3+5*2=", answer="6")


@pytest.mark.parametrize(
    "text, length, reward",
    [
        ("3+5=8;8*2=6;#6", 15, 1.0),
        ("3+5=8;8*2=6;#7", 15, 0.5),
        ("3+5=9;8*2=6;#7", 15, 0.25),
        ("#6", 3, 0.5),
        ("3+5=8;8*2=6;#6", 16, 0.9),
        ("", 1, 0.0),
    ],
)
def test_the_reward_by_hand(chain, text, length, reward):
    assert load("own_reward").data.verifier(chain, text, True, length) == pytest.approx(reward)


def test_a_completion_that_was_cut_off_earns_nothing(chain):
    assert load("own_reward").data.verifier(chain, "3+5=8;8*2=6;#6", False, 15) == 0


def test_the_task_holds_other_problems_out():
    task = dataclasses.replace(load("own_task").data.task, digits=4)
    held_out = {example.prompt for example in task.held_out(11)}
    assert len(held_out) == 11
    assert not held_out & {task.example(index, 0).prompt for index in range(5000)}


def test_the_expert_of_the_task_is_right_where_there_is_no_noise():
    task = load("own_task").data.task
    rng = np.random.default_rng(0)
    examples = [task.example(index, 0) for index in range(50)]
    exact = dataclasses.replace(task, noise=0.0)
    assert all(task.reward(e, exact.solution(e, rng)) == 1 for e in examples)
    noisy = dataclasses.replace(task, noise=1.0)
    right = [task.reward(e, noisy.solution(e, rng)) for e in examples]
    assert np.mean(right) < 0.5  # equal neighbours may change places


def test_the_verifier_of_the_data_reads_its_column():
    experiment = load("own_data")
    verifier = experiment.data.verifier
    for example in data.read(experiment.data.path)[:20]:
        work = example.columns["work"]
        assert verifier(example, f"{work}#{example.answer}") == 1
        assert verifier(example, f"#{example.answer}") == 0.5
        assert verifier(example, f"{work}#") == 0


def test_held_out_problems_of_the_data_are_not_trained_on():
    experiment = load("own_data").data
    trained = {example.prompt for example in data.read(experiment.path)}
    assert not trained & {example.prompt for example in data.read(experiment.eval_path)}


def test_the_optimizer_moves_others_a_tenth_of_adams_step():
    algorithm = dataclasses.replace(load("own_optimizer").algorithm, lr_warmup_steps=0)
    optimizer = algorithm.optimizer(algorithm)
    params = {"embed": np.ones((3, 2), "float32"), "q_proj": np.ones((2, 2), "float32")}
    gradient = jax.tree.map(lambda x: x * np.float32(0.5), params)
    assert matrices(params) == {"embed": False, "q_proj": True}
    updates, _ = optimizer.update(gradient, optimizer.init(params), params)
    # the first step of Adam and of Lion is the rate times the gradient's sign
    np.testing.assert_allclose(updates["embed"], -0.1 * 3e-5, rtol=1e-4)
    np.testing.assert_allclose(updates["q_proj"], -3e-5 * (1 + 0.1), rtol=1e-4)


@pytest.mark.full
def test_a_run_of_the_optimizer_resumes_bit_for_bit(tmp_path):
    """Its state is a tree of the two optimizers' states, which a checkpoint holds."""
    experiment = small("own_optimizer")
    one_step = dataclasses.replace(experiment, steps=1)
    train(experiment, tmp_path / "whole")
    train(one_step, tmp_path / "parts")
    train(experiment, tmp_path / "parts")
    whole, _ = saved(tmp_path / "whole", experiment)
    parts, _ = saved(tmp_path / "parts", experiment)
    jax.tree.map(np.testing.assert_array_equal, whole, parts)


def test_the_model_has_a_router():
    experiment = load("own_model")
    params = jax.eval_shape(lambda: decoder.init(jax.random.key(0), experiment.model.architecture))
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    assert any("router" in path for path in paths)
