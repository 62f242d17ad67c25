"""The supervised stage: a step against transformers in float64, resuming, and the run after it."""

import dataclasses
import functools
import json
import os
import signal

import jax
import numpy as np
import optax
import pytest

from dcmdp_jax import sharding, train_state
from dcmdp_jax.config import MeshConfig, WarmupConfig
from dcmdp_jax.models import weights
from dcmdp_jax.records import TrainState
from dcmdp_jax.run import checkpoint, pairs, starting, supervised
from dcmdp_jax.run.inputs import read_inputs
from dcmdp_jax.run.pairs import Pair
from dcmdp_jax.stopping import Failed
from support.random_params import random_params
from support.steps import MODEL, make_config
from support.training import (
    ONE_DEVICE,
    QUICKSTART,
    assert_same_run,
    command,
    dcmdp,
    rows,
    tiny,
    train,
    write_pairs,
)

pytestmark = pytest.mark.full


def random_pairs(count, vocab_size):
    """Ragged prompts and completions of at most 5 tokens each."""
    rng = np.random.default_rng(0)
    return [
        Pair(*(rng.integers(0, vocab_size, rng.integers(1, 6)).tolist() for _ in range(2)))
        for _ in range(count)
    ]


def pack(learnt, **how):
    return pairs.pack(learnt, row_length=16, width=5, **how)


# ------------------------------------------------------------ a step


def reference(learnt):
    """(loss, gradients by tensor name) of transformers' model, in float64, pair by pair."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from support import reference_hf

    model = reference_hf.make("dense").double()
    total = 0
    for prompt, completion in learnt:
        logp = torch.log_softmax(model(torch.tensor([prompt + completion])).logits[0], -1)
        after_prompt = logp[len(prompt) - 1 : -1]
        total = total - after_prompt[range(len(completion)), completion].sum()
    loss = total / sum(len(pair.completion) for pair in learnt)
    loss.backward()
    return model, loss.item(), {name: p.grad.numpy() for name, p in model.named_parameters()}


def test_a_step_has_the_loss_and_gradient_of_transformers(tmp_path):
    """In packed rows and two microbatches; a step of plain descent shows the gradient."""
    learnt = random_pairs(6, 62)
    model, loss, grads = reference(learnt)
    model.float().save_pretrained(tmp_path)
    config, params = weights.load(tmp_path)
    descent = optax.sgd(1.0)
    state = TrainState(params, descent.init(params), (), np.int32(0), np.int32(0), ())
    batch = pack(learnt, microbatches=2)
    assert batch.tokens.shape[2] < 3  # some pairs share a row
    step = jax.jit(supervised.take_step, static_argnames=("model", "optimizer"))
    after, measured = step(state, batch, model=config, optimizer=descent)
    assert measured["loss"] == pytest.approx(loss, rel=1e-6)
    assert measured["tokens"] == sum(len(pair.completion) for pair in learnt)
    descended = jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), params, after.params)
    for leaf, array in zip(
        jax.tree.leaves(weights.parameter_table(config)), jax.tree.leaves(descended), strict=True
    ):
        for place, tensor in leaf.tensors.items():
            ours = tensor.stored(array[place])
            np.testing.assert_allclose(ours, grads.pop(tensor.name), atol=2e-6, rtol=1e-5)
    assert not grads
    norm = np.sqrt(sum((g**2).sum() for g in jax.tree.leaves(descended)))
    assert measured["grad_norm"] == pytest.approx(norm, rel=1e-4)


def test_a_sharded_stage_is_that_of_one_device():
    """The losses of three steps, the last one of updated parameters, on a mesh of four devices."""
    config = make_config(MODEL)
    rollout = dataclasses.replace(
        config.rollout, staleness=1, in_flight=True, server="http://127.0.0.1:1"
    )
    config = dataclasses.replace(config, rollout=rollout)
    warmup = WarmupConfig(path="x", steps=3, batch_size=8, microbatches=2, learning_rate=0.01)
    config = dataclasses.replace(config, warmup=warmup)
    losses = []
    for axes in (MeshConfig(), MeshConfig(fsdp=2, tensor=2)):
        mesh = sharding.make_mesh(axes, jax.devices()[: 4 if axes.tensor > 1 else 1])
        state = jax.jit(
            functools.partial(supervised.init, config),
            out_shardings=supervised.shardings(config, MODEL, mesh),
        )(random_params(MODEL, 0.1, norms=1.0))
        step = supervised.compile_step(config, MODEL, mesh)
        batch = pack(
            random_pairs(8, 16), microbatches=2, row_divisor=sharding.num_batch_shards(mesh)
        )
        for _ in range(3):
            state, measured = step(state, batch)
            losses.append(float(measured["loss"]))
    np.testing.assert_allclose(losses[:3], losses[3:], atol=1e-5)
    assert losses[2] < losses[1]  # the rate of the first step is 0


# ------------------------------------------------------------ a stage and the run after it


STAGE = {
    "warmup.steps": 40,
    "warmup.batch_size": 16,
    "warmup.microbatches": 2,
    "checkpoint.every": 10,
    "steps": 2,
}


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """A stage of two epochs and a half: 256 pairs of the quickstart's task."""
    path = write_pairs(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", 256)
    return STAGE | {"warmup.path": path}


@pytest.fixture(scope="module")
def whole(options, tmp_path_factory):
    """A run that nothing happened to."""
    workdir = tmp_path_factory.mktemp("whole")
    train(tiny(**options), workdir)
    return workdir


def learnt_rows(workdir):
    return [json.loads(line) for line in (workdir / supervised.FILE).open()]


def at_step(number, act, monkeypatch):
    """Has `act` called when the batch of a step is drawn."""
    draw = pairs.draw

    def drawn(*args, **how):
        if args[3] == number:
            act()
        return draw(*args, **how)

    monkeypatch.setattr(pairs, "draw", drawn)


def test_the_stage_learns_and_says_how_much(whole):
    read = learnt_rows(whole)
    assert [row["step"] for row in read] == list(range(1, 41))
    assert read[-1]["loss"] < 0.6 * read[0]["loss"]
    assert all(row["tokens"] > 16 and row["grad_norm"] > 0 for row in read)


def test_rl_starts_from_what_the_stage_learnt_and_trains(whole, options):
    run = tiny(**options)
    inputs = read_inputs(run, ONE_DEVICE)
    like = supervised.abstract(run, inputs.model_config, inputs.mesh)
    learnt, _ = checkpoint.read(whole / checkpoint.WARMUP, like)
    like = train_state.abstract(run, inputs.model_config, inputs.mesh)
    first, _ = checkpoint.read(whole, like, before=1)
    last, _ = checkpoint.read(whole, like)
    jax.tree.map(np.testing.assert_array_equal, learnt.params, first.params)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), first.params, last.params)
    assert min(jax.tree.leaves(moved)) > 0 and all(row["grad_norm"] > 0 for row in rows(whole))


