"""A tiny quickstart, as a configuration and as a command, and readers of what its run leaves."""

import dataclasses
import json
import os
import pathlib
import sys
import time

import jax
import numpy as np

from dcmdp_jax import cli
from dcmdp_jax import train as loop
from dcmdp_jax.experiment import load_experiment, override
from dcmdp_jax.run import starting
from dcmdp_jax.run.checkpoint import Checkpoints
from dcmdp_jax.run.inputs import read_inputs

MAIN = "import sys; from dcmdp_jax.cli import main; sys.exit(main(sys.argv[1:]))"
CHILD = (sys.executable, "-c", MAIN)  # the command line in a process of its own
ONE_DEVICE = jax.devices()[:1]  # so that a step compiles quickly
QUICKSTART = str(pathlib.Path(__file__).parents[2] / "experiments" / "quickstart.py")
TINY = {
    "model.architecture.hidden_size": 16,
    "model.architecture.intermediate_size": 32,
    "model.architecture.num_heads": 2,
    "model.architecture.num_kv_heads": 1,
    "model.architecture.head_dim": 8,
    "model.architecture.num_layers": 1,
    "data.prompts_per_step": 4,
    "rollout.samples": 4,
    "rollout.slots": 8,
    "rollout.max_tokens": 20,
    "algorithm.minibatches": 2,
    # enough for rewards that differ within a group, and so for gradients
    "warmup.steps": 100,
    "warmup.batch_size": 32,
    "warmup.learning_rate": 0.03,
    "data.task.operations": 2,
    "data.max_prompt_tokens": 6,
    "checkpoint.every": 5,
    "eval.every": 0,
    "eval.prompts": 8,
    "mesh.fsdp": 1,
    "mesh.data": 1,
    "algorithm.learning_rate": 0.01,
}


def options(**changes):
    return {name: str(value) for name, value in (TINY | changes).items()}


def tiny(**changes):
    return override(load_experiment(QUICKSTART), options(**changes))


def words(**changes):
    """Returns the options as words of a command line."""
    return [word for name, value in options(**changes).items() for word in (f"--{name}", value)]


def command(workdir, **changes):
    return [
        "train",
        QUICKSTART,
        "--workdir",
        str(workdir),
        *words(**changes),
    ]


def rows(workdir):
    return [
        {k: v for k, v in json.loads(line).items() if k != "seconds"}
        for line in (workdir / "metrics.jsonl").open()
    ]


def train(run, workdir, devices=ONE_DEVICE):
    return loop.train(run, workdir, devices)


def dcmdp(words, devices=ONE_DEVICE):
    """The status of the command line with these words."""
    return cli.main(words, devices)


def saved(workdir, run, devices=ONE_DEVICE):
    """Everything in the newest checkpoint, as NumPy, and the state of the prompt iterator."""
    inputs = read_inputs(run, devices)
    checkpoints = Checkpoints(workdir, 2)
    state = starting.restore(checkpoints, run, inputs)
    checkpoints.close()
    return jax.device_get(state), inputs.prompts.get_state()


def assert_same_run(one, two, run, devices=ONE_DEVICE):
    a, a_position = saved(one, run, devices)
    b, b_position = saved(two, run, devices)
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert a_position == b_position
    assert rows(one) == rows(two)


def child_environment():
    """Children have one device, and see the package that this process sees. Their programs are
    those of `ONE_DEVICE` here, bit for bit, and come from the same cache.
    """
    path = os.pathsep.join(filter(None, sys.path))
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")
    return os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": path}


def await_rows(workdir, count, process):
    """Waits until a run in another process has written so many rows, at most five minutes."""
    log = workdir / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while not (log.exists() and len(log.read_text().splitlines()) >= count):
        assert process.poll() is None, f"the run ended before it had written {count} rows"
        assert time.monotonic() < deadline, f"the run has not written {count} rows in 300 s"
        time.sleep(0.01)


def write_pairs(path, count):
    """Writes problems of the quickstart's task, with two operations, and how to solve them."""
    task = dataclasses.replace(load_experiment(QUICKSTART).data.task, operations=2)
    rng = np.random.default_rng(0)
    examples = [task.example(i, 1) for i in range(count)]
    pairs = [{"prompt": e.prompt, "completion": task.solution(e, rng)} for e in examples]
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return str(path)


def write_problems(path, count):
    """Writes problems of the quickstart's task, with two operations, as a data file."""
    task = dataclasses.replace(load_experiment(QUICKSTART).data.task, operations=2)
    examples = [task.example(i, 0) for i in range(count)]
    lines = [json.dumps({"problem": e.prompt, "answer": e.answer}) for e in examples]
    path.write_text("\n".join(lines) + "\n")
    return str(path)
