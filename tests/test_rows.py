"""Layouts of data files, and rows that are refused by file and line."""

import datetime
import json
import logging
import pathlib
import pickle
import pprint
import sys

import numpy as np
import pytest

from dcmdp_jax import data
from dcmdp_jax.records import Columns, Example
from support import own_data

SHARED = pathlib.Path(__file__).parents[1].parent / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data")

VERL = {
    "data_source": "math_dapo",
    "prompt": [{"role": "user", "content": "1+1?"}],
    "ability": "MATH",
    "reward_model": {"ground_truth": "2", "style": "rule"},
    "extra_info": {"index": "0"},
}


def jsonl(path, *rows):
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


@pytest.mark.parametrize(
    "row, expected",
    [
        ({"question": "q", "answer": "so <<1+1=2>>2\n#### 1,200"}, Example("q", "1,200", "set")),
        (
            {"problem": "p", "solution": r"First \boxed{1}. Then \boxed{\frac{1}{2}}."},
            Example("p", r"\frac{1}{2}", "set"),
        ),
        ({"problem": "p", "solution": r"\boxed{1}", "answer": "2"}, Example("p", "2", "set")),
        ({"question": "q", "answer": 70.0}, Example("q", "70", "set")),
        ({"question": "q", "answer": 0.5}, Example("q", "0.5", "set")),
        ({"question": "q", "answer": 0}, Example("q", "0", "set")),
        (
            {"question": "q", "final_answer": ["$1,3$", 5.0], "solution": ["..."]},
            Example("q", "$1,3$, 5", "set"),
        ),
        ({"prompt": "p", "answer": "a"}, Example("p", "a", "set")),
        (VERL, Example([{"role": "user", "content": "1+1?"}], "2", "math_dapo")),
    ],
)
def test_layouts(tmp_path, row, expected):
    (example,) = data.read(jsonl(tmp_path / "set.jsonl", row))
    assert example[:3] == expected[:3]


@pytest.mark.parametrize(
    "row, columns",
    [
        ({"problem": "p", "answer": "2", "tests": ["f(1) == 2"]}, {"tests": ["f(1) == 2"]}),
        ({"problem": "p", "solution": r"\boxed{1}"}, {"solution": r"\boxed{1}"}),
        (VERL, {name: value for name, value in VERL.items() if name != "prompt"}),
        ({"question": "q", "answer": "#### 2"}, {}),
    ],
)
def test_a_verifier_gets_the_other_columns_of_a_row(tmp_path, row, columns):
    assert data.read(jsonl(tmp_path / "set.jsonl", row))[0].columns == columns


def test_columns_of_parquet_rows_may_hold_what_json_cannot(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    row = {"problem": "p", "answer": "1", "day": datetime.date(2026, 1, 1)}
    parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "a.parquet")
    assert data.read(tmp_path / "a.parquet")[0].columns == {"day": datetime.date(2026, 1, 1)}


def test_columns_are_read_only():
    example = Example("p", "1", columns=Columns({"level": 5}))
    with pytest.raises(TypeError):
        example.columns["level"] = 6


def test_an_example_can_be_sent_to_a_verifiers_worker_process():
    example = Example("p", "1", columns=Columns({"level": 5}))
    assert pickle.loads(pickle.dumps(example)) == example


def test_problems_that_differ_in_other_columns_alone_are_repeats(tmp_path):
    rows = [{"problem": "p", "answer": "1", "index": i} for i in range(2)]
    (example,) = data.read(jsonl(tmp_path / "set.jsonl", *rows))
    assert example.columns == {"index": 0}


@pytest.mark.parametrize(
    "name, count, first",
    [
        ("math_eval/aime24", 30, "204"),
        ("math_eval/aime25", 30, "70"),
        ("math_eval/amc23", 40, "27"),
        ("math_eval/math500", 500, r"\left( 3, \frac{\pi}{2} \right)"),
        ("math_eval/minerva_math", 272, "1.6"),
        ("math_eval/olympiadbench", 675, "2"),
        ("gsm8k/train", 7473, "72"),
        ("gsm8k/test", 1319, "18"),
    ],
)
@needs_shared
def test_published_sets(name, count, first):
    examples = data.read(SHARED / f"{name}.jsonl")
    found = len(examples), examples[0].answer, examples[0].source
    assert found == (count, first, name.split("/")[1])
    assert all(isinstance(e.prompt, str) and e.prompt and e.answer for e in examples)


