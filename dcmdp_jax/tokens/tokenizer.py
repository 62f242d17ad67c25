"""Text to token ids and back: Hugging Face `tokenizer.json`, SentencePiece, or single characters,
behind one protocol.

Encoding adds nothing to a text (no BOS, no EOS; a plain prompt may get its BOS), and special tokens
written in it become their ids.
Chat messages are untrusted data: a special token written in a message is text, and only what the
chat template writes becomes an id. Decoding keeps special tokens visible and drops ids that the
tokenizer does not have.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import json
import pathlib
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from types import ModuleType
from typing import Any, NoReturn, Protocol

from dcmdp_jax import files
from dcmdp_jax.tokens import folder_files
from dcmdp_jax.tokens.chat_template import ChatTemplate

# the stop tokens of Qwen3's generation config, used if no file names one
_QWEN3_STOPS = ("<|im_end|>", "<|endoftext|>")
_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
_REPLY = "sixty-six"  # in the conversation that shows how a template ends a message


class Tokenizer(Protocol):
    """What the rest of the package needs of a tokenizer."""

    vocab_size: int  # largest id + 1, added tokens included
    # most characters that a token stands for, not counting those that a normalizer drops
    max_token_chars: int
    # any of them ends a completion; the first one ends supervised completions
    eos_ids: tuple[int, ...]
    pad_id: int
    generation_config: dict  # of the model's generation_config.json

    def encode(self, text: str) -> list[int]:
        """Returns the ids of `text`, nothing added."""

    def encode_prompt(self, text: str) -> list[int]:
        """Returns the ids of a text that begins a sequence: `encode`, after the BOS token if the
        tokenizer's files ask for it and the text does not begin with it.
        """

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of `ids`, special tokens written out."""

    def render_chat(
        self,
        messages: Sequence[Mapping],
        *,
        enable_thinking: bool,
        add_generation_prompt: bool = True,
    ) -> str:
        """Returns a conversation as the text that the model was trained on.

        Raises ValueError if there is no chat template.
        """

    def encode_chat(
        self,
        messages: Sequence[Mapping],
        *,
        enable_thinking: bool,
        add_generation_prompt: bool = True,
        special_tokens_in_text: bool = False,
    ) -> list[int]:
        """Returns the ids of `render_chat`'s text.

        Special tokens in a message are text, or ids with `special_tokens_in_text`.
        """

    def encode_reply(
        self,
        messages: Sequence[Mapping],
        *,
        enable_thinking: bool,
        special_tokens_in_text: bool = False,
    ) -> tuple[list[int], list[int]]:
        """Returns the ids of the prompt that the last message replies to, and those of the reply.

        The prompt ends with the generation prompt, as that of a rollout does. The reply is the rest
        of the conversation's text: the message, and what the template writes after it.
        """


