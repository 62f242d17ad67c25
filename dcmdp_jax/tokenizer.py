"""Text to token ids and back: Hugging Face `tokenizer.json`, SentencePiece, or single characters, behind one protocol.

Encoding adds nothing to the text (no BOS, no EOS); special tokens written out in the text become their ids.
Decoding keeps special tokens visible and drops ids that the tokenizer does not have.
"""

from __future__ import annotations

import datetime
import functools
import importlib
import json
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any, Protocol

# Qwen3's generation config stops at either; used where a folder names no stop token of its own.
QWEN3_STOPS = ("<|im_end|>", "<|endoftext|>")


FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")


class Tokenizer(Protocol):
    """What the rest of the package asks of a tokenizer."""

    vocab_size: int  # highest id + 1, added tokens included
    longest: int  # characters of text that a token holds at most; a normalizer may leave more out
    eos_ids: tuple[int, ...]  # any of them ends a completion; the first is the one written in training data
    pad_id: int

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, nothing added."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`, special tokens written out."""

    def chat(self, messages: Sequence[Mapping], *, enable_thinking: bool, add_generation_prompt: bool = True) -> str:
        """The conversation as the text that the model was trained on. Raises ValueError without a chat template."""


class HuggingFace:
    """A folder with `tokenizer.json`.

    The chat template comes from `chat_template.jinja`, else from `chat_template` in `tokenizer_config.json`; stop
    tokens from `generation_config.json`, else from `eos_token` in `tokenizer_config.json`, else Qwen3's. Templates run
    in an immutable jinja2 sandbox. Raises ValueError where the folder holds no tokenizer or names no stop token.
    """

    def __init__(self, folder: str | pathlib.Path):
        self.folder = pathlib.Path(folder)
        file = self.folder / "tokenizer.json"
        if not file.is_file():
            raise ValueError(f"{self.folder} holds no tokenizer.json")
        self._tokenizer = _import("tokenizers").Tokenizer.from_file(str(file))
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        settings = _read_json(self.folder / "tokenizer_config.json")
        self._special = {name: _content(settings.get(name)) for name in ("bos_token", "eos_token", "pad_token")}
        self.vocab_size = max(vocabulary.values()) + 1
        self.eos_ids = self._stops(vocabulary)
        self.pad_id = vocabulary.get(self._special["pad_token"], vocabulary.get("<|endoftext|>", self.eos_ids[0]))
        self._template = _chat_template(self.folder, settings)

    def encode(self, text: str) -> list[int]:
        # `encode` would hold up every other thread, for seconds where the text is long
        return self._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)

    @functools.cached_property
    def longest(self) -> int:
        return max(map(len, self._tokenizer.get_vocab(with_added_tokens=True)))

    def chat(self, messages: Sequence[Mapping], *, enable_thinking: bool, add_generation_prompt: bool = True) -> str:
        if self._template is None:
            raise ValueError(f"{self.folder} has no chat template (chat_template.jinja, or chat_template in "
                             "tokenizer_config.json); add one, or train on plain prompts with data.chat=False")
        special = {name: text for name, text in self._special.items() if text}
        return self._template.render(messages=messages, enable_thinking=enable_thinking,
                                     add_generation_prompt=add_generation_prompt, **special)

    def _stops(self, vocabulary: dict[str, int]) -> tuple[int, ...]:
        declared = _read_json(self.folder / "generation_config.json").get("eos_token_id")
        if declared is not None:
            return tuple(declared) if isinstance(declared, list) else (declared,)
        named = (self._special["eos_token"],) if self._special["eos_token"] else QWEN3_STOPS
        found = tuple(vocabulary[token] for token in named if token in vocabulary)
        if not found:
            raise ValueError(f"{self.folder} names no stop token; put eos_token_id in its generation_config.json")
        return found


class SentencePiece:
    """A SentencePiece model file. Raises ValueError where it defines no end-of-sentence id. It has no chat template."""

    def __init__(self, file: str | pathlib.Path):
        self.file = pathlib.Path(file)
        if not self.file.is_file():
            raise ValueError(f"SentencePiece model {self.file} does not exist")
        self._processor = _import("sentencepiece").SentencePieceProcessor(model_file=str(self.file))
        self.vocab_size = self._processor.vocab_size()
        if self._processor.eos_id() < 0:
            raise ValueError(f"{self.file} defines no end-of-sentence id; train it with eos_id set")
        self.eos_ids = (self._processor.eos_id(),)
        self.pad_id = max(self._processor.pad_id(), 0)

    def encode(self, text: str) -> list[int]:
        return self._processor.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        # a model's vocabulary may be larger than its tokenizer's
        return self._processor.decode([int(i) for i in ids if i < self.vocab_size])

    @functools.cached_property
    def longest(self) -> int:
        return max(len(self._processor.id_to_piece(i)) for i in range(self.vocab_size))

    def chat(self, messages: Sequence[Mapping], *, enable_thinking: bool, add_generation_prompt: bool = True) -> str:
        raise ValueError(f"{self.file} is a SentencePiece model and has no chat template; set data.chat=False")