@pytest.mark.parametrize("name, answers", own_data.answers().items(), ids=list(own_data.answers()))
def test_rows_in_the_layouts_of_the_published_sets(tmp_path, name, answers):
    """Field names differ from set to set; our own rows have each set's."""
    examples = data.read(own_data.write_sets(tmp_path) / f"{name}.jsonl")
    assert [example.answer for example in examples] == answers
    assert {example.source for example in examples} == {name.split("/")[1]}
    assert all(isinstance(e.prompt, str) and e.prompt for e in examples)


def test_parquet_and_repeats(tmp_path, caplog):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    other = VERL | {"reward_model": {"ground_truth": "3", "style": "rule"}}
    file = tmp_path / "dapo-math-17k.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([VERL, other, VERL, VERL]), file)
    with caplog.at_level(logging.WARNING):
        examples = data.read(file)
    assert [(e.prompt, e.answer, e.source) for e in examples] == [
        (VERL["prompt"], answer, "math_dapo") for answer in ("2", "3")
    ]
    assert "2 of 4 problems repeat another" in caplog.text


@pytest.mark.parametrize(
    "name, content, error",
    [
        ("a.jsonl", "", "is empty"),
        ("a.jsonl", "\n\n", "is empty"),
        ("a.csv", "x", "neither .jsonl nor .parquet"),
        (
            "a.jsonl",
            '{"problem": "p", "answer": "1"}\n{"problem": ',
            "a.jsonl line 2 is not valid JSON",
        ),
        ("a.jsonl", b'{"problem": "\xff"}', "a.jsonl line 1 is not valid JSON"),
        ("a.jsonl", "[1]", "line 1 is not a JSON object"),
        (
            "a.jsonl",
            '{"text": "p", "label": 1}',
            r"line 1 gives no .*\['label', 'text'\]; known layouts: GSM8K .* verl",
        ),
        ("a.jsonl", '\n{"problem": "p"}', "line 2 gives no answer"),
        ("a.jsonl", '{"problem": "p", "solution": "no box"}', "gives no answer"),
        ("a.jsonl", '{"problem": "  ", "answer": "1"}', "gives no problem"),
        ("a.jsonl", '{"prompt": [{"content": "q"}], "answer": "1"}', "gives no problem"),
        ("a.jsonl", '{"prompt": "p", "reward_model": {}}', "gives no answer"),
        ("a.parquet", "x", "not a readable Parquet file"),
    ],
)
def test_bad_files(tmp_path, name, content, error):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=error):
        data.read(tmp_path / name)


def asked(content, **more):
    return {
        "prompt": [{"role": "user", "content": content, **more}],
        "reward_model": {"ground_truth": "5"},
    }


TEXT = {"type": "text", "text": "2+3?"}


@pytest.mark.parametrize(
    "row, expected",
    [
        (asked([TEXT]), "2+3?"),
        (asked([{"type": "text", "text": "What is "}, TEXT]), "What is 2+3?"),
        (asked([TEXT | {"image": None}, {"type": "text", "text": ""}]), "2+3?"),
        (asked("2+3?"), "2+3?"),
    ],
)
def test_contents_as_parts_are_joined(tmp_path, row, expected):
    (example,) = data.read(jsonl(tmp_path / "set.jsonl", row))
    assert example.prompt == [{"role": "user", "content": expected}]


def test_contents_as_parts_are_joined_in_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    row = asked([{"type": "text", "text": "What is "}, TEXT])
    parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "set.parquet")
    (example,) = data.read(tmp_path / "set.parquet")
    assert example.prompt == [{"role": "user", "content": "What is 2+3?"}]


def test_null_beside_tool_calls_is_the_empty_text(tmp_path):
    call = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"function": {"name": "add", "arguments": {}}}],
    }
    row = {"prompt": [{"role": "user", "content": "q"}, call], "answer": "5"}
    assert data.read(jsonl(tmp_path / "set.jsonl", row))[0].prompt[1] == call | {"content": ""}


