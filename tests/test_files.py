"""Files are written in one piece, and what is wrong in one that is read is named."""

import json
import subprocess
import sys

import pytest

from dcmdp_jax import files


def test_a_write_replaces_the_file(tmp_path):
    (tmp_path / "a.txt").write_text("old")
    files.write_atomic(tmp_path / "a.txt", "new")
    assert (tmp_path / "a.txt").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    def fail(descriptor):
        raise OSError("no space left")

    (tmp_path / "a.txt").write_text("old")
    monkeypatch.setattr(files.os, "fsync", fail)
    with pytest.raises(OSError, match="no space left"):
        files.write_atomic(tmp_path / "a.txt", "new")
    assert (tmp_path / "a.txt").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_a_character_that_utf8_cannot_hold_becomes_a_question_mark(tmp_path):
    files.write_atomic(tmp_path / "a.txt", "a\udc80b")
    assert (tmp_path / "a.txt").read_bytes() == b"a?b"


def test_a_folder_appears_when_its_block_ends(tmp_path):
    with files.atomic_folder(tmp_path / "new") as folder:
        (folder / "a").touch()
        assert not (tmp_path / "new").exists()
    assert (tmp_path / "new" / "a").exists()


def test_a_folder_whose_block_raises_does_not_appear(tmp_path):
    with pytest.raises(KeyError), files.atomic_folder(tmp_path / "new") as folder:
        (folder / "a").touch()
        raise KeyError
    assert not list(tmp_path.iterdir())


@pytest.fixture
def ended_process():
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_the_folder_of_a_killed_process_is_removed(tmp_path, ended_process):
    (tmp_path / f".new.{ended_process}" / "model").mkdir(parents=True)
    files.remove_unfinished(tmp_path / "new")
    assert not list(tmp_path.iterdir())


def test_the_folder_of_a_running_process_stays(tmp_path):
    with files.atomic_folder(tmp_path / "new") as folder:
        files.remove_unfinished(tmp_path / "new")
        assert folder.is_dir()


def test_json_holds_null_where_a_number_is_not_finite(tmp_path):
    path = files.write_json(tmp_path / "made" / "a.json", {"a": [1.5, float("nan")], "b": (True,)})
    assert json.loads(path.read_text()) == {"a": [1.5, None], "b": [True]}


@pytest.mark.parametrize(
    "text, message",
    [
        (b"{", "a.json is not valid JSON: Expecting"),
        (b'"\xff"', "a.json is not valid JSON: 'utf-8' codec"),
        (b"[" * 100_000, "a.json is not valid JSON for this reader: it is nested too deeply"),
        (b"9" * 5000, "a.json is not valid JSON: Exceeds the limit"),
        (b"[1]", "a.json holds a list, not a JSON object"),
        (b"true", "a.json holds true or false, not a JSON object"),
        (b"null", "a.json holds null, not a JSON object"),
        (b"1.5", "a.json holds a number, not a JSON object"),
        (b'"x"', "a.json holds a string, not a JSON object"),
    ],
)
def test_what_is_no_json_object_is_named(tmp_path, text, message):
    (tmp_path / "a.json").write_bytes(text)
    with pytest.raises(ValueError, match=message):
        files.read_json_object(tmp_path / "a.json")


@pytest.mark.parametrize(
    "value, kind, expected",
    [
        (3, files.INTEGER, True),
        (3.0, files.INTEGER, False),
        (2**53 + 1, files.INTEGER, False),
        (True, files.INTEGER, False),
        (True, files.NUMBER, False),
        (True, files.BOOLEAN, True),
        (1, files.BOOLEAN, False),
        (3, files.NUMBER, True),
        (float("inf"), files.NUMBER, False),
        (None, files.NUMBER, False),
        (None, files.NUMBER_OR_NULL, True),
        ("3", files.NUMBER, False),
        ("", files.STRING, True),
    ],
)
def test_kinds(value, kind, expected):
    assert files.matches(value, kind) is expected


@pytest.mark.parametrize(
    "record, message",
    [
        ([1], r"place is \[1\], not an object; correct or remove it"),
        ({}, "place lacks 'n'; correct or remove it"),
        ({"n": "3"}, "place has 'n' = '3', not an integer; correct or remove it"),
    ],
)
def test_a_record_of_another_form_is_named(record, message):
    with pytest.raises(ValueError, match=message):
        files.check_fields(record, {"n": files.INTEGER}, "place")


def test_a_record_may_have_further_fields():
    files.check_fields({"n": 3, "m": "x"}, {"n": files.INTEGER}, "place")
