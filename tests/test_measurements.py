"""Host-side measurements, held to values computed by hand."""

import numpy as np
import pytest

from dcmdp_jax.monitoring import measurements
from dcmdp_jax.records import Batch, Prompts, Rollout, Sampling, Scored

LENGTHS = [3, 5, 2, 5]
STOPPED = [True, False, True, True]
REWARD = [1.0, 1.0, 0.0, 0.5]  # the second was cut off, and all the same rewarded


def scored(reward=REWARD, stopped=STOPPED, lengths=LENGTHS):
    shape = len(reward), 5
    prompts = Prompts(np.zeros((2, 4), np.int32), np.full(2, 4, np.int32), ())
    rollout = Rollout(
        prompts=prompts,
        tokens=np.zeros(shape, np.int32),
        lengths=np.array(lengths, np.int32),
        text_lengths=np.array(lengths, np.int32),
        rollout_logp=np.zeros(shape, np.float32),
        stopped=np.array(stopped),
        version=0,
        sampling=Sampling(),
    )
    return Scored(rollout, np.array(reward, np.float32))


def measured(sources=("a", "b"), **changes):
    return measurements.measure(scored(**changes), sources)


def test_tokens_are_all_that_were_sampled():
    assert measured()["tokens"] == 3 + 5 + 2 + 5


def test_truncated_is_the_share_that_the_limit_cut_off():
    assert measured()["truncated"] == 1 / 4


def test_completed_rewarded_leaves_out_what_was_cut_off_or_earned_nothing():
    assert measured()["completed_rewarded"] == 2 / 4


def test_reward_spread_is_within_prompts():
    """Of (1, 1) it is 0, of (0, 0.5) it is 0.25."""
    assert measured()["reward_spread"] == 0.25 / 2


def test_prompts_that_are_always_or_never_solved_have_no_spread():
    assert measured(reward=[1.0, 1.0, 0.0, 0.0])["reward_spread"] == 0


def test_each_source_has_its_mean_reward():
    row = measured()
    assert (row["reward/a"], row["reward/b"]) == (1.0, 0.25)


def test_prompts_of_one_source_are_taken_together():
    assert measured(["a", "a"])["reward/a"] == pytest.approx(np.mean(REWARD))


def test_a_source_without_a_name_has_no_metric():
    assert not [name for name in measured(["", ""]) if name.startswith("reward/")]


def rows(*segment_ids):
    batch = Batch(**dict.fromkeys(Batch._fields))._replace(segment_ids=np.array(segment_ids))
    return measurements.measure_rows(scored(), batch)


def test_the_rows_are_those_of_a_microbatch():
    assert rows([1, 1, 2, 0], [1, 0, 0, 0])["rows"] == 2


def test_row_fill_is_the_share_of_places_with_a_token():
    assert rows([1, 1, 2, 0], [1, 0, 0, 0])["row_fill"] == 4 / 8


def test_the_prompt_saving_is_the_share_of_tokens_that_no_row_holds():
    """Four prompts of four tokens and completions of 15 in all are 31 tokens; the rows hold 25."""
    assert rows([1] * 25 + [0] * 5)["prompt_saving"] == pytest.approx(6 / 31)


def test_sources_of_one_process_are_its_own():
    assert measurements.gather_sources(["math", "", "ü"]) == ["math", "", "ü"]


def test_sources_are_gathered_in_the_order_of_processes(monkeypatch):
    """Two processes with lists of different length, and a name that is not ASCII."""
    lists = [["math", "ü"], ["a source with a long name", ""]]
    monkeypatch.setattr(measurements.processes, "gather", Gather(lists))
    assert measurements.gather_sources(lists[0]) == lists[0] + lists[1]


class Gather:
    """`processes.gather` as process 0 sees it: the other calls with what it would call with."""

    def __init__(self, lists):
        self.encoded = [measurements.encode(sources) for sources in lists]

    def __call__(self, array):
        if array.ndim == 1:
            return np.array([len(encoded) for encoded in self.encoded])
        rows = [encoded.ljust(array.shape[1]) for encoded in self.encoded]
        return np.stack([np.frombuffer(row, np.uint8) for row in rows])
