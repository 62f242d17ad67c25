"""Prompts without spread give way to further ones, as if they had been drawn by hand."""

import dataclasses

import jax
import numpy as np
import pytest

from dcmdp_jax import dynamic_sampling, rewards, seeds
from dcmdp_jax.batches import Batches, sampling
from dcmdp_jax.distributed import processes
from dcmdp_jax.dynamic_sampling import Draw
from dcmdp_jax.experiment import override
from dcmdp_jax.records import Example, Prompts, Scored, TrainState
from dcmdp_jax.run import starting
from dcmdp_jax.run.inputs import read_inputs
from dcmdp_jax.seeds import Stream
from dcmdp_jax.tokens import packing
from support.rollouts import CannedSampler, make_rollout
from support.training import ONE_DEVICE, assert_same_run, rows, tiny, train

# ------------------------------------------------------------ on made-up draws


def draw(rewards_of_prompts, first=0):
    """Two completions of each prompt; prompt p has the tokens p and the source `p`."""
    count = len(rewards_of_prompts)
    numbers = np.arange(first, first + count)
    prompts = Prompts(
        np.tile(numbers[:, None], 3), numbers % 3 + 1, tuple(Example("", "") for _ in numbers)
    )
    tokens = np.repeat(numbers, 2)[:, None] * 10 + np.tile([[0], [1]], (count, 4))
    rollout = make_rollout(prompts, tokens, tokens[:, 0] % 5, -1.0 * tokens, [True] * 2 * count)
    scored = Scored(rollout, np.array(rewards_of_prompts, np.float32).reshape(-1))
    return Draw(dynamic_sampling.arrays_of(scored), [str(number) for number in numbers])


BATCH = draw([(0, 0), (1, 0), (1, 1), (0, 0)])
MORE = draw([(1, 1), (0, 1), (0, 0), (1, 0)], first=4)


def assert_prompts(batch, numbers):
    """Every array holds the rows of these prompts, in order."""
    everything = [
        np.concatenate([one, other]).reshape(8, -1)
        for one, other in zip(jax.tree.leaves(BATCH.scored), jax.tree.leaves(MORE.scored))
    ]
    for whole, part in zip(everything, jax.tree.leaves(batch.scored)):
        np.testing.assert_array_equal(part.reshape(4, -1), whole[numbers])
    assert batch.sources == [str(number) for number in numbers]


def test_groups_without_spread_are_replaced_in_order():
    assert_prompts(dynamic_sampling.replace_groups(BATCH, MORE), [5, 1, 7, 3])


def test_what_is_left_over_is_dropped():
    full = dynamic_sampling.replace_groups(BATCH, draw([(0, 1)] * 4, first=4))
    assert full.sources == ["4", "1", "5", "6"] and dynamic_sampling.has_spread(full).all()


def test_the_metrics_count_all_that_was_sampled():
    batch = dynamic_sampling.replace_groups(BATCH, MORE)
    rounds = [dynamic_sampling.summary(draw) for draw in (BATCH, MORE)]
    assert dynamic_sampling.measure(rounds, batch) == {
        "refills": 1,
        "no_spread": 5 / 8,
        "unfilled": 1 / 4,
        "reward_sampled": 7 / 16,
        "tokens": int(BATCH.scored.rollout.lengths.sum() + MORE.scored.rollout.lengths.sum()),
    }


def test_one_sample_has_no_spread_and_is_refused():
    with pytest.raises(ValueError, match=r"data\.max_refills replaces .* rollout\.samples=1"):
        override(tiny(), {"data.max_refills": "1", "rollout.samples": "1"})


# ------------------------------------------------------------ in a run


def quarter(example, text):
    """A reward that about a quarter of all texts earn, and an empty one does not."""
    return float(sum(map(ord, text)) % 4 == 1)


def refilled(steps, verifier=quarter, max_refills=2, **changes):
    changes |= {"data.max_refills": max_refills, "warmup.steps": 0}
    run = tiny(steps=steps, **changes)
    return dataclasses.replace(run, data=dataclasses.replace(run.data, verifier=verifier))


