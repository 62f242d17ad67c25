"""Models and problems by their names on the Hugging Face Hub: `OWNER/NAME`, `OWNER/NAME@REVISION`.

What is downloaded stays in the cache of `huggingface_hub` (HF_HOME), which serves it where there is
no network. A path that exists is never taken for a name. An address of a bucket may stand wherever
a name may (`buckets`).
"""

from __future__ import annotations

import functools
import pathlib
import re
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

from dcmdp_jax import buckets, errors

_NAME = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*?)(@(?P<revision>[\w./-]+))?(:(?P<path>[^:]+))?")
_SETTINGS = ["*.json", "*.jinja", "tokenizer.model"]
_WEIGHTS = ["*.safetensors"]
_NOT_OURS = ["*/*", "consolidated*"]  # other formats of the same weights
_IN_BUCKETS = buckets.Patterns([*_SETTINGS, *_WEIGHTS], _NOT_OURS)
_DATA_SUFFIXES = (".jsonl", ".parquet")
_SHOWN = 6  # files in a message


class Name(NamedTuple):
    """A name, split into its parts."""

    repo: str
    revision: str | None
    path: str  # of problems: a file, or what its path begins with; "" if not given


def _parse(text: str) -> Name | None:
    """Returns the parts of a name, or None for a path."""
    found = _NAME.fullmatch(text)
    if found is None or pathlib.Path(text).exists():
        return None
    if found["repo"].endswith((".gguf", ".json", ".model", *_DATA_SUFFIXES)):  # a missing file
        return None
    return Name(found["repo"], found["revision"], found["path"] or "")


# Models


@functools.cache
def model_folder(text: str) -> str:
    """Returns the folder of a model: `text` itself, or the snapshot of the name that it is.

    Raises ValueError, in one sentence, if it cannot be had.
    """
    return _snapshot(text, [*_SETTINGS, *_WEIGHTS])


@functools.cache
def settings_folder(text: str) -> str:
    """As `model_folder`, of a folder that may be without its weights."""
    return _snapshot(text, _SETTINGS)


def _snapshot(text: str, wanted: list[str]) -> str:
    if address := buckets.parse(text):
        return buckets.folder(address, _IN_BUCKETS, wanted)
    name = _parse(text)
    if name is None or name.path:
        return text
    return _ask(
        text,
        "model",
        lambda hub: hub.snapshot_download(
            name.repo, revision=name.revision, allow_patterns=wanted, ignore_patterns=_NOT_OURS
        ),
    )


def pinned_model(text: str) -> str:
    """Returns a model's name with the commit that it stands for now, an address with its digest, or
    a path as it is.
    """
    if address := buckets.parse(text):
        return buckets.pinned_folder(address, _IN_BUCKETS)
    name = _parse(text)
    if name is None or name.path:
        return text
    return f"{name.repo}@{pathlib.Path(settings_folder(text)).name}"


def repository(text: str) -> tuple[str, str | None]:
    """Returns a model's name and its revision apart, as other programs take them; a path as it is,
    and None.
    """
    name = _parse(text)
    return (text, None) if name is None or name.path else (name.repo, name.revision)


def at_commit_of(recorded: str, text: str) -> str:
    """Returns a name without a revision at the commit of a recorded name of the same repository,
    an address without a pin with that of the same recorded address, and any other text as it is.
    """
    if address := buckets.parse(text):
        same = recorded.partition("#")[0] == str(address)
        return recorded if same and not address.pin else text
    name = _parse(text)
    old = _NAME.fullmatch(recorded)
    if name is None or name.revision or old is None or old["repo"] != name.repo:
        return text
    if not old["revision"]:
        return text
    return f"{name.repo}@{old['revision']}" + (f":{name.path}" if name.path else "")


def push(folder: str, text: str, private: bool) -> str:
    """Uploads a folder as the model OWNER/NAME, made if there is none; returns the commit's URL."""
    name = _NAME.fullmatch(text)
    if name is None or name["revision"] or name["path"]:
        raise ValueError(f"{text!r} is no name of a model; give OWNER/NAME")

    def upload(hub: ModuleType) -> str:
        api = hub.HfApi()
        api.create_repo(text, private=private, exist_ok=True)
        return api.upload_folder(repo_id=text, folder_path=folder).commit_url

    return _ask(text, "model", upload, _not_pushed)


# Problems


@functools.cache
def data_file(text: str) -> str:
    """Returns the file of problems: `text` itself, or that of the data set whose name it is.

    OWNER/NAME is the data set's one file of training problems; OWNER/NAME:main/test the one whose
    path begins so. Raises ValueError, in one sentence, if it cannot be had.
    """
    if address := buckets.parse(text):
        return buckets.file(address)
    name = _parse(text)
    if name is None:
        return text
    if not name.path.endswith(_DATA_SUFFIXES):
        return data_file(pinned_data(text))
    return _ask(
        text,
        "data set",
        lambda hub: hub.hf_hub_download(
            name.repo, name.path, revision=name.revision, repo_type="dataset"
        ),
    )