class Characters:
    """One id per character of `alphabet`, from 2 on; 0 is padding and 1 ends a completion.

    Every other id decodes to U+FFFD, so that a verifier sees it.
    """

    longest = 1
    pad_id = 0
    eos_ids = (1,)

    def __init__(self, alphabet: str):
        if len(set(alphabet)) != len(alphabet):
            raise ValueError(f"alphabet {alphabet!r} holds a character twice")
        self.alphabet = alphabet
        self.vocab_size = len(alphabet) + 2
        self._ids = {character: i for i, character in enumerate(alphabet, start=2)}
        self._characters = dict(enumerate(alphabet, start=2))

    def encode(self, text: str) -> list[int]:
        try:
            return [self._ids[character] for character in text]
        except KeyError as missing:
            raise ValueError(f"character {missing} is not in the alphabet {self.alphabet!r}; "
                             "text of another kind needs its own --model.tokenizer") from None

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self._characters.get(int(i), "\ufffd") for i in ids)

    def chat(self, messages: Sequence[Mapping], *, enable_thinking: bool, add_generation_prompt: bool = True) -> str:
        raise ValueError("a character tokenizer has no chat template; set data.chat=False")


def load(path: str | pathlib.Path) -> Tokenizer:
    """The tokenizer of a folder (`tokenizer.json`, else `tokenizer.model`) or of a SentencePiece `.model` file.

    Raises ValueError where there is none.
    """
    path = pathlib.Path(path)
    if not path.exists():
        raise ValueError(f"tokenizer {path} does not exist")
    if path.is_file():
        return HuggingFace(path.parent) if path.name == "tokenizer.json" else SentencePiece(path)
    if (path / "tokenizer.json").is_file():
        return HuggingFace(path)
    if (path / "tokenizer.model").is_file():
        return SentencePiece(path / "tokenizer.model")
    if (path / "characters.json").is_file():
        return Characters(_read_json(path / "characters.json")["alphabet"])
    raise ValueError(f"{path} holds no tokenizer: looked for tokenizer.json (Hugging Face) and tokenizer.model "
                     "(SentencePiece); put one there or name the tokenizer's own folder")


def save(tokenizer: Tokenizer, folder: str | pathlib.Path) -> None:
    """Writes the files that `load` reads into `folder`."""
    folder = pathlib.Path(folder)
    if isinstance(tokenizer, Characters):
        (folder / "characters.json").write_text(json.dumps({"alphabet": tokenizer.alphabet}))
    elif isinstance(tokenizer, SentencePiece):
        shutil.copyfile(tokenizer.file, folder / "tokenizer.model")
    else:
        for name in FILES:
            if (tokenizer.folder / name).is_file():
                shutil.copyfile(tokenizer.folder / name, folder / name)


def check_vocabulary(tokenizer: Tokenizer, model_vocab_size: int) -> None:
    """Raises ValueError where the tokenizer can give an id that the model has no embedding for."""
    needed = max(tokenizer.vocab_size, *(i + 1 for i in tokenizer.eos_ids))
    if needed > model_vocab_size:
        raise ValueError(f"the tokenizer has {needed} ids but the model's vocab_size is {model_vocab_size}; "
                         "use the tokenizer that belongs to the model")


def _chat_template(folder: pathlib.Path, settings: dict) -> Any:
    """The compiled jinja2 template of a folder, or None."""
    file = folder / "chat_template.jinja"
    source = file.read_text(encoding="utf-8") if file.is_file() else settings.get("chat_template")
    if isinstance(source, list):  # several named templates
        source = {item["name"]: item["template"] for item in source}.get("default")
    if not source:
        return None
    jinja2, sandbox = _import("jinja2"), _import("jinja2.sandbox")

    def raise_exception(message: str) -> None:
        raise ValueError(f"the chat template of {folder} refuses the conversation: {message}")

    def to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None,
                sort_keys: bool = False) -> str:
        # jinja2's own filter escapes HTML, which a chat template must not do
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                        extensions=["jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda layout: datetime.datetime.now().strftime(layout)
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"the chat template of {folder} is not valid jinja2: {error}") from None


def _read_json(file: pathlib.Path) -> dict:
    if not file.is_file():
        return {}
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from None


def _content(token: str | dict | None) -> str:
    """A special token as text; Hugging Face writes it as a string or as a record."""
    return token["content"] if isinstance(token, dict) else token or ""


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ValueError(f"{name} is not installed; pip install 'dcmdp-jax[train]'") from None
