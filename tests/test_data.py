"""Batches of prompts: their order, their wrapping, and the expert's solutions."""

import json
import logging
import pathlib
import re

import numpy as np
import pytest

from dcmdp_jax import data
from dcmdp_jax.records import Example
from dcmdp_jax.tasks import Chain
from dcmdp_jax.tokens.tokenizer import CharacterTokenizer, HuggingFaceTokenizer

SHARED = pathlib.Path(__file__).parents[1].parent / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data")

MESSAGES = [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}]

LETTERS = CharacterTokenizer("abcdefghijklmnopqrstuvwxyz\n")
PROBLEMS = [Example(letter * (1 + i % 4), letter) for i, letter in enumerate("abcdefghijk")]


def letters(**changes):
    return data.prompt_batches(
        PROBLEMS, LETTERS, **{"batch_size": 4, "max_prompt_tokens": 5, "seed": 7} | changes
    )


def answers(batches, count):
    return [example.answer for _ in range(count) for example in next(batches).examples]


@pytest.fixture
def first_batch():
    return next(letters(shuffle=False))


def test_a_batch_has_the_problems_in_order(first_batch):
    assert first_batch.examples == tuple(PROBLEMS[:4])


def test_prompts_are_padded_on_the_right(first_batch):
    padded = [[2, 0, 0, 0, 0], [3, 3, 0, 0, 0], [4, 4, 4, 0, 0], [5, 5, 5, 5, 0]]
    np.testing.assert_array_equal(first_batch.tokens, np.array(padded, np.int32), strict=True)


def test_a_batch_has_the_lengths_of_its_prompts(first_batch):
    np.testing.assert_array_equal(
        first_batch.lengths, np.array([1, 2, 3, 4], np.int32), strict=True
    )


@pytest.fixture
def epochs():
    """Four epochs of 11 problems, in 11 batches."""
    order = answers(letters(), 11)
    return [order[i : i + 11] for i in range(0, 44, 11)]


def test_an_epoch_has_each_problem_once(epochs):
    assert all(sorted(epoch) == list("abcdefghijk") for epoch in epochs)


def test_each_epoch_is_shuffled_anew(epochs):
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_the_seed_decides_the_order(epochs):
    order = sum(epochs, [])
    assert answers(letters(), 11) == order
    assert answers(letters(seed=8), 11) != order


def test_without_shuffle_problems_keep_the_order_of_the_file():
    assert answers(letters(shuffle=False), 11) == list("abcdefghijk") * 4


@pytest.mark.parametrize(
    "source, tokenizer", [(PROBLEMS, LETTERS), (Chain(), CharacterTokenizer(Chain().alphabet))]
)
def test_resumes_exactly(source, tokenizer):
    def start():
        return data.prompt_batches(source, tokenizer, batch_size=4, max_prompt_tokens=12, seed=0)

    whole = start()
    stopped = start()
    resumed = start()
    expected = [next(whole).examples for _ in range(12)]
    for _ in range(5):
        next(stopped)
    next(resumed)  # a used iterator may be set as well
    resumed.set_state(json.loads(json.dumps(stopped.get_state())))
    assert [next(resumed).examples for _ in range(7)] == expected[5:]


@pytest.mark.parametrize("count", [1, 2, 4])
def test_processes_share_the_batch_in_order(count):
    whole = letters()
    parts = [letters(process_index=i, process_count=count) for i in range(count)]
    for _ in range(5):
        expected = next(whole)
        shares = [next(part) for part in parts]
        np.testing.assert_array_equal(
            np.concatenate([share.tokens for share in shares]), expected.tokens
        )
        assert sum((share.examples for share in shares), ()) == expected.examples


def test_long_problems_are_left_out():
    assert sorted(answers(letters(max_prompt_tokens=3), 9)) == sorted("abcefgijk" * 4)


def test_long_problems_are_counted_in_the_log(caplog):
    with caplog.at_level(logging.WARNING):
        letters(max_prompt_tokens=3)
    assert "2 of 11 problems are longer than data.max_prompt_tokens=3" in caplog.text


def test_a_file_of_long_problems_alone_is_refused():
    with pytest.raises(ValueError, match="none of 11 problems fits"):
        letters(max_prompt_tokens=0)


def test_a_long_prompt_is_not_truncated():
    with pytest.raises(ValueError, match="has 4 tokens, more than data.max_prompt_tokens=3"):
        data.tokenize(PROBLEMS, LETTERS, max_prompt_tokens=3)


def test_a_long_prompt_of_a_task_is_not_truncated():
    tokenizer = CharacterTokenizer(Chain().alphabet)
    batches = data.prompt_batches(Chain(), tokenizer, batch_size=1, max_prompt_tokens=11, seed=0)
    with pytest.raises(ValueError, match="has 12 tokens"):
        next(batches)