def pinned_data(text: str) -> str:
    """Returns a data set's name with commit and file, an address with its generation, or a path as
    it is.
    """
    if address := buckets.parse(text):
        return buckets.pinned_file(address)
    name = _parse(text)
    if name is None or (name.revision and name.path.endswith(_DATA_SUFFIXES)):
        return text
    commit, found = _ask(text, "data set", lambda hub: _files(hub, name))
    return f"{name.repo}@{commit}:{_choose(found, name)}"


def _files(hub: ModuleType, name: Name) -> tuple[str, list[str]]:
    """Returns a data set's commit and the paths of its files: those in the cache, of the commit
    that was downloaded last, if the Hub cannot be used.
    """
    try:
        info = hub.HfApi().repo_info(name.repo, revision=name.revision, repo_type="dataset")
    except (hub.errors.RepositoryNotFoundError, hub.errors.RevisionNotFoundError):
        raise
    except Exception:  # of the connection, of which the library raises many kinds
        cached = _cached(hub, name)
        if cached is None:
            raise
        return cached
    return info.sha, [entry.rfilename for entry in info.siblings or []]


def _cached(hub: ModuleType, name: Name) -> tuple[str, list[str]] | None:
    """Returns what `_files` does, of the cache alone; None if nothing of the data set is there."""
    try:
        repos = hub.scan_cache_dir().repos
    except hub.errors.CacheNotFound:
        return None
    commits = [
        commit
        for repo in repos
        if repo.repo_type == "dataset" and repo.repo_id == name.repo
        for commit in repo.revisions
        if name.revision in (None, commit.commit_hash, *commit.refs)
    ]
    if not commits:
        return None
    newest = max(commits, key=lambda commit: commit.last_modified)
    paths = [file.file_path.relative_to(newest.snapshot_path) for file in newest.files]
    return newest.commit_hash, sorted(path.as_posix() for path in paths)


def _choose(found: list[str], name: Name) -> str:
    """Returns the one file that the name means."""
    readable = [path for path in found if path.endswith(_DATA_SUFFIXES)]
    matching = [path for path in readable if path.startswith(name.path)]
    if not name.path:
        matching = [path for path in readable if "train" in path]
        main = [path for path in matching if path.startswith(("main/", "default/", "data/"))]
        matching = main or matching
    if len(matching) == 1:
        return matching[0]
    shown = ", ".join(readable[:_SHOWN]) + (", ..." if len(readable) > _SHOWN else "")
    if not readable:
        raise ValueError(
            f"the data set {name.repo} holds no .jsonl or .parquet file; convert it to one of them"
        )
    how_many = "no file" if not matching else f"{len(matching)} files"
    raise ValueError(
        f"{name.repo}{f':{name.path}' if name.path else ''} means {how_many} of the data set; name "
        f"one as {name.repo}:PATH, of {shown}"
    )


# The library


def _first(error: BaseException) -> BaseException:
    """Returns the error that the others of a chain follow from."""
    while cause := error.__cause__:
        error = cause
    return error


def _unreachable(error: Exception) -> str:
    return (
        "is neither a path here nor in the cache, and the Hub cannot be used "
        f"({type(_first(error)).__name__}); give a path, or download it where there is a network"
    )


def _not_pushed(error: Exception) -> str:
    return (
        f"cannot be pushed ({errors.type_and_message(error)}); log in with `hf auth login`, with a "
        "token that may write there, where there is a network"
    )


def _ask(
    text: str,
    kind: str,
    request: Callable[[ModuleType], Any],
    failed: Callable[[Exception], str] = _unreachable,
) -> Any:
    """Returns what the library answers. Raises ValueError, with the remedy, if it does not.

    `failed` describes an error that is not of the name.
    """
    try:
        import huggingface_hub
        from huggingface_hub import errors as hub_errors
    except ImportError:
        raise ValueError(
            "huggingface_hub is not installed; pip install 'dcmdp-jax[train]'"
        ) from None
    try:
        return request(huggingface_hub)
    except hub_errors.GatedRepoError:
        what = "is gated; accept its terms on its page, and log in with `hf auth login`"
    except hub_errors.RepositoryNotFoundError:
        what = (
            f"is neither a path here nor a {kind} of the Hub that you may see; correct it, or log "
            "in with `hf auth login`"
        )
    except hub_errors.RevisionNotFoundError:
        what = "has no such revision; correct what follows the @"
    except hub_errors.EntryNotFoundError as error:
        if not isinstance(error, hub_errors.LocalEntryNotFoundError):
            raise ValueError(f"{text} has no such file; correct what follows the :") from None
        what = failed(error)
    except Exception as error:  # of the connection, of which the library raises many kinds
        what = failed(error)
    raise ValueError(f"{text} {what}")