class HuggingFaceTokenizer:
    """The tokenizer of a folder with `tokenizer.json`; `model_folder` is its model's.

    The chat template comes from `chat_template.jinja`, else from `chat_template` in
    `tokenizer_config.json`. A completion stops at every token that any file names: `eos_token_id`
    in the `generation_config.json` and `config.json` of either folder, `eos_token` in
    `tokenizer_config.json`, and the special token with which the chat template ends an assistant's
    message; Qwen3's stop tokens if no file names one. Raises ValueError if the folder holds no
    tokenizer, names no stop token, or names one that does not exist.
    """

    def __init__(self, folder: str | pathlib.Path, model_folder: str | pathlib.Path = ""):
        self.folder = pathlib.Path(folder)
        file = self.folder / "tokenizer.json"
        if not file.is_file():
            raise ValueError(f"{self.folder} holds no tokenizer.json")
        self._tokenizer = _from_file(import_library("tokenizers").Tokenizer.from_file, file)
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        if not self._vocabulary:
            raise ValueError(f"{file} holds no tokens; copy or download it again")
        self.vocab_size = max(self._vocabulary.values()) + 1
        settings = folder_files.read_json(self.folder / "tokenizer_config.json")
        names = ("bos_token", "eos_token", "pad_token", "unk_token")
        self._special = {
            name: folder_files.token_text(self.folder, settings, name) for name in names
        }
        source = folder_files.chat_template_source(self.folder, settings)
        self._template = ChatTemplate(source, self.folder) if source else None
        self._bos = self._first_ids(settings.get("add_bos_token"))
        added = self._tokenizer.get_added_tokens_decoder().values()
        special = [token.content for token in added if token.special]
        marks = [token.content for token in added if _is_mark(token.content)]
        self._special_tokens = re.compile(_any_of(special))
        self._all_marks = re.compile(_any_of({*special, *marks}))
        named, self.generation_config = folder_files.declared_ids(
            folder_files.model_and_own(self.folder, model_folder), self.vocab_size
        )
        self.eos_ids = self._stops(named)
        pad = self._vocabulary.get("<|endoftext|>", self.eos_ids[0])
        self.pad_id = self._vocabulary.get(
            self._special["pad_token"], self.generation_config.get("pad_token_id", pad)
        )

    def encode(self, text: str) -> list[int]:
        """Returns the ids of `text`, nothing added."""
        # `encode` would keep the interpreter's lock, for seconds if the text is long
        return self._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids

    def encode_prompt(self, text: str) -> list[int]:
        """Returns the ids of a text that begins a sequence; see `Tokenizer.encode_prompt`."""
        return _after_bos(self._bos, self.encode(text))

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of `ids`, special tokens written out."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)

    @functools.cached_property
    def max_token_chars(self) -> int:
        """The most characters that a token stands for."""
        return max(map(len, self._tokenizer.get_vocab(with_added_tokens=True)))

    def render_chat(
        self,
        messages: Sequence[Mapping],
        *,
        enable_thinking: bool,
        add_generation_prompt: bool = True,
    ) -> str:
        """Returns a conversation as text. Raises ValueError if there is no chat template."""
        if self._template is None:
            raise ValueError(
                f"{self.folder} has no chat template (chat_template.jinja, or chat_template in "
                "tokenizer_config.json); add one, or train on plain prompts with data.chat=False"
            )
        special = {name: text for name, text in self._special.items() if text}
        return self._template.render(
            messages,
            enable_thinking=enable_thinking,
            add_generation_prompt=add_generation_prompt,
            **special,
        )

    def encode_chat(
        self,
        messages: Sequence[Mapping],
        *,
        enable_thinking: bool,
        add_generation_prompt: bool = True,
        special_tokens_in_text: bool = False,
    ) -> list[int]:
        """Returns the ids of `render_chat`'s text; see `Tokenizer.encode_chat`."""
        cut = _unused_character(messages)
        if not special_tokens_in_text:
            messages = [self._cut_up(message, cut) for message in messages]
        text = self.render_chat(
            messages, enable_thinking=enable_thinking, add_generation_prompt=add_generation_prompt
        )
        return self._encode_cut_up(text, cut)

    def encode_reply(
        self,
        messages: Sequence[Mapping],
        *,
        enable_thinking: bool,
        special_tokens_in_text: bool = False,
    ) -> tuple[list[int], list[int]]:
        """Returns the ids of a prompt and of the reply to it; see `Tokenizer.encode_reply`.

        Raises ValueError if the template writes the reply otherwise than after the prompt.
        """
        cut = _unused_character(messages)
        if not special_tokens_in_text:
            messages = [self._cut_up(message, cut) for message in messages]
        prompt = self.render_chat(messages[:-1], enable_thinking=enable_thinking)
        text = self.render_chat(
            messages, enable_thinking=enable_thinking, add_generation_prompt=False
        )
        if not text.startswith(prompt):
            raise ValueError(
                f"the chat template of {self.folder} does not write the reply after the prompt "
                f"that asks for one, which ends in {prompt[-30:]!r}; set "
                f"data.enable_thinking={not enable_thinking}, or fix the template or the reply"
            )
        asked = self._encode_cut_up(prompt, cut)
        whole = self._encode_cut_up(text, cut)
        if whole[: len(asked)] == asked:
            return asked, whole[len(asked) :]
        # a token would stand across the end of the prompt, which a rollout's cannot
        return asked, self._encode_cut_up(text[len(prompt) :], cut)

    def _cut_up(self, message: Mapping, cut: str) -> dict:
        """Returns `message` with the character `cut` after each character of a special token in it.

        Whatever the template does with the text, no part of it is a special token then. Tokens such
        as <think> belong to the assistant, and templates look for them in its messages: they stay
        unchanged there.
        """
        own = message.get("role") == "assistant"
        pattern = self._special_tokens if own else self._all_marks

        def mark(value: Any) -> Any:
            if isinstance(value, str):
                return pattern.sub(lambda match: "".join(c + cut for c in match[0]), value)
            if isinstance(value, Mapping):
                return {mark(key): mark(item) for key, item in value.items()}
            return [mark(item) for item in value] if isinstance(value, (list, tuple)) else value

        return mark(message)

    def _encode_cut_up(self, text: str, cut: str) -> list[int]:
        """Returns the ids of a rendered conversation; parts with `cut` in them are text."""
        if cut not in text:
            return self.encode(text)
        ids = []
        pending = ""  # text without cuts that is still to be encoded
        start = 0
        for match in re.finditer(rf"{self._all_marks.pattern}|\Z", text):
            part = text[start : match.start()]
            start = match.end()
            if cut in part:
                ids += self.encode(pending) + self._encode_text(part.replace(cut, ""))
                pending = match[0]
            else:
                pending += part + match[0]
        return ids + self.encode(pending)

    def _encode_text(self, text: str) -> list[int]:
        """Returns the ids of `text` as if the tokenizer had no added tokens.

        Raises ValueError if the model itself produces a special token.
        """
        if self._tokenizer.normalizer is not None:
            text = self._tokenizer.normalizer.normalize_str(text)
        words = [text]
        if self._tokenizer.pre_tokenizer is not None:
            words = [word for word, _ in self._tokenizer.pre_tokenizer.pre_tokenize_str(text)]
        ids = [token.id for word in words for token in self._tokenizer.model.tokenize(word)]
        produced = set(ids)
        for number, token in self._tokenizer.get_added_tokens_decoder().items():
            if token.special and number in produced:
                raise ValueError(
                    f"{self.folder / 'tokenizer.json'} makes the special token {token.content} of "
                    "plain text, so that a message cannot hold it; set "
                    "data.special_tokens_in_text=True, or leave the problem out"
                )
        return ids

    def _first_ids(self, add_bos: Any) -> list[int]:
        """Returns the ids before a text: the BOS token or nothing if `add_bos_token` says so, else
        what tokenizer.json itself adds.
        """
        if isinstance(add_bos, bool):
            bos = self._vocabulary.get(self._special["bos_token"])
            return [bos] if add_bos and bos is not None else []
        encoding = self._tokenizer.encode("a", add_special_tokens=True)
        own = itertools.takewhile(bool, encoding.special_tokens_mask)  # up to the text
        return encoding.ids[: len(list(own))]

    def _stops(self, named: Mapping[int, pathlib.Path]) -> tuple[int, ...]:
        """Returns the stop ids, those named by files first. Raises ValueError if there are none."""
        eos = self._special["eos_token"]
        if eos and eos not in self._vocabulary:
            raise ValueError(
                f"{self.folder / 'tokenizer_config.json'}: eos_token {eos!r} is not in "
                "tokenizer.json"
            )
        stops = [*named, *([self._vocabulary[eos]] if eos else [])]
        if not stops:
            stops = [self._vocabulary[token] for token in _QWEN3_STOPS if token in self._vocabulary]
        stops = tuple(dict.fromkeys([*stops, *self._message_end()]))
        if not stops:
            raise ValueError(
                f"{self.folder} names no stop token; put eos_token_id in its "
                f"{folder_files.GENERATION_CONFIG}"
            )
        return stops

    def _message_end(self) -> list[int]:
        """Returns the token that the chat template writes after an assistant's message, if any."""
        if self._template is None:
            return []
        messages = [
            {"role": "user", "content": "6 * 11?"},
            {"role": "assistant", "content": _REPLY},
        ]
        try:
            text = self.render_chat(messages, enable_thinking=False, add_generation_prompt=False)
        except ValueError:  # a broken template is refused when it is used
            return []
        end = re.search(rf"{_REPLY}\s*({self._special_tokens.pattern})", text)
        return [self._vocabulary[end[1]]] if end else []


