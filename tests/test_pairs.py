"""Pairs of prompt and completion from files: what is learnt, and in which order."""

import json
import logging

import numpy as np
import pytest

from dcmdp_jax import data
from dcmdp_jax.data import PromptFormat
from dcmdp_jax.records import Example
from dcmdp_jax.run import pairs
from dcmdp_jax.run.pairs import Pair
from dcmdp_jax.tokens import tokenizer as tokenizers
from dcmdp_jax.tokens.tokenizer import CharacterTokenizer

LETTERS = CharacterTokenizer("abcdefghijklmnopqrstuvwxyz \n")
SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "What is 2+2?"}
ANSWER = {"role": "assistant", "content": "4"}
REASONED = ANSWER | {"reasoning_content": "two and two"}
CALL = ANSWER | {
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}],
}
RESULT = {"role": "tool", "content": "4"}
THINKING = PromptFormat(chat=True, enable_thinking=True)


@pytest.fixture(scope="module")
def tokenizer(chat_folder):
    return tokenizers.load(chat_folder)


@pytest.fixture
def write(tmp_path):
    def write(*rows):
        path = tmp_path / "pairs.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


def letters(path, prompt_format=PromptFormat(), max_tokens=99):
    read = pairs.read(path, LETTERS, prompt_format, max_tokens=max_tokens)
    return [(LETTERS.decode(pair.prompt), pair.completion) for pair in read]


@pytest.mark.parametrize("prompt", ["prompt", "problem", "question"])
@pytest.mark.parametrize("completion", ["completion", "response", "solution", "answer"])
def test_a_text_is_learnt_up_to_a_stop_token(write, prompt, completion):
    asked = PromptFormat(instruction="yz")
    read = letters(write({prompt: "ab", completion: "cd", "source": "x"}), asked)
    assert read == [("ab\nyz", [*LETTERS.encode("cd"), 1])]


def test_a_worked_solution_is_learnt_rather_than_the_answer(write):
    ((_, completion),) = letters(write({"problem": "ab", "solution": "work", "answer": "w"}))
    assert LETTERS.decode(completion[:-1]) == "work"


def test_parquet_holds_the_same_pairs(write, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [{"prompt": "ab", "completion": "cd"}, {"prompt": "e", "completion": "f"}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "pairs.parquet")
    assert letters(tmp_path / "pairs.parquet") == letters(write(*rows))


@pytest.mark.parametrize("enable_thinking", [True, False])
def test_a_prompt_is_that_of_a_rollout(tokenizer, write, enable_thinking):
    """With the instruction, and a template that leaves thinking out as a rollout does."""
    asked = PromptFormat(chat=True, enable_thinking=enable_thinking, instruction="Box it.")
    empty = "" if enable_thinking else "<think>\n\n</think>\n\n"
    template = "<|im_start|>user\nWhat is 2+2?\nBox it.<|im_end|>\n<|im_start|>assistant\n" + empty
    row = {"prompt": USER["content"], "completion": "4"}
    try:
        (pair,) = pairs.read(write(row), tokenizer, asked, max_tokens=999)
    except ValueError as error:  # the tests' own template writes no empty thought
        assert not enable_thinking and "set data.enable_thinking=True" in str(error)
        return
    assert pair.prompt == data.encode(Example(USER["content"], ""), tokenizer, asked)
    assert tokenizer.decode(pair.prompt) == template


@pytest.mark.parametrize(
    "messages, replies",
    [
        ([USER, ANSWER], [1]),
        ([SYSTEM, USER, REASONED], [2]),
        ([USER, REASONED, USER, REASONED], [1, 3]),
        ([USER, CALL, RESULT, ANSWER], [1, 3]),
        ([ANSWER, USER, ANSWER], [2]),
    ],
)
def test_every_reply_is_learnt_as_transformers_renders_it(
    tokenizer, chat_folder, write, messages, replies
):
    """The text up to a reply with the generation prompt, then the rest: end token and newline."""
    transformers = pytest.importorskip("transformers")
    oracle = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(chat_folder / "tokenizer.json"),
        chat_template=(chat_folder / "chat_template.jinja").read_text(),
    )

    def render(upto, prompts):
        return oracle.apply_chat_template(
            messages[:upto], tokenize=False, enable_thinking=True, add_generation_prompt=prompts
        )

    read = pairs.read(write({"messages": messages}), tokenizer, THINKING, max_tokens=999)
    assert len(read) == len(replies)
    for pair, number in zip(read, replies):
        prompt = render(number, True)
        text = render(number + 1, False)
        assert tokenizer.decode(pair.prompt) == prompt
        assert tokenizer.decode(pair.completion) == text.removeprefix(prompt)
        assert tokenizer.decode(pair.completion).endswith("<|im_end|>\n")
        joint = oracle.encode(text, add_special_tokens=False)
        assert pair.prompt + pair.completion == joint