@pytest.mark.parametrize(
    "row, error",
    [
        (asked(None), "gives no problem: the content of message 1 is null"),
        (asked(5), "the content of message 1 is a number"),
        (asked({"text": "q"}), "the content of message 1 is an object"),
        (asked([]), "gives no problem"),
        (asked("  "), "gives no problem"),
        (asked(["q"]), r"message 1 has a part that is not text \(a string\)"),
        (
            asked([TEXT, {"type": "image_url", "image_url": "x"}]),
            r"message 1 has a part that is not text \(image_url\)",
        ),
        (asked([{"type": "text", "text": None}]), "message 1 has a part that is not text"),
        (asked("q", role=5), "the role of message 1 is a number"),
        ({"prompt": ["q"], "answer": "1"}, "message 1 has no role and content"),
        ({"prompt": {"role": "user", "content": "q"}, "answer": "1"}, "gives no problem"),
        (
            {"prompt": json.dumps([{"role": "user", "content": "q"}]), "answer": "1"},
            "its messages in a string",
        ),
        (
            {"prompt": json.dumps([TEXT]), "answer": "1"},
            "its messages in a string",
        ),
        (asked(json.dumps([TEXT])), "its parts in a string"),
        ({"problem": "p", "answer": "{'target': 5}"}, "gives an answer that is JSON in a string"),
        (
            {"prompt": json.dumps({"role": "user", "content": "q"}), "answer": "1"},
            "its messages in a string",
        ),
        ({"problem": 5, "answer": "1"}, "gives no problem"),
        ({"problem": "p", "answer": float("nan")}, "gives no answer: it says 'nan'"),
        ({"problem": "p", "answer": float("inf")}, "gives no answer: it says 'inf'"),
        ({"problem": "p", "answer": "nan"}, "gives no answer: it says 'nan'"),
        ({"problem": "p", "answer": "None"}, "gives no answer: it says 'None'"),
        ({"problem": "p", "answer": " "}, "gives no answer"),
        ({"problem": "p", "answer": True}, "gives no answer: what stands there is true or false"),
        (
            {"problem": "p", "answer": {"target": 5}},
            "gives no answer: what stands there is an object",
        ),
        (
            {"problem": "p", "reward_model": {"ground_truth": {"target": 5}}},
            "gives no answer: what stands there is an object",
        ),
        ({"problem": "p", "reward_model": json.dumps({"ground_truth": "5"})}, "gives no answer"),
        ({"problem": "p", "answer": []}, "gives no answer"),
        ({"problem": "p", "answer": [None]}, "gives no answer"),
        ({"problem": "p", "answer": [["1"]]}, "gives no answer: what stands there is a list"),
        (
            {"problem": "p", "answer": ["1", {"a": 2}]},
            "gives no answer: what stands there is an object",
        ),
        ({"problem": "p", "answer": '["34"]'}, "gives an answer that is JSON in a string"),
        ({"problem": "p", "answer": "['34']"}, "gives an answer that is JSON in a string"),
        ({"problem": "p", "answer": "[34]"}, "gives an answer that is JSON in a string"),
        ({"problem": "p", "answer": '["a", "b"]'}, "gives an answer that is JSON in a string"),
        ({"problem": "p", "answer": '{"target": 5}'}, "gives an answer that is JSON in a string"),
        ({"problem": "p \ud800", "answer": "1"}, "holds half a surrogate pair"),
        ({"problem": "p", "answer": "\udc00"}, "holds half a surrogate pair"),
        (asked("q", name="\ud83d"), "holds half a surrogate pair"),
    ],
)
def test_rows_that_would_be_trained_on_as_other_text_are_refused_by_line(tmp_path, row, error):
    with pytest.raises(ValueError, match=f"set.jsonl line 2 .*{error}"):
        data.read(jsonl(tmp_path / "set.jsonl", {"problem": "p", "answer": "1"}, row))


ASKED = [{"role": "user", "content": "What's 2+3?"}]