class SentencePieceTokenizer:
    """The tokenizer of a SentencePiece model file. It has no chat template.

    A completion stops at its end-of-sentence id, and at the ids that the files next to it or in the
    model's folder name. Raises ValueError if there are none.
    """

    def __init__(self, file: str | pathlib.Path, model_folder: str | pathlib.Path = ""):
        self.file = pathlib.Path(file)
        if not self.file.is_file():
            raise ValueError(f"SentencePiece model {self.file} does not exist")
        read = import_library("sentencepiece").SentencePieceProcessor
        self._processor = _from_file(lambda name: read(model_file=name), self.file)
        self.vocab_size = self._processor.vocab_size()
        named, self.generation_config = folder_files.declared_ids(
            folder_files.model_and_own(self.file.parent, model_folder), self.vocab_size
        )
        own = [self._processor.eos_id()] if self._processor.eos_id() >= 0 else []
        self.eos_ids = tuple(dict.fromkeys([*named, *own]))
        if not self.eos_ids:
            raise ValueError(f"{self.file} defines no end-of-sentence id; train it with eos_id set")
        self.pad_id = max(self._processor.pad_id(), 0)
        settings = folder_files.read_json(self.file.parent / "tokenizer_config.json")
        adds_bos = settings.get("add_bos_token") is True and self._processor.bos_id() >= 0
        self._bos = [self._processor.bos_id()] if adds_bos else []

    def encode(self, text: str) -> list[int]:
        """Returns the ids of `text`, nothing added."""
        return self._processor.encode(text)

    def encode_prompt(self, text: str) -> list[int]:
        """Returns the ids of a text that begins a sequence; see `Tokenizer.encode_prompt`.

        The file asks for a BOS token if `add_bos_token` in a tokenizer_config.json beside it does.
        """
        return _after_bos(self._bos, self.encode(text))

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of `ids`, special tokens written out."""
        # the model may have more ids than the tokenizer
        return self._processor.decode([int(i) for i in ids if i < self.vocab_size])

    @functools.cached_property
    def max_token_chars(self) -> int:
        """The most characters that a token stands for."""
        return max(len(self._processor.id_to_piece(i)) for i in range(self.vocab_size))

    def render_chat(self, messages: Sequence[Mapping], **settings: bool) -> NoReturn:
        """Raises ValueError: there is no chat template."""
        raise ValueError(
            f"{self.file} is a SentencePiece model and has no chat template; set data.chat=False"
        )

    encode_chat = encode_reply = render_chat


class CharacterTokenizer:
    """One id for each character of `alphabet`, from 2 on; 0 is padding and 1 ends a completion.

    Every other id decodes to U+FFFD, so that a verifier sees it.
    """

    max_token_chars = 1
    pad_id = 0
    eos_ids = (1,)
    generation_config: dict = {}

    def __init__(self, alphabet: str):
        if len(set(alphabet)) != len(alphabet):
            raise ValueError(f"alphabet {alphabet!r} holds a character twice")
        self.alphabet = alphabet
        self.vocab_size = len(alphabet) + 2
        self._ids = {character: i for i, character in enumerate(alphabet, start=2)}
        self._characters = dict(enumerate(alphabet, start=2))

    def encode(self, text: str) -> list[int]:
        """Returns the ids of `text`. Raises ValueError on a character outside the alphabet."""
        try:
            return [self._ids[character] for character in text]
        except KeyError as missing:
            raise ValueError(
                f"character {missing} is not in the alphabet {self.alphabet!r}; "
                "text of another kind needs its own --model.tokenizer"
            ) from None

    def encode_prompt(self, text: str) -> list[int]:
        """Returns the ids of `text`: there is no BOS token."""
        return self.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of `ids`; an id without a character becomes U+FFFD."""
        return "".join(self._characters.get(int(i), "\ufffd") for i in ids)

    def render_chat(self, messages: Sequence[Mapping], **settings: bool) -> NoReturn:
        """Raises ValueError: there is no chat template."""
        raise ValueError("a character tokenizer has no chat template; set data.chat=False")

    encode_chat = encode_reply = render_chat


