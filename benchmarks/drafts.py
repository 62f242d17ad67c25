"""What speculative decoding would yield and cost: `JAX_PLATFORMS=cpu python -m benchmarks.drafts
experiments/language/smollm2.py`.

Trains the experiment and counts on what its engine sampled; no engine with drafts is run. A pass
feeds the last token of a slot and a draft of k, and yields those of the draft that are accepted,
and one more, distributed as without drafts (arXiv 2211.17192).

A draft of one text is accepted token by token with the policy's own probability of it. So as many
are accepted as it has in common with what the policy sampled. It is what mostly followed the last
three tokens, else two, else one, in

  own    the prompt and the completion so far
  group  all completions of the prompt so far, which are decoded side by side
  step   the same, and the prompts and completions of the step before

A draft that the previous policy samples is accepted with min(1, p / q), q its probability; in the
mean that is min(1, q / p) over tokens of the policy. It takes k passes of a model of this size.

The cost of a pass is counted for Qwen3-8B in bfloat16 on four chips of v5p (`tools/cost_model.py`):
weights and cache are read once, arithmetic and links serve k + 1 tokens.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import pathlib
import tempfile
from typing import Any

import numpy as np

from dcmdp_jax import compiled_step, sharding
from dcmdp_jax.batches import Batches
from dcmdp_jax.config import Config, MeshConfig, Precision, RolloutConfig
from dcmdp_jax.experiment import load_experiment
from dcmdp_jax.models import sizes
from dcmdp_jax.models.model_config import Compute
from dcmdp_jax.records import Rollout
from dcmdp_jax.rollout.replay import replay
from dcmdp_jax.run import starting
from dcmdp_jax.run.inputs import read_inputs
from dcmdp_jax.tools import cost_model, slices

DRAFTS = (1, 2, 3, 4)  # k
CONTEXT = 3  # tokens that a draft follows from, at most
SOURCES = ("own", "group", "step")
SLOTS = (32, 64, 128, 256, 512)
LENGTHS = ((25, 20), (1024, 8192))  # of a prompt, of its completion: this task's, the paper's
Counts = collections.Counter[int]


class Recorder:
    """A run's sampler that keeps each rollout, and its log-probs [N, T] under the weights before;
    None for the first.
    """

    def __init__(self, sampler: Any):
        self._sampler = sampler
        self._previous = None
        self.sampled: list[tuple[Rollout, np.ndarray | None]] = []

    def update_weights(self, params: Any, version: int) -> None:
        """Replaces the weights; the former ones are kept."""
        self._previous = self._sampler.weights
        self._sampler.update_weights(params, version)

    def sample(self, *args: Any, **options: Any) -> Rollout:
        """As the run's sampler does."""
        rollout = self._sampler.sample(*args, **options)
        before = None
        if self._previous is not None:
            before = replay(self._sampler.engine, self._previous, rollout)
        self.sampled.append((rollout, before))
        return rollout


def train(config: Config) -> list[tuple[Rollout, np.ndarray | None]]:
    """Takes the steps of a run without evaluations; returns what `Recorder` keeps."""
    inputs = read_inputs(config)
    with tempfile.TemporaryDirectory() as folder:  # of a warm-up
        state = starting.first_state(config, inputs, pathlib.Path(folder), lambda: False)
    update = compiled_step.compile_step(config, inputs.model_config, inputs.mesh)
    batches = Batches(config, inputs, state, lambda: False)
    recorder = Recorder(batches.sampler)
    batches.sampler = recorder
    for batch in batches:
        batches.before_update(state)
        state, _ = update(state, batch.packed)
        batches.after_update(state)
    return recorder.sampled


class Table:
    """How often each token followed each context of 1 to `CONTEXT` tokens."""

    def __init__(self) -> None:
        self.followed: dict[tuple[int, ...], Counts] = {}

    def add(self, tokens: list[int], start: int = 0) -> None:
        """Counts the tokens from `start` on, each after those before it."""
        for i in range(start, len(tokens)):
            for n in range(1, min(CONTEXT, i) + 1):
                self.followed.setdefault(tuple(tokens[i - n : i]), Counts())[tokens[i]] += 1


def draft(text: list[int], tables: list[Table], k: int) -> list[int]:
    """Returns up to `k` tokens that follow `text`; fewer if no table has seen the last one."""
    drafted: list[int] = []
    for _ in range(k):
        known = (text + drafted)[-CONTEXT:]
        seen = Counts()
        while known and not seen:
            for table in tables:
                seen.update(table.followed.get(tuple(known), Counts()))
            known = known[1:]
        if not seen:
            break
        drafted.append(seen.most_common(1)[0][0])
    return drafted