@pytest.mark.parametrize(
    "content",
    [
        ASKED,
        ASKED[0],
        [{"role": "system", "content": "s"}, *ASKED],
        [TEXT],
        TEXT,
        [TEXT, TEXT],
        [{"index": 0, "content": "q", "role": "user"}],
        [{"type": "image_url", "image_url": "x"}],
    ],
)
@pytest.mark.parametrize(
    "printed",
    [
        str,
        lambda value: f" {value!r}\n",
        pprint.pformat,
        lambda value: pprint.pformat(value, width=9),
        lambda value: str(np.array(value, object)),
        lambda value: repr(np.array(value, object)),
    ],
)
def test_messages_that_python_printed_are_refused_by_line(tmp_path, content, printed):
    """As prompts, and as what a user says."""
    for row, what in (
        ({"prompt": printed(content), "answer": "5"}, "messages"),
        (asked(printed(content)), "parts"),
    ):
        with pytest.raises(ValueError, match=f"set.jsonl line 1 gives its {what} in a string"):
            data.read(jsonl(tmp_path / "set.jsonl", row))


@pytest.mark.parametrize(
    "text",
    [
        "{'a', 'b'} and {'c'}: how many?",
        "What does {'role': 'user'} print?",
        "{'a': 1}['a'] = ?",
        "{'a', 'b'}",
        "[{'x': 1}]",
        "Sort [{'role': 1}] by role.",
        "['role': 2]",
        "{role: user}",
        "{'role': 'user'} has how many keys?",
    ],
)
def test_texts_that_hold_dicts_are_problems(tmp_path, text):
    found = data.read(jsonl(tmp_path / "set.jsonl", asked(text), {"prompt": text, "answer": "1"}))
    assert [found[0].prompt[0]["content"], found[1].prompt] == [text, text]


@pytest.mark.parametrize(
    "answer",
    ["[0, 1]", "[-2,7]", "(1, 2)", "[2,5)", "{1,2}", "nano", "None of them", r"\text{None}"],
)
def test_golds_that_look_like_lists_or_nothing_are_kept(tmp_path, answer):
    assert data.read(jsonl(tmp_path / "set.jsonl", {"problem": "[1, 2]", "answer": answer})) == [
        Example("[1, 2]", answer, "set")
    ]


@pytest.mark.parametrize(
    "line",
    [
        b"[" * 100_000,
        b'{"problem": "p", "answer": ' + b"[" * 100_000,
        b'{"problem": "p", "answer": ' + b"1" * 5000 + b"}",
        b'"text"',
        b"null",
        b"{",
        b'{"problem": "\xff", "answer": "1"}',
    ],
)
def test_lines_that_are_no_rows_are_refused_by_line(tmp_path, line):
    (tmp_path / "set.jsonl").write_bytes(b'{"problem": "p", "answer": "1"}\n' + line)
    with pytest.raises(ValueError, match="set.jsonl line 2 is not "):
        data.read(tmp_path / "set.jsonl")


@pytest.mark.parametrize(
    "value, error",
    [
        (float("nan"), "it says 'nan'"),
        (b"5", "a value of type bytes"),
        (datetime.date(2026, 1, 1), "a value of type date"),
        ({"target": 5}, "an object"),
        (True, "true or false"),
    ],
)
def test_parquet_rows_are_refused_by_row(tmp_path, value, error):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(
        pyarrow.Table.from_pylist([{"problem": "p", "answer": value}]), tmp_path / "a.parquet"
    )
    with pytest.raises(ValueError, match=f"a.parquet row 1 gives no answer: .*{error}"):
        data.read(tmp_path / "a.parquet")


def test_a_date_in_a_message_is_refused_by_row(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    row = {
        "prompt": [{"role": "user", "content": "q", "when": datetime.date(2026, 1, 1)}],
        "answer": "1",
    }
    parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="a.parquet row 1 holds what JSON cannot"):
        data.read(tmp_path / "a.parquet")


def test_missing_file_and_missing_library(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="nowhere.jsonl does not exist"):
        data.read(tmp_path / "nowhere.jsonl")
    (tmp_path / "a.parquet").touch()
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    remedy = r"pyarrow is not installed; pip install 'dcmdp-jax\[train\]'"
    with pytest.raises(ValueError, match=remedy):
        data.read(tmp_path / "a.parquet")