def is_there(path: pathlib.Path) -> bool:
    """True if a folder holds a file that `load` reads, or the path is one."""
    names = ("tokenizer.json", "tokenizer.model", "characters.json")
    return path.is_file() or any((path / name).is_file() for name in names)


def load(path: str | pathlib.Path, model_folder: str | pathlib.Path = "") -> Tokenizer:
    """Returns the tokenizer of a folder or of a SentencePiece `.model` file.

    A folder holds `tokenizer.json`, or else `tokenizer.model` or `characters.json`. `model_folder`
    is the folder of the model that the tokenizer serves, whose own stop tokens then count too.
    Raises ValueError if there is no tokenizer, or it cannot be read.
    """
    path = pathlib.Path(path)
    if not path.exists():
        raise ValueError(f"tokenizer {path} does not exist")
    if path.is_file():
        if path.name == "tokenizer.json":
            return HuggingFaceTokenizer(path.parent, model_folder)
        return SentencePieceTokenizer(path, model_folder)
    if (path / "tokenizer.json").is_file():
        return HuggingFaceTokenizer(path, model_folder)
    if (path / "tokenizer.model").is_file():
        return SentencePieceTokenizer(path / "tokenizer.model", model_folder)
    if (path / "characters.json").is_file():
        alphabet = folder_files.read_json(path / "characters.json").get("alphabet")
        if not isinstance(alphabet, str):
            raise ValueError(f"{path / 'characters.json'} holds no alphabet; copy it again")
        return CharacterTokenizer(alphabet)
    raise ValueError(
        f"{path} holds no tokenizer: looked for tokenizer.json (Hugging Face) and tokenizer.model "
        "(SentencePiece); put one there or name the tokenizer's own folder"
    )


