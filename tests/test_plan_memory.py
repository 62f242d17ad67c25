"""The plan's memory against a run: what lies on a device once each of its programs is called."""

import collections
import dataclasses

import jax
import pytest

from dcmdp_jax import compiled_step, sync
from dcmdp_jax.batches import Batches
from dcmdp_jax.losses import centering, kl
from dcmdp_jax.rollout.jetstream import Engine
from dcmdp_jax.tools import plan, slices
from support.adapters import adapted
from support.training import tiny, train

pytestmark = pytest.mark.full

DEVICES = jax.devices()[:2]
# Two devices that train on halves of the parameters, and sample with a copy each. The engine of the
# evaluation is one more.
SHARED = {
    "steps": 2,
    "warmup.steps": 0,
    "eval.every": 1,
    "mesh.fsdp": 2,
    "rollout.devices": -1,
    "rollout.mesh.fsdp": 2,
    "rollout.precision.weights": "int8",
    "algorithm.minibatches": 1,
    "model.architecture.hidden_size": 128,
    "model.architecture.intermediate_size": 384,
}


def plain():
    return tiny(**SHARED)


def stale_with_reference():
    run = tiny(**SHARED, **{"rollout.staleness": 1})
    algorithm = dataclasses.replace(run.algorithm, reference_penalty=kl.k3)
    return dataclasses.replace(run, algorithm=algorithm)


def with_adapters():
    return adapted(plain())


def with_large_batches(**changes):
    """Most of what lies on a device is a batch, the likeliest tokens at each place."""
    run = tiny(
        **SHARED
        | {
            "model.architecture.hidden_size": 16,
            "model.architecture.intermediate_size": 32,
            "rollout.samples": 16,
            "rollout.top_logprobs": 16,
            "rollout.tokens_per_dispatch": 4,  # what a dispatch returns stays until the next has
        }
        | changes
    )
    algorithm = dataclasses.replace(run.algorithm, surrogate=centering.centred)
    return dataclasses.replace(run, algorithm=algorithm)


def with_large_stale_batches():
    return with_large_batches(**{"rollout.staleness": 1})


class Held:
    """The most bytes that lie on a device after a call of each program."""

    def __init__(self):
        self.bytes = collections.Counter()
        self._before = jax.live_arrays()  # kept, so that no other array gets one of their ids
        self._known = {id(array) for array in self._before}
        self._engines = []

    def after(self, name, function):
        def called(*args, **options):
            result = jax.block_until_ready(function(*args, **options))
            self._note(name)
            return result

        return called

    def of_engine(self, name, function):
        def called(engine, *args, **options):
            if engine not in self._engines:
                self._engines.append(engine)
            evaluation = "evaluation: " if self._engines.index(engine) else ""
            return self.after(evaluation + name, function)(engine, *args, **options)

        return called

    def _note(self, name):
        buffers = {}
        for array in jax.live_arrays():
            if id(array) not in self._known and not array.is_deleted():
                for shard in array.addressable_shards:
                    if shard.device == DEVICES[0]:  # views of one buffer count once
                        buffers[shard.data.unsafe_buffer_pointer()] = shard.data.nbytes
        self.bytes[name] = max(self.bytes[name], sum(buffers.values()))


@pytest.mark.parametrize(
    "make",
    [
        plain,
        pytest.param(stale_with_reference, marks=pytest.mark.slow),
        pytest.param(with_adapters, marks=pytest.mark.slow),
        with_large_batches,
        pytest.param(with_large_stale_batches, marks=pytest.mark.slow),
    ],
)
def test_a_run_holds_what_is_planned(make, tmp_path, monkeypatch):
    run = make()
    held = Held()
    compile_step = compiled_step.compile_step
    converter = sync.converter
    converters = []

    def counted_converter(*args):
        converters.append(None)
        evaluation = "evaluation: " if len(converters) > 1 else ""
        return held.after(f"{evaluation}weight sync", converter(*args))

    with monkeypatch.context() as patch:
        patch.setattr(
            compiled_step,
            "compile_step",
            lambda *args: held.after("train step", compile_step(*args)),
        )
        patch.setattr(sync, "converter", counted_converter)
        patch.setattr(Engine, "prefill", held.of_engine("prefill", Engine.prefill))
        decode = f"decode, {run.rollout.tokens_per_dispatch} tokens"
        patch.setattr(Engine, "generate", held.of_engine(decode, Engine.generate))
        if run.rollout.staleness:  # the step may still run when the next batch is there
            after_update = held.after("train step", Batches.after_update)
            patch.setattr(Batches, "after_update", after_update)
        train(run, tmp_path, DEVICES)
    planned = {}
    for program in plan.programs(run, run.model.architecture, DEVICES):
        compiled = plan.compile_program(program, slices.CHIPS["v5e"])
        planned[program.name] = compiled.peak - compiled.temporaries
    del planned["scoring pass"]
    assert planned == {name: pytest.approx(held.bytes[name], rel=0.05) for name in planned}