def test_a_completion_of_messages_is_learnt_and_its_prompt_is_not(tokenizer, write):
    read = pairs.read(
        write({"prompt": [USER, ANSWER, USER], "completion": [ANSWER, USER, ANSWER]}),
        tokenizer,
        THINKING,
        max_tokens=999,
    )
    assert [tokenizer.decode(pair.prompt).count("<|im_start|>") for pair in read] == [4, 6]


def test_special_tokens_of_a_message_are_text(tokenizer, write):
    row = {"prompt": "a<|im_end|>b", "completion": "c<|im_end|>d"}
    (pair,) = pairs.read(write(row), tokenizer, THINKING, max_tokens=999)
    end = tokenizer.encode("<|im_end|>")[0]
    assert pair.prompt.count(end) == 1 and pair.completion.count(end) == 1
    assert "c<|im_end|>d<|im_end|>\n" in tokenizer.decode(pair.completion)


def test_long_pairs_are_left_out_and_counted(write, caplog):
    path = write({"prompt": "ab", "completion": "cd"}, {"prompt": "ab", "completion": "cde"})
    with caplog.at_level(logging.WARNING):
        assert len(letters(path, max_tokens=5)) == 1
    assert "1 of 2 pairs are longer than 5 tokens" in caplog.text
    with pytest.raises(ValueError, match="none of 2 pairs fits in 4 tokens; raise"):
        letters(path, max_tokens=4)


@pytest.mark.parametrize(
    "row, named",
    [
        ([1], "is not a JSON object but a list"),
        ({"completion": "b"}, "gives no problem"),
        ({"prompt": "a"}, "gives no completion as a text or messages"),
        ({"prompt": "a", "completion": " "}, "gives no completion"),
        ({"prompt": "a", "answer": 4}, "gives no completion"),
        ({"messages": [USER, ANSWER]}, "holds chat messages; set data.chat=True"),
        ({"messages": "ab"}, "gives its messages as a text"),
        ({"messages": [{"role": "user"}]}, "message 1 has no role and content"),
        ({"prompt": "A", "completion": "b"}, "not in the alphabet"),
    ],
)
def test_a_row_without_a_pair_is_refused_by_file_and_line(write, row, named):
    path = write({"prompt": "a", "completion": "b"}, row)
    with pytest.raises(ValueError, match=rf"pairs.jsonl line 2: .*{named}") as caught:
        letters(path)
    assert "\n" not in str(caught.value)


def test_messages_without_a_reply_are_refused(tokenizer, write):
    with pytest.raises(ValueError, match="line 1: holds no message of the assistant after another"):
        pairs.read(write({"messages": [ANSWER, USER]}), tokenizer, THINKING, max_tokens=99)


def test_half_a_surrogate_pair_is_refused(tokenizer, write):
    with pytest.raises(ValueError, match="half a surrogate pair"):
        pairs.read(write({"prompt": "a", "completion": "\ud83d"}), tokenizer, max_tokens=99)


@pytest.mark.parametrize("name", ["none.jsonl", "pairs.txt"])
def test_a_file_that_is_missing_or_of_another_kind_is_refused(tmp_path, name):
    (tmp_path / "pairs.txt").touch()
    with pytest.raises(ValueError, match="does not exist|neither .jsonl nor .parquet"):
        letters(tmp_path / name)


def test_an_empty_file_is_refused(write):
    with pytest.raises(ValueError, match="is empty"):
        letters(write())


# Order

NUMBERED = [Pair([2], [i]) for i in range(7)]


def drawn(step, **changes):
    how = {"batch_size": 3, "seed": 5} | changes
    return [pair.completion[0] for pair in pairs.draw(NUMBERED, step=step, **how)]


def test_epochs_have_each_pair_once_and_their_own_order():
    order = sum((drawn(step) for step in range(7)), [])
    epochs = [tuple(order[i : i + 7]) for i in (0, 7, 14)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len(set(epochs)) == 3


def test_a_step_is_drawn_without_those_before_it():
    assert drawn(4) == drawn(4) and drawn(4) != drawn(4, seed=6)


def test_without_shuffle_pairs_keep_the_order_of_the_file():
    assert drawn(2, shuffle=False) == [6, 0, 1]


def test_a_batch_may_hold_several_epochs():
    assert sorted(drawn(0, batch_size=14)) == sorted([*range(7)] * 2)


def test_packed_rows_hold_the_pairs_and_mask_the_completions():
    batch = pairs.pack(
        [Pair([5, 6], [7, 8, 1]), Pair([9], [3, 1])],
        microbatches=1,
        row_length=8,
        width=4,
        pad_id=0,
    )
    assert batch.tokens.shape == (1, 1, 1, 8)
    assert batch.tokens.ravel().tolist() == [5, 6, 7, 8, 1, 9, 3, 1]
    assert batch.segment_ids.ravel().tolist() == [1] * 5 + [2] * 3
    told = [row[mask].tolist() for row, mask in zip(batch.completions[0, 0], batch.mask[0, 0])]
    assert sorted(told) == [[3, 1], [7, 8, 1]]
    flat = batch.tokens.ravel()
    np.testing.assert_array_equal(flat[batch.index + 1][batch.mask], batch.completions[batch.mask])
