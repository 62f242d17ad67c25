"""What a folder's files say about its tokenizer: stop tokens, special tokens, chat template."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

from dcmdp_jax import files

GENERATION_CONFIG = "generation_config.json"


def model_and_own(own: pathlib.Path, model_folder: str | pathlib.Path) -> list[pathlib.Path]:
    """Returns the model's folder, if there is one, and the tokenizer's."""
    return list(dict.fromkeys([*([pathlib.Path(model_folder)] if model_folder else []), own]))


def declared_ids(
    folders: Sequence[pathlib.Path], vocab_size: int
) -> tuple[dict[int, pathlib.Path], dict]:
    """Returns the stop ids that files name, and the first generation config that is not empty.

    Generation configs come first. Raises ValueError on ids that are no integers from 0 to the
    vocabulary size, and on an empty list.
    """
    configs = {folder / "config.json": read_json(folder / "config.json") for folder in folders}
    generations = {
        folder / GENERATION_CONFIG: read_json(folder / GENERATION_CONFIG) for folder in folders
    }
    sizes = [config.get("vocab_size") for config in configs.values()]
    room = max([vocab_size, *(size for size in sizes if type(size) is int)])
    stops = {}
    ids = {}
    for file, config in {**generations, **configs}.items():
        for key in ("eos_token_id", "pad_token_id", "bos_token_id"):
            if config.get(key) is None:
                continue
            values = config[key]
            if not isinstance(values, list) or key != "eos_token_id":
                values = [values]
            if not values or not all(type(i) is int and 0 <= i < room for i in values):
                raise ValueError(
                    f"{file}: {key}={config[key]!r} is no token id from 0 to {room - 1}, "
                    "or list of such; fix it, or take it out"
                )
            if key == "eos_token_id":
                stops.update(dict.fromkeys(values, file))
            else:
                ids.setdefault(key, values[0])
    generation = next((config for config in generations.values() if config), {})
    generation = {key: value for key, value in generation.items() if value is not None}
    return stops, {**generation, **ids}


def chat_template_source(folder: pathlib.Path, settings: dict) -> str | None:
    """Returns the source of a folder's chat template, or None."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is not UTF-8 text: {error}") from None
    source = settings.get("chat_template")
    if isinstance(source, list):  # several named templates
        if not all(
            isinstance(item, dict) and {"name", "template"} <= item.keys() for item in source
        ):
            raise ValueError(
                f"{folder / 'tokenizer_config.json'}: chat_template holds items without name and "
                "template"
            )
        source = next((item["template"] for item in source if item["name"] == "default"), None)
    if not isinstance(source, str | None):
        raise ValueError(
            f"{folder / 'tokenizer_config.json'}: chat_template is {files.describe(source)}, not a "
            "string"
        )
    return source


def read_json(file: pathlib.Path) -> dict:
    """Returns the object of a JSON file; an empty one if there is no file."""
    return files.read_json_object(file) if file.is_file() else {}


def token_text(folder: pathlib.Path, settings: dict, name: str) -> str:
    """Returns a special token's text; Hugging Face writes it as a string or as a record."""
    token = settings.get(name)
    token = token.get("content") if isinstance(token, dict) else token
    if not isinstance(token, str | None):
        raise ValueError(
            f"{folder / 'tokenizer_config.json'}: {name} is {files.describe(token)}, not a token's "
            "text"
        )
    return token or ""
