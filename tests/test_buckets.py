"""Addresses of a bucket: what is downloaded, pinned, locked and refused. The same tests run on a
stand-in for Google's library and on the library with a server.
"""

import contextlib
import http.server
import os
import pathlib
import shutil
import sys
import threading
from unittest import mock

import pytest

from dcmdp_jax import buckets, cli, hub
from dcmdp_jax.run import staging
from support import gcs_server
from support.pages import CONFIG, ROWS, make_run

needs_library = pytest.mark.skipif(
    not gcs_server.is_installed("google.cloud.storage"),
    reason="not installed: google.cloud.storage",
)


@pytest.fixture(scope="module")
def server():
    with gcs_server.serve() as client:
        yield client


@pytest.fixture(
    params=["stand-in", pytest.param("server", marks=[gcs_server.needed, pytest.mark.full])]
)
def put(request, tmp_path, monkeypatch):
    """(path, text) -> nothing, writes an object of the bucket `own`, which is empty at first."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(staging, "_staged", {})
    monkeypatch.setattr(staging, "LEASE", 1.0)
    monkeypatch.setattr(staging, "RENEWAL", 0.1)
    hub.model_folder.cache_clear()
    hub.settings_folder.cache_clear()
    hub.data_file.cache_clear()
    with contextlib.ExitStack() as stack:
        if request.param == "server":
            client = request.getfixturevalue("server")
            for blob in client.list_blobs("own"):
                blob.delete()
        else:
            client = stack.enter_context(gcs_server.stand_in())
        yield lambda path, text: client.bucket("own").blob(path).upload_from_string(text)


def names(path):
    return sorted(buckets.listing(buckets.parse(f"gs://own/{path}")))


def content(path):
    found = buckets.read(buckets.parse(f"gs://own/{path}"))
    return found and found[0].decode()


@pytest.mark.parametrize(
    "text, address",
    [
        ("gs://own/a", ("own", "a", None)),
        ("gs://own/a/b.jsonl", ("own", "a/b.jsonl", None)),
        ("gs://own/a/b/", ("own", "a/b", None)),
        ("gs://own/a#12", ("own", "a", "12")),
        ("gs://own/a/#12", ("own", "a", "12")),
        ("a/b", None),
        ("own/small@main:test", None),
        ("", None),
    ],
)
def test_addresses(text, address):
    assert buckets.parse(text) == address


@pytest.mark.parametrize("text", ["gs://own", "gs://own/", "gs://", "s3://own/a", "gs://own/a#"])
def test_other_addresses_are_refused(text):
    with pytest.raises(ValueError, match=f"^{text} is no address that is read; give a path, or gs"):
        hub.model_folder(text)


def test_a_missing_library_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "google.api_core", None)
    with pytest.raises(ValueError, match="google-cloud-storage, which is not installed; pip inst"):
        hub.pinned_data("gs://own/problems.jsonl")
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    experiment = pathlib.Path(__file__).parents[1] / "experiments" / "quickstart.py"
    assert cli.main(["train", str(experiment), "--workdir", "gs://own/run"]) == 2
    _, _, err = capsys.readouterr().err.partition("\n")  # after what was started
    assert err == (
        "dcmdp: gs://own/run needs gcsfs, which is not installed; pip install "
        "'dcmdp-jax[buckets]'\n"
    )


# Models and problems


def put_model(put):
    put("small/config.json", "{}")
    put("small/model.safetensors", "weights")
    put("small/consolidated.safetensors", "again")
    put("small/onnx/model.json", "{}")
    put("small/README.md", "# Small")
    put("smaller/config.json", "another")


def test_a_model_is_downloaded_without_what_is_not_read(put):
    put_model(put)
    folder = pathlib.Path(hub.settings_folder("gs://own/small"))
    assert [path.name for path in folder.iterdir()] == ["config.json"]
    assert hub.model_folder("gs://own/small/") == str(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert (folder / "model.safetensors").read_text() == "weights"


def test_a_folder_is_pinned_to_what_lies_there(put):
    put_model(put)
    pinned = hub.pinned_model("gs://own/small")
    put("small/README.md", "# Smaller")  # is not read
    assert hub.pinned_model("gs://own/small") == hub.pinned_model(pinned) == pinned
    assert hub.at_commit_of(pinned, "gs://own/small") == pinned
    assert hub.at_commit_of(pinned, "gs://own/smaller") == "gs://own/smaller"
    put("small/config.json", "{}")
    assert hub.pinned_model("gs://own/small") != pinned
    for ask in (hub.pinned_model, hub.model_folder):
        with pytest.raises(
            ValueError, match="gs://own/small is no longer what it was; put the old"
        ):
            ask(pinned)


def test_problems_are_pinned_to_a_generation(put):
    put("data/problems.jsonl", "old")
    pinned = hub.pinned_data("gs://own/data/problems.jsonl")
    assert pinned.partition("#")[2].isdecimal()
    file = pathlib.Path(hub.data_file("gs://own/data/problems.jsonl"))
    assert (file.name, file.read_text()) == ("problems.jsonl", "old")
    put("data/problems.jsonl", "new")
    assert hub.data_file(pinned) == str(file)  # from the cache
    file.unlink()
    hub.data_file.cache_clear()
    with pytest.raises(ValueError, match="problems.jsonl is no longer what it was; put the old"):
        hub.data_file(pinned)
    assert pathlib.Path(hub.data_file("gs://own/data/problems.jsonl")).read_text() == "new"


@pytest.mark.parametrize(
    "ask, text, error, message",
    [
        (hub.model_folder, "gs://own/none", ValueError, "gs://own/none holds no model; correct"),
        (hub.data_file, "gs://own/none.jsonl", ValueError, "gs://own/none.jsonl does not exist"),
        (hub.data_file, "gs://own/a.jsonl#x", ValueError, "a.jsonl#x names no generation"),
        (hub.model_folder, "gs://nobody/a", OSError, "gs://nobody/a does not exist, or its bucket"),
        (staging.folder, "gs://nobody/a", OSError, "gs://nobody/a does not exist, or its bucket"),
        (
            staging.folder,
            "gs://own/a#1",
            ValueError,
            "--workdir gs://own/a#1 names a folder of one",
        ),
    ],
)
def test_refusals(put, ask, text, error, message):
    with pytest.raises(error, match=message) as raised:
        ask(text)
    assert "\n" not in str(raised.value)


def test_a_folder_that_is_written_has_its_configuration_last(put, monkeypatch):
    order = []
    monkeypatch.setattr(
        buckets, "upload", lambda path, address: order.append((address.path, path.read_text()))
    )
    with buckets.local_folder("gs://own/out") as folder:
        pathlib.Path(folder).mkdir()
        for name in ("a.safetensors", "config.json", "generation_config.json"):
            pathlib.Path(folder, name).write_text(name)
    assert [path for path, _ in order][-1] == "out/config.json"
    assert sorted(order) == sorted((f"out/{name}", name) for _, name in order) and len(order) == 3


def test_a_folder_that_holds_objects_is_not_written(put):
    put("out/other", "text")
    refused = pytest.raises(ValueError, match="gs://own/out holds objects or is pinned; give a new")
    with refused, buckets.local_folder("gs://own/out"):
        pass


def test_a_folder_that_fails_is_not_written(put):
    with pytest.raises(RuntimeError), buckets.local_folder("gs://own/out") as folder:
        pathlib.Path(folder).mkdir()
        pathlib.Path(folder, "model.safetensors").write_text("half")
        raise RuntimeError
    assert names("out") == []


# Work folders


def test_a_work_folder_follows_its_files(put):
    put("run/metrics.jsonl", "one\n")
    put("run/warmup/metrics.jsonl", "warm\n")
    put("run/checkpoints/3/state/d/x", "shard")
    put("run/warmup/frozen/state/d/x", "shard")
    put("run/in_use", "somebody")
    folder = staging.folder("gs://own/run")
    here = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))
    assert here == ["metrics.jsonl", "warmup", "warmup/metrics.jsonl"]
    assert staging.root(folder / "warmup") == "gs://own/run/warmup"
    assert staging.shown(f"see {folder}/x") == "see gs://own/run/x"
    before = buckets.listing(buckets.parse("gs://own/run"))

    staging.upload(folder)
    assert buckets.listing(buckets.parse("gs://own/run")) == before  # nothing has changed
    (folder / "metrics.jsonl").write_text("one\ntwo\n")
    (folder / "tensorboard").mkdir()
    (folder / "tensorboard" / "events").write_text("events")
    (folder / ".report.html.17").write_text("half")
    (folder / "wandb").mkdir()
    (folder / "wandb" / "log").write_text("log")
    staging.upload(folder)
    assert content("run/metrics.jsonl") == "one\ntwo\n"
    assert set(names("run")) - set(before) == {"tensorboard/events"}
    (folder / "metrics.jsonl").rename(folder / "metrics.jsonl.1")
    staging.upload(folder)
    assert set(before) - set(names("run")) == {"metrics.jsonl"}
    assert content("run/metrics.jsonl.1") == "one\ntwo\n"


def test_what_another_process_has_written_is_seen_once_it_is_locked(put):
    put("run/metrics.jsonl", "one\n")
    put("run/config.json", "{}")
    run = staging.Staged(buckets.parse("gs://own/run"))
    put("run/metrics.jsonl", "one\ntwo\n")
    buckets.delete(buckets.parse("gs://own/run/config.json"))
    run.refresh()
    assert [path.name for path in run.folder.iterdir()] == ["metrics.jsonl"]
    assert (run.folder / "metrics.jsonl").read_text() == "one\ntwo\n"
    before = buckets.listing(run.address)
    run.upload()
    assert buckets.listing(run.address) == before


def test_a_file_that_is_replaced_while_it_is_read_is_read_again(put, monkeypatch):
    put("run/metrics.jsonl", "one\n")
    list_objects = buckets.listing

    def replace_after(address):
        found = list_objects(address)
        monkeypatch.setattr(buckets, "listing", list_objects)
        put("run/metrics.jsonl", "one\ntwo\n")
        return found

    monkeypatch.setattr(buckets, "listing", replace_after)
    run = staging.Staged(buckets.parse("gs://own/run"))
    assert (run.folder / "metrics.jsonl").read_text() == "one\ntwo\n"


def test_files_are_uploaded_where_the_block_raises(put):
    folder = staging.folder("gs://own/run")
    with pytest.raises(RuntimeError), staging.uploaded(folder):
        (folder / "metrics.jsonl").write_text("one\n")
        raise RuntimeError
    assert content("run/metrics.jsonl") == "one\n"


def test_the_other_processes_write_nothing(put):
    folder = staging.folder("gs://own/run")
    staging.of(folder).writes = False
    (folder / "metrics.jsonl").write_text("one\n")
    staging.upload(folder)
    assert names("run") == []


def test_a_work_folder_in_use_is_refused_until_it_is_given_up(put):
    first = staging.Staged(buckets.parse("gs://own/run"))
    second = staging.Staged(buckets.parse("gs://own/run"))
    with first.take():
        with pytest.raises(ValueError) as error:
            second.take()
        assert str(error.value).startswith(f"gs://own/run is in use by process {os.getpid()} on ")
        assert str(error.value).endswith("; wait until it ends, or choose another --workdir")
    assert content("run/in_use") is None
    second.take().close()


def test_the_lock_of_a_dead_process_is_taken_over(put):
    put("run/in_use", "process 1 on elsewhere")
    with staging.Staged(buckets.parse("gs://own/run")).take():
        assert content("run/in_use").startswith(f"process {os.getpid()} on ")


def test_a_run_that_was_taken_over_writes_nothing_more(put):
    run = staging.Staged(buckets.parse("gs://own/run"))
    with run.take() as lock:
        put("run/in_use", "process 1 on elsewhere")
        lock._thread.join(10)  # it ends when it finds the lock of another
        (run.folder / "metrics.jsonl").write_text("one\n")
        with pytest.raises(OSError, match="gs://own/run was taken over by another run while this"):
            run.upload()
    assert content("run/in_use") == "process 1 on elsewhere"
    assert names("run") == ["in_use"]


def test_a_run_that_goes_on_uploads_now_and_then(put, monkeypatch):
    monkeypatch.setattr(staging, "UPLOAD", 0.0)
    run = staging.Staged(buckets.parse("gs://own/run"))
    with run.take():
        (run.folder / "metrics.jsonl").write_text("one\n")
        for _ in range(100):
            if content("run/metrics.jsonl") == "one\n":
                break
            threading.Event().wait(0.1)
        assert content("run/metrics.jsonl") == "one\n"


# Files and pages


def test_a_file_goes_on_from_its_object_and_is_written_where_the_block_raises(put):
    put("out.jsonl", "one\n")
    with pytest.raises(ValueError) as error, buckets.local_file("gs://own/out.jsonl") as file:
        file.write_text(file.read_text() + "two\n")
        raise ValueError(f"{file} is refused")
    assert str(error.value) == "gs://own/out.jsonl is refused"
    assert content("out.jsonl") == "one\ntwo\n"
    with buckets.local_file("gs://own/new.jsonl"):
        pass  # and writes nothing
    assert content("new.jsonl") is None
    with pytest.raises(ValueError, match="gs://own/out.jsonl#1 is pinned"):
        buckets.local_file("gs://own/out.jsonl#1").__enter__()


OUT = "gs://own/out.jsonl"


def test_a_file_whose_object_was_written_meanwhile_is_kept(put):
    put("out.jsonl", "one\n")
    with pytest.raises(OSError, match="another") as error, buckets.local_file(OUT) as file:
        file.write_text("one\ntwo\n")
        put("out.jsonl", "other\n")
    assert str(error.value) == (
        f"another program has written {OUT} meanwhile; what was to be written is in {file}"
    )
    assert file.read_text() == "one\ntwo\n"
    assert content("out.jsonl") == "other\n"
    shutil.rmtree(file.parent)


@pytest.mark.parametrize("output", ["", "gs://own/pages/both.html"])
def test_a_page_of_several_runs_in_a_bucket(put, tmp_path, capsys, output):
    """The runs have the names of their folders there, and the page lies beside them."""
    for name, seed in (("a", 0), ("b", 1)):
        folder = make_run(tmp_path / name, ROWS, CONFIG | {"seed": seed})
        for file in folder.iterdir():
            put(f"runs/{name}/{file.name}", file.read_text())
    words = ["report", "gs://own/runs/a", "gs://own/runs/b"]
    assert cli.main([*words, *(["--output", output] if output else [])]) == 0
    written = output or "gs://own/runs/report.html"
    assert capsys.readouterr().out == f"{written}\n"
    page = content(written.removeprefix("gs://own/"))
    assert "dcmdp-" not in page and "<b>a</b>" in page and "gs://own/runs/b&quot;" in page
    assert cli.main([*words, "--output", "gs://own/runs/a/report.html"]) == 2
    assert "gs://own/runs/a/report.html is a run's own page" in capsys.readouterr().err


# The library, on a server that answers as told


@pytest.fixture
def answers(monkeypatch):
    """A list of the statuses that a server answers with, one after another; 200 at its end."""
    left = []
    body = b'{"items": [{"name": "small/config.json", "generation": "5"}]}'

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            status = left.pop(0) if left else 200
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(body if status == 200 else b"{}")

        def log_message(self, *values):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{running.server_port}")
        buckets._client.cache_clear()
        yield left
        buckets._client.cache_clear()
        running.shutdown()


@needs_library
def test_requests_are_repeated(answers):
    answers += [503, 429, 503]
    assert buckets.listing(buckets.parse("gs://own/small")) == {"config.json": 5}
    assert not answers


@needs_library
def test_an_account_without_rights_is_told_so(answers):
    answers += [403] * 9
    with pytest.raises(OSError, match="gs://own/small may not be used by this account .*; give it"):
        hub.pinned_model("gs://own/small")


@needs_library
def test_a_server_that_is_down_is_told_so(monkeypatch):
    from google.api_core import retry

    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:9")
    buckets._client.cache_clear()
    waits = mock.patch.object(retry.Retry, "__call__", lambda self, call, *_: call)  # once each
    with waits, pytest.raises(OSError, match="gs://own/small cannot be reached .*; try again whe"):
        hub.pinned_model("gs://own/small")
    buckets._client.cache_clear()