@pytest.mark.full
def test_a_batch_is_as_drawn_by_hand(tmp_path):
    """Steps 0 to 2, with weights that stay."""
    run = refilled(3)
    inputs = read_inputs(run, ONE_DEVICE)
    by_hand = read_inputs(run, ONE_DEVICE)
    state = starting.first_state(run, inputs, tmp_path, lambda: False)
    batches = Batches(run, inputs, state, lambda: False)

    def next_by_hand(seed):
        rollout = batches.sampler.sample(
            next(by_hand.prompts),
            samples=4,
            max_tokens=20,
            sampling=sampling(run.rollout),
            seed=seed,
        )
        return rewards.score(rollout, by_hand.tokenizer.decode, quarter)

    rounds = []
    for number in range(3):
        collected = batches.collect(Stream.ROLLOUT, number)
        seed = seeds.seed(run.seed, Stream.ROLLOUT, number)
        scored = next_by_hand(seed)
        groups = groups_of(scored)
        refills = 0
        while refills < 2 and not all(map(has_spread, groups)):
            refills += 1
            more = groups_of(
                next_by_hand(seeds.seed(run.seed, Stream.REFILL, number * 1024 + refills))
            )
            found = [group for group in more if has_spread(group)]
            for place, group in enumerate(groups):
                if not has_spread(group) and found:
                    groups[place] = found.pop(0)
        expected = packing.pack(
            together(scored, groups),
            minibatches=2,
            microbatches=1,
            row_length=26,
            pad_id=inputs.tokenizer.pad_id,
            seed=seed,
            draw_groups=run.algorithm.share_prompts,
            share_prompts=run.shares_prompts,
        )
        jax.tree.map(np.testing.assert_array_equal, collected.packed, expected)
        assert collected.prompt_state == by_hand.prompts.get_state()
        assert collected.metrics["refills"] == refills
        rounds.append(refills)
    assert max(rounds) > 0


def groups_of(scored):
    """The prompts of a scored rollout, one by one, each with its four completions."""
    rollout = scored.rollout
    return [
        (
            rollout.prompts.tokens[i],
            rollout.prompts.lengths[i],
            {
                name: getattr(rollout, name)[4 * i : 4 * i + 4]
                for name in ("tokens", "lengths", "rollout_logp", "stopped", "support_mass")
            },
            scored.reward[4 * i : 4 * i + 4],
        )
        for i in range(4)
    ]


def has_spread(group):
    return len(set(group[3].tolist())) > 1


def together(scored, groups):
    """A scored rollout of these prompts."""
    tokens, lengths, completions, reward = zip(*groups)
    prompts = Prompts(np.stack(tokens), np.stack(lengths), scored.rollout.prompts.examples)
    fields = {name: np.concatenate([part[name] for part in completions]) for name in completions[0]}
    return Scored(scored.rollout._replace(prompts=prompts, **fields), np.concatenate(reward))


def test_processes_that_share_an_engine_take_the_rewards_of_process_0(monkeypatch):
    """Whatever their own verifier says; else they would draw different refills."""
    run = refilled(1, lambda example, text: 1.0)
    engine = dataclasses.replace(run.rollout, sampler=lambda *_: CannedSampler(), one_engine=True)
    run = dataclasses.replace(run, rollout=engine)
    of_process_0 = np.tile(np.float32([0, 1, 0, 0]), 4)
    monkeypatch.setattr(processes, "from_process_0", lambda own: (of_process_0, *own[1:]))
    state = TrainState((), (), (), np.int32(0), np.int32(0), ())
    batches = Batches(run, read_inputs(run, ONE_DEVICE), state, lambda: False)
    collected = batches.collect(Stream.ROLLOUT, 0)
    assert collected.metrics["refills"] == 0
    assert sorted(np.ravel(collected.packed.reward)) == [0] * 12 + [1] * 4


@pytest.mark.full
@pytest.mark.parametrize("staleness", [0, 1])
def test_a_run_that_refills_resumes_bit_for_bit(tmp_path, staleness):
    changes = {"rollout.staleness": staleness, "checkpoint.every": 0}
    train(refilled(4, **changes), tmp_path / "whole")
    train(refilled(2, **changes), tmp_path / "parts")
    train(refilled(4, **changes), tmp_path / "parts")
    assert_same_run(tmp_path / "whole", tmp_path / "parts", refilled(4, **changes))
    taken = [row["refills"] for row in rows(tmp_path / "whole")]
    assert max(taken) > 0, "something was refilled"


def nothing(example, text):
    return 0.0


@pytest.mark.full
def test_after_the_last_round_the_run_takes_what_it_has(tmp_path):
    """No completion earns anything: the batch stays, without advantages, and all prompts count."""
    train(refilled(2, nothing, 3), tmp_path)
    for row in rows(tmp_path):
        assert (row["refills"], row["no_spread"], row["unfilled"]) == (3, 1.0, 1.0)
        assert row["reward"] == row["reward_sampled"] == 0 and row["skipped"] == 0
    assert rows(tmp_path)[1]["step"] == 2