def test_single_prompts():
    assert sorted(answers(letters(batch_size=1), 11)) == list("abcdefghijk")


def test_batch_size_must_divide():
    with pytest.raises(
        ValueError, match="data.prompts_per_step=4 does not divide over 3 processes"
    ):
        letters(process_count=3)


def test_task_prompts_are_new_each_time_and_never_held_out():
    task = Chain()
    batches = data.prompt_batches(
        task, CharacterTokenizer(task.alphabet), batch_size=16, max_prompt_tokens=12, seed=0
    )
    seen = [example for _ in range(50) for example in next(batches).examples]
    assert len(set(seen)) == len(seen)
    assert not set(seen) & set(task.held_out(512))


@pytest.mark.parametrize("enable_thinking", [True, False])
def test_chat_wraps_each_prompt(chat_folder, enable_thinking):
    tokenizer = HuggingFaceTokenizer(chat_folder)
    examples = [Example("1+1?", "2"), Example(MESSAGES, "3")]
    batch = data.tokenize(
        examples,
        tokenizer,
        data.PromptFormat(chat=True, enable_thinking=enable_thinking, instruction="Box it."),
        max_prompt_tokens=96,
    )
    asked = [
        [{"role": "user", "content": "1+1?\nBox it."}],
        [MESSAGES[0], {"role": "user", "content": "Q\nBox it."}],
    ]
    for row, length, messages in zip(batch.tokens, batch.lengths, asked):
        text = tokenizer.render_chat(messages, enable_thinking=enable_thinking)
        assert tokenizer.decode(row[:length]) == text
        assert (row[length:] == tokenizer.pad_id).all()
    assert MESSAGES[1]["content"] == "Q"


@needs_shared
@pytest.mark.parametrize(
    "chat, special_tokens_in_text, closed", [(True, False, 1), (True, True, 2), (False, False, 1)]
)
def test_special_tokens_of_a_problem_are_text_in_a_message_alone(
    chat, special_tokens_in_text, closed
):
    """A plain prompt is all there is, and may hold a conversation that somebody has rendered."""
    qwen3 = HuggingFaceTokenizer(SHARED / "qwen3_tokenizer")
    batch = data.tokenize(
        [Example("a<|im_end|>b", "2")],
        qwen3,
        data.PromptFormat(chat=chat, special_tokens_in_text=special_tokens_in_text),
    )
    assert (batch.tokens == 151_645).sum() == closed


def test_plain_prompts():
    asked = data.PromptFormat(instruction="yz")
    batch = data.tokenize([Example("ab", "c")], LETTERS, asked, max_prompt_tokens=8)
    assert LETTERS.decode(batch.tokens[0, : batch.lengths[0]]) == "ab\nyz"
    with pytest.raises(ValueError, match="set data.chat=True"):
        data.tokenize([Example(MESSAGES, "c", "set")], LETTERS, max_prompt_tokens=8)


# Supervised batches


def test_supervised_rows_are_prompt_solution_stop():
    task = Chain(noise=(0, 0, 0))
    tokenizer = CharacterTokenizer(task.alphabet)
    batch = data.supervised_batch(task, tokenizer, batch_size=8, seed=0, step=3)
    assert batch.tokens.shape == batch.mask.shape == (8, 45)
    for row, mask in zip(batch.tokens, batch.mask):
        prompt = tokenizer.decode(row[~mask])
        completion = row[mask]
        assert completion[-1] == tokenizer.eos_ids[0]
        assert mask.tolist() == [False] * 12 + [True] * 33
        work = tokenizer.decode(completion[:-1])
        assert re.sub("[^-+*0-9]", "", prompt)[1:] == "".join(
            step[1:3] for step in work.split(";")[:-1]
        )
        assert work.split(";")[-2][-1] == work[-1]


def test_supervised_problems_are_not_those_asked_later():
    task = Chain()
    tokenizer = CharacterTokenizer(task.alphabet)
    taught = {
        tuple(row[:12])
        for step in range(5)
        for row in data.supervised_batch(task, tokenizer, 32, 0, step).tokens.tolist()
    }
    batches = data.prompt_batches(task, tokenizer, batch_size=16, max_prompt_tokens=12, seed=0)
    asked = {tuple(row) for _ in range(10) for row in next(batches).tokens.tolist()}
    assert len(taught) == len(asked) == 160 and not taught & asked


def test_supervised_batches_depend_on_seed_and_step_alone():
    task = Chain()
    tokenizer = CharacterTokenizer(task.alphabet)

    def tokens(seed, step):
        return data.supervised_batch(task, tokenizer, 8, seed, step).tokens

    np.testing.assert_array_equal(tokens(0, 1), tokens(0, 1))
    assert (tokens(0, 1) != tokens(0, 2)).any() and (tokens(0, 1) != tokens(1, 1)).any()
