"""Names of the Hub, against a stand-in over HTTP: what is downloaded, pinned and refused."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import pytest

from dcmdp_jax import cli, hub
from dcmdp_jax.config import ModelSource
from dcmdp_jax.experiment import pin
from dcmdp_jax.models import weights
from dcmdp_jax.run.record import to_json
from dcmdp_jax.tokens import tokenizer
from support import hosts_experiment, hub_server
from support.random_params import random_params
from support.steps import make_config
from support.tiny_models import TINY

huggingface_hub = pytest.importorskip("huggingface_hub")

OLD = "a" * 40
NEW = "b" * 40
ROOT = pathlib.Path(__file__).parents[1]
REPOS = {
    ("models", "own/small"): {
        OLD: {"config.json": b'{"age": "old"}'},
        NEW: {
            "config.json": b'{"age": "new"}',
            "model.safetensors": b"weights",
            "consolidated.safetensors": b"again",
            "onnx/model.json": b"{}",
            "README.md": b"# Small",
        },
    },
    ("datasets", "own/problems"): {
        NEW: {
            "main/train-00000-of-00001.parquet": b"train",
            "main/test-00000-of-00001.parquet": b"test",
            "socratic/train-00000-of-00001.parquet": b"socratic",
        }
    },
    ("datasets", "own/shards"): {NEW: {"a/train-0.jsonl": b"", "b/train-1.jsonl": b""}},
    ("datasets", "own/pictures"): {NEW: {"one.png": b""}},
}


@pytest.fixture(scope="module")
def server():
    with hub_server.serve(dict(REPOS)) as running:
        yield running


@pytest.fixture
def ask(server, tmp_path):
    """(function, text) -> what a function of `hub` returns, or its message; in a new process, since
    the library reads its environment once.
    """

    def run(function, text, online=True):
        code = f"from dcmdp_jax import hub\ntry: print(hub.{function}({text!r}))\n"
        code += "except ValueError as error: print('ValueError:', error)"
        url = server.url if online else "http://127.0.0.1:9"
        environment = os.environ | {
            "HF_ENDPOINT": url,
            "HF_HOME": str(tmp_path / "cache"),
            "HF_HUB_DISABLE_XET": "1",
            "PYTHONPATH": str(ROOT),
        }
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    return run


@pytest.mark.parametrize("text", ["", "/somewhere/model", "model", "a/b/c", "./a/b", "a/b.jsonl"])
def test_paths_are_no_names(text):
    assert hub.model_folder(text) == hub.data_file(text) == hub.pinned_model(text) == text


def test_a_path_that_exists_is_no_name(tmp_path):
    pathlib.Path("own/small").mkdir(parents=True)
    assert hub.model_folder("own/small") == "own/small"


def test_a_model_is_downloaded_without_what_is_not_read(ask):
    folder = pathlib.Path(ask("model_folder", "own/small"))
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert json.loads((folder / "config.json").read_text()) == {"age": "new"}


def test_a_name_is_pinned_to_its_newest_commit(ask):
    assert ask("pinned_model", "own/small") == f"own/small@{NEW}"


def test_settings_come_without_weights(ask):
    folder = pathlib.Path(ask("settings_folder", "own/small"))
    assert [path.name for path in folder.iterdir()] == ["config.json"]


@pytest.mark.full
def test_a_pinned_name_is_that_commit(ask):
    folder = pathlib.Path(ask("model_folder", f"own/small@{OLD}"))
    assert json.loads((folder / "config.json").read_text()) == {"age": "old"}
    assert ask("pinned_model", f"own/small@{OLD}") == f"own/small@{OLD}"


@pytest.mark.full
@pytest.mark.parametrize("text", ["own/small", f"own/small@{NEW}"])
def test_what_is_cached_needs_no_network(text, ask):
    folder = ask("model_folder", "own/small")
    assert ask("model_folder", text, online=False) == folder


@pytest.mark.parametrize(
    ("text", "file"),
    [
        ("own/problems", "main/train-00000-of-00001.parquet"),
        ("own/problems:main/test", "main/test-00000-of-00001.parquet"),
        ("own/problems:socratic", "socratic/train-00000-of-00001.parquet"),
    ],
)
def test_a_data_set_is_pinned_with_the_file_that_is_meant(text, file, ask):
    assert ask("pinned_data", text) == f"own/problems@{NEW}:{file}"


@pytest.mark.full
def test_the_file_of_a_data_set_is_downloaded_and_then_cached(ask):
    path = pathlib.Path(ask("data_file", "own/problems"))
    assert path.read_bytes() == b"train"
    pinned = f"own/problems@{NEW}:main/train-00000-of-00001.parquet"
    assert ask("data_file", pinned, online=False) == str(path)
    assert ask("data_file", "own/problems", online=False) == str(path)


@pytest.mark.full
@pytest.mark.parametrize(
    ("function", "text", "message"),
    [
        ("model_folder", "own/none", "own/none is neither a path here nor a model of the Hub that"),
        ("data_file", "own/none", "own/none is neither a path here nor a data set of the Hub"),
        ("model_folder", "own/small@v9", "own/small@v9 has no such revision"),
        ("data_file", "own/problems:main/none.jsonl", "has no such file; correct what follows"),
        ("data_file", "own/problems:main", "own/problems:main means 2 files of the data set; name"),
        ("data_file", "own/shards", "own/shards means 2 files of the data set; name one as"),
        ("data_file", "own/problems:other", "means no file of the data set"),
        ("data_file", "own/pictures", "own/pictures holds no .jsonl or .parquet file"),
    ],
)
def test_what_is_not_there_is_one_sentence(function, text, message, ask):
    answer = ask(function, text)
    assert message in answer and answer.startswith("ValueError: ") and "\n" not in answer


@pytest.mark.parametrize("function", ["model_folder", "data_file"])
def test_without_a_network_it_is_one_sentence(function, ask):
    answer = ask(function, "own/unseen", online=False)
    assert "own/unseen is neither a path here nor in the cache, and the Hub cannot be" in answer
    assert answer.startswith("ValueError: ") and "\n" not in answer


@pytest.mark.parametrize(
    ("recorded", "text", "kept"),
    [
        ("own/a@1", "own/a", "own/a@1"),
        ("own/a@1:main/train-0.parquet", "own/a:main/train", "own/a@1:main/train"),
        ("own/a@1", "own/a@2", "own/a@2"),
        ("own/a@1", "own/b", "own/b"),
        ("own/a@1", "/own/a", "/own/a"),
        ("", "own/a", "own/a"),
        ("own/a", "own/a", "own/a"),
    ],
)
def test_a_name_is_at_the_commit_of_the_record(recorded, text, kept):
    assert hub.at_commit_of(recorded, text) == kept


def test_a_name_and_its_commit_are_given_apart():
    assert hub.repository("own/a@1") == ("own/a", "1")
    assert hub.repository("own/a") == ("own/a", None)
    assert hub.repository("/own/a@1") == ("/own/a@1", None)


def test_a_push_that_fails_says_how_to_log_in(monkeypatch):
    class Api:
        def create_repo(self, name, **options):
            raise OSError("401 Unauthorized")

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    with pytest.raises(ValueError, match="own/small cannot be pushed .*401.*; log in with `hf"):
        hub.push("folder", "own/small", private=False)


# In a run; the library's functions are replaced from here on


@pytest.fixture
def snapshot(tmp_path, monkeypatch):
    """Returns the list of what is asked for; each answer is a folder with a tiny model."""
    folder = tmp_path / "snapshots" / NEW
    weights.save(folder, TINY, random_params(TINY))
    tokenizer.save(tokenizer.CharacterTokenizer("abc"), folder)
    asked = []

    def download(repo, *, revision, **patterns):
        asked.append((repo, revision))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    hub.settings_folder.cache_clear()
    hub.model_folder.cache_clear()
    yield asked
    hub.settings_folder.cache_clear()
    hub.model_folder.cache_clear()


def test_the_record_of_a_run_holds_the_commit(snapshot):
    config = dataclasses.replace(make_config(TINY), model=ModelSource("own/tiny"))
    assert to_json(pin(config))["model"]["folder"] == f"own/tiny@{NEW}"


def test_a_configuration_without_names_is_left_as_it_is():
    config = make_config(TINY)
    assert pin(config) == config


def test_the_short_options_take_names(snapshot, capsys):
    words = ["--model", "own/tiny", "--data", "problems.jsonl", "--fields"]
    assert cli.main(["train", hosts_experiment.__file__, *words]) == 0
    out = capsys.readouterr().out
    assert f"--model.folder 'own/tiny@{NEW}'" in out and "--data.path 'problems.jsonl'" in out


def test_a_run_goes_on_with_its_commit_after_a_newer_one(monkeypatch):
    def pinned(text):
        return f"{text}@{NEW}" if text == "own/other" else text

    monkeypatch.setattr(hub, "pinned_model", pinned)
    before, now = (
        dataclasses.replace(make_config(TINY), model=ModelSource(name, "own/other"))
        for name in (f"own/tiny@{OLD}", "own/tiny")
    )
    found = pin(now, to_json(before)).model
    assert (found.folder, found.tokenizer) == (f"own/tiny@{OLD}", f"own/other@{NEW}")


def test_commands_on_a_folder_take_names(snapshot, capsys):
    assert cli.main(["generate", "own/tiny", "abd"]) == 2
    assert "character 'd' is not in the alphabet 'abc'" in capsys.readouterr().err
    assert snapshot == [("own/tiny", None)]


def test_a_tokenizer_is_named_likewise(snapshot, capsys):
    weights.save("model", TINY, random_params(TINY))
    assert cli.main(["generate", "model", "abd", "--tokenizer", "own/tokenizer"]) == 2
    assert "character 'd' is not in the alphabet 'abc'" in capsys.readouterr().err
    assert snapshot == [("own/tokenizer", None)]


@pytest.fixture
def pushed(tmp_path, monkeypatch):
    """Returns the list of what is uploaded."""
    calls = []

    class Commit:
        commit_url = "https://hub/own/tiny/commit/1"

    class Api:
        def create_repo(self, name, **options):
            calls.append((name, options))

        def upload_folder(self, **options):
            calls.append(options)
            return Commit()

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    return calls


def test_a_model_folder_is_pushed(pushed, tmp_path, capsys):
    folder = str(tmp_path / "model")
    weights.save(folder, TINY, random_params(TINY))
    assert cli.main(["push", folder, "own/tiny", "--private"]) == 0
    assert pushed == [
        ("own/tiny", {"private": True, "exist_ok": True}),
        {"repo_id": "own/tiny", "folder_path": folder},
    ]
    assert "commit/1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("folder", "name", "message"),
    [("nowhere", "own/tiny", "nowhere does not exist"), ("model", "tiny", "'tiny' is no name of")],
)
def test_what_cannot_be_pushed_is_refused(folder, name, message, pushed, capsys):
    weights.save("model", TINY, random_params(TINY))
    assert cli.main(["push", folder, name]) == 2
    assert message in capsys.readouterr().err and not pushed