def save(tokenizer: Tokenizer, folder: str | pathlib.Path) -> None:
    """Writes the files that `load` reads into `folder`.

    generation_config.json is the model's own, with all ids that `tokenizer` stops at.
    """
    folder = pathlib.Path(folder)
    if isinstance(tokenizer, CharacterTokenizer):
        files.write_json(folder / "characters.json", {"alphabet": tokenizer.alphabet})
    elif isinstance(tokenizer, SentencePieceTokenizer):
        shutil.copyfile(tokenizer.file, folder / "tokenizer.model")
        settings = tokenizer.file.with_name("tokenizer_config.json")
        if settings.is_file():
            shutil.copyfile(settings, folder / settings.name)
    else:
        for name in _FILES:
            if (tokenizer.folder / name).is_file():
                shutil.copyfile(tokenizer.folder / name, folder / name)
    generation_config = {**tokenizer.generation_config, **special_token_ids(tokenizer)}
    files.write_json(folder / folder_files.GENERATION_CONFIG, generation_config)


def special_token_ids(tokenizer: Tokenizer) -> dict[str, Any]:
    """Returns `eos_token_id`, `pad_token_id` and `bos_token_id` as Hugging Face's configs name
    them.
    """
    eos = list(tokenizer.eos_ids)
    named = {"eos_token_id": eos if len(eos) > 1 else eos[0], "pad_token_id": tokenizer.pad_id}
    bos = tokenizer.generation_config.get("bos_token_id")
    return named if bos is None else {**named, "bos_token_id": bos}


def check_vocab_size(tokenizer: Tokenizer, model_vocab_size: int) -> None:
    """Raises ValueError if the tokenizer has ids for which the model has no embedding."""
    needed = max(tokenizer.vocab_size, *(i + 1 for i in tokenizer.eos_ids))
    if needed > model_vocab_size:
        raise ValueError(
            f"the tokenizer has {needed} ids but the model's vocab_size is {model_vocab_size}; "
            "use the tokenizer that belongs to the model"
        )


# Special tokens


def _after_bos(bos: list[int], ids: list[int]) -> list[int]:
    return ids if ids[: len(bos)] == bos else bos + ids


def _is_mark(token: str) -> bool:
    """Returns True if an added token is written like <think>; others may be ordinary words."""
    return token.startswith("<") and token.endswith(">")


def _any_of(tokens: Iterable[str]) -> str:
    """Returns a pattern for any of `tokens`, the longest first; it matches nothing if there is
    none.
    """
    return "|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)"


def _unused_character(messages: Sequence[Mapping]) -> str:
    """Returns a private-use character that no message contains."""
    text = json.dumps([*messages], ensure_ascii=False)
    return next(chr(code) for code in range(0xF0000, 0xFFFFE) if chr(code) not in text)


# Libraries


def _from_file(read: Any, file: pathlib.Path) -> Any:
    """Returns a tokenizer library's reading of a file. Raises ValueError if it cannot read it."""
    try:
        return read(str(file))
    except Exception as error:  # the libraries raise Exception itself, and RuntimeError
        message = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{file} is no tokenizer that can be read ({message}); copy or download it again"
        ) from None


def import_library(name: str) -> ModuleType:
    """Returns a tokenizer library. Raises ValueError, with the remedy, if it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ValueError(f"{name} is not installed; pip install 'dcmdp-jax[train]'") from None
