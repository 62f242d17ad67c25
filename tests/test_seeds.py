"""Seeds: one for each use of randomness, the same every time, and independent of each other."""

import itertools

from dcmdp_jax.seeds import Stream, seed


def test_a_seed_is_the_same_every_time():
    assert seed(3, Stream.ROLLOUT, 7) == seed(3, Stream.ROLLOUT, 7)


def test_no_two_streams_share_a_seed():
    numbers = [*range(200), 2**30, 2**31 - 1, 2**32 - 1]
    drawn = [seed(0, stream, number) for stream, number in itertools.product(Stream, numbers)]
    assert len(set(drawn)) == len(drawn)


def test_runs_of_different_seeds_share_none():
    drawn = [seed(config, Stream.ROLLOUT, number) for config in range(20) for number in range(50)]
    assert len(set(drawn)) == len(drawn)


def test_seeds_have_32_bits():
    drawn = [seed(config, Stream.PROMPTS) for config in (*range(500), 2**32 - 1)]
    assert min(drawn) >= 0 and 2**31 < max(drawn) < 2**32
    for bit in range(32):
        share = sum(value >> bit & 1 for value in drawn) / len(drawn)
        assert 0.4 < share < 0.6


def test_the_values_are_part_of_every_run():
    """A run that is resumed draws what it would have drawn, so these must not change."""
    assert seed(0, Stream.PARAMETERS) == 4088532484
    assert seed(0, Stream.PARITY, 0) == 1518520685