def test_a_stage_that_is_stopped_goes_on_bit_for_bit(whole, options, tmp_path, monkeypatch, capsys):
    """A signal between two checkpoints; the run goes on with its own options."""
    with monkeypatch.context() as patch:
        at_step(16, lambda: os.kill(os.getpid(), signal.SIGTERM), patch)
        assert dcmdp(command(tmp_path / "run", **options)) == 130
    said = capsys.readouterr().out
    assert "stopped after step 17 of 40 of the warm-up; everything is saved" in said
    assert dcmdp(["train", QUICKSTART, "--workdir", str(tmp_path / "run")]) == 0
    assert_same_run(whole, tmp_path / "run", tiny(**options))
    assert learnt_rows(whole) == learnt_rows(tmp_path / "run")


def test_a_stage_that_fails_goes_on_from_its_checkpoint_bit_for_bit(
    whole, options, tmp_path, monkeypatch
):
    """Rows that the checkpoint does not know are written again."""

    def fail():
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        at_step(16, fail, patch)
        train(tiny(**options), tmp_path)
    assert checkpoint.steps(tmp_path / checkpoint.WARMUP)[-1] == 10
    assert len(learnt_rows(tmp_path)) == 16
    monkeypatch.setattr(starting, "unwarmed_weights", lambda *_: pytest.fail("loaded again"))
    train(tiny(**options), tmp_path)
    assert_same_run(whole, tmp_path, tiny(**options))
    assert learnt_rows(whole) == learnt_rows(tmp_path)


def test_a_loss_that_is_not_finite_ends_the_stage_with_a_sentence(options, tmp_path):
    """A learning rate that no parameter survives."""
    with pytest.raises(Failed, match="of step .* of the warm-up is not finite; start again"):
        train(tiny(**options, **{"warmup.learning_rate": 1e38}), tmp_path)
    assert checkpoint.steps(tmp_path / checkpoint.WARMUP) == []