def texts(rollout: Rollout) -> list[tuple[list[int], list[int]]]:
    """Returns the tokens of each completion's prompt, and its own."""
    prompts = rollout.prompts
    samples = len(rollout.lengths) // len(prompts.lengths)
    return [
        (
            prompts.tokens[i // samples, : prompts.lengths[i // samples]].tolist(),
            rollout.tokens[i, :length].tolist(),
        )
        for i, length in enumerate(rollout.lengths)
    ]


def passes(rollout: Rollout, before: Rollout, source: str, k: int) -> np.ndarray:
    """Returns the passes [N] that each completion takes, all decoded side by side."""
    samples = len(rollout.lengths) // len(rollout.prompts.lengths)
    earlier = Table()
    if source == "step":
        for prompt, completion in texts(before):
            earlier.add(prompt + completion)
    whole = [prompt + completion for prompt, completion in texts(rollout)]
    known = [len(prompt) for prompt, _ in texts(rollout)]
    tables = [Table() for _ in whole]
    if source != "own":
        tables = [tables[i - i % samples] for i in range(len(whole))]
    for table, text, end in zip(tables, whole, known):
        table.add(text[:end])
    taken = np.zeros(len(whole), int)
    while running := [i for i, text in enumerate(whole) if known[i] < len(text)]:
        drafts = [draft(whole[i][: known[i]], [tables[i], earlier], k) for i in running]
        for i, drafted in zip(running, drafts):
            start = known[i]
            known[i] += 1
            for token in drafted:
                if known[i] == len(whole[i]) or whole[i][known[i] - 1] != token:
                    break
                known[i] += 1
            tables[i].add(whole[i][: known[i]], start)
            taken[i] += 1
    return taken


def tokens_from_policy(rollout: Rollout, before: np.ndarray, k: int) -> np.ndarray:
    """Returns the expected tokens of a pass from each token on, drafted by the weights before."""
    found = []
    accepted = np.exp(np.minimum(before - rollout.rollout_logp, 0))
    for length, chances in zip(rollout.lengths, accepted):
        for start in range(length):
            # the pass that yields the last token yields no more
            found.append(1 + np.cumprod(chances[start : min(start + k, length - 1)]).sum())
    return np.array(found)


def show_yield(sampled: list[tuple[Rollout, np.ndarray | None]]) -> None:
    """Prints tokens a pass, and in brackets by how much fewer passes a batch takes."""
    pairs = list(zip(sampled, sampled[1:]))
    for part in (pairs[: len(pairs) // 2], pairs[len(pairs) // 2 :]):
        lengths = np.array([now.lengths for _, (now, _) in part])  # [steps, N]
        print(f"{len(part)} steps, {lengths.mean():.1f} tokens a completion; k = 1 to {DRAFTS[-1]}")
        for source in SOURCES:
            cells = []
            for k in DRAFTS:
                taken = np.array([passes(now, old, source, k) for (old, _), (now, _) in part])
                batch = lengths.max(axis=1).sum() / taken.max(axis=1).sum()
                cells.append(f"{lengths.sum() / taken.sum():.2f} ({batch:.2f})")
            show_row(source, cells)
        found = [np.concatenate([tokens_from_policy(*now, k) for _, now in part]) for k in DRAFTS]
        show_row("previous policy", [f"{tokens.mean():.2f}" for tokens in found])


def show_row(name: str, cells: list[str]) -> None:
    print(f"{name:22}" + "".join(f"{cell:14}" for cell in cells).rstrip())


def show_cost() -> None:
    """Prints the time of a pass over that of a pass without a draft."""
    chip = slices.CHIPS["v5p"]
    mesh = sharding.make_mesh(MeshConfig(tensor=4), slices.slice_devices("v5p:2x2x1"))
    model = dataclasses.replace(sizes.QWEN3_8B, compute=Compute(bfloat16=True))
    precision = Precision("bfloat16", head="bfloat16")
    print("cost of a pass, prompt + completion, slots; k = 1 to", DRAFTS[-1])
    for prompt, new in LENGTHS:
        rollout = RolloutConfig(max_tokens=new, tokens_per_dispatch=1, precision=precision)
        for slots in SLOTS:
            work = cost_model.decode(model, rollout, slots, prompt + new, mesh)
            once = work.memory / chip.bandwidth
            each = max(work.flops / chip.flops, work.link / chip.link)
            cells = [max((k + 1) * each, once) / max(each, once) for k in DRAFTS]
            show_row(f"{prompt} + {new}, {slots}", [f"{cell:.2f}" for cell in cells])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("experiment", help="its file; the library's engine samples")
    parser.add_argument("--steps", type=int, default=9, help="the first is not counted")
    args = parser.parse_args()
    config = load_experiment(args.experiment)
    if not config.rollout.own_engine:
        parser.error(f"{args.experiment} brings its own sampler; give one that the engine samples")
    if args.steps < 3:
        parser.error(f"--steps {args.steps} leaves no two steps to count; give at least 3")
    show_cost()
    show_yield(train(dataclasses.replace(config, steps=args.steps)))


if __name__ == "__main__":
    main()
