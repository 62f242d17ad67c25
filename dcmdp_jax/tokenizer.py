"""Text to token ids and back: Hugging Face `tokenizer.json`, SentencePiece, or single characters,
behind one protocol.

Encoding adds nothing to a text (no BOS, no EOS), and special tokens written out in it become their
ids. Conversations are data that nobody vouches for: a special token written in a message is text,
and only what the chat template writes becomes an id. Decoding keeps special tokens visible and
drops ids that the tokenizer does not have.
"""

from __future__ import annotations

import functools
import importlib
import json
import pathlib
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from types import ModuleType
from typing import Any, NoReturn, Protocol

from dcmdp_jax import files
from dcmdp_jax.chat_template import ChatTemplate

# Qwen3's generation config stops at either; used where no file names a stop token.
QWEN3_STOPS = ("<|im_end|>", "<|endoftext|>")
GENERATION = "generation_config.json"
FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
ANSWER = "sixty-six"  # of the conversation that shows how a template ends a turn


class Tokenizer(Protocol):
    """What the rest of the package asks of a tokenizer."""

    vocab_size: int  # highest id + 1, added tokens included
    max_token_chars: (
        int  # characters of text that a token holds at most; a normalizer may leave more out
    )
    # any of them ends a completion; the first is the one written in training data
    eos_ids: tuple[int, ...]
    pad_id: int
    generation_config: dict  # what the model's generation_config.json says

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, nothing added."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`, special tokens written out."""

    def render_chat(
        self,
        messages: Sequence[Mapping],
        *,
        enable_thinking: bool,
        add_generation_prompt: bool = True,
    ) -> str:
        """The conversation as the text that the model was trained on. Raises ValueError without a
        chat template.
        """

    def encode_chat(
        self,
        messages: Sequence[Mapping],
        *,
        enable_thinking: bool,
        add_generation_prompt: bool = True,
        special_tokens_in_text: bool = False,
    ) -> list[int]:
        """Ids of `render_chat`'s text; special tokens in a message are text, or ids if asked for."""


class HuggingFaceTokenizer:
    """A folder with `tokenizer.json`, and that of the model that it serves, where it is another.

    The chat template comes from `chat_template.jinja`, else from `chat_template` in
    `tokenizer_config.json`. A completion stops at whatever any file names: `eos_token_id` in the
    `generation_config.json` and `config.json` of either folder, `eos_token` in
    `tokenizer_config.json`, and the special token with which the chat template ends an assistant's
    turn; Qwen3's where no file names one. Raises ValueError where the folder holds no tokenizer,
    names no stop token, or names one that is none.
    """

    def __init__(self, folder: str | pathlib.Path, model: str | pathlib.Path = ""):
        self.folder = pathlib.Path(folder)
        file = self.folder / "tokenizer.json"
        if not file.is_file():
            raise ValueError(f"{self.folder} holds no tokenizer.json")
        self._tokenizer = _from_file(_import("tokenizers").Tokenizer.from_file, file)
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        if not self._vocabulary:
            raise ValueError(f"{file} holds no tokens; copy or download it again")
        self.vocab_size = max(self._vocabulary.values()) + 1
        settings = _read_json(self.folder / "tokenizer_config.json")
        names = ("bos_token", "eos_token", "pad_token", "unk_token")
        self._special = {name: _content(self.folder, settings, name) for name in names}
        source = _chat_template(self.folder, settings)
        self._template = ChatTemplate(source, self.folder) if source else None
        added = self._tokenizer.get_added_tokens_decoder().values()
        special = [token.content for token in added if token.special]
        marks = [token.content for token in added if _is_mark(token.content)]
        self._special_tokens = re.compile(_any_of(special))
        self._all_marks = re.compile(_any_of({*special, *marks}))
        named, self.generation_config = _declared(_folders(self.folder, model), self.vocab_size)
        self.eos_ids = self._stops(named)
        pad = self._vocabulary.get("<|endoftext|>", self.eos_ids[0])
        self.pad_id = self._vocabulary.get(
            self._special["pad_token"], self.generation_config.get("pad_token_id", pad)
        )

    def encode(self, text: str) -> list[int]:
        # `encode` would hold up every other thread, for seconds where the text is long
        return self._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)

    @functools.cached_property
    def max_token_chars(self) -> int:
        return max(map(len, self._tokenizer.get_vocab(with_added_tokens=True)))

    def render_chat(
        self,
        messages: Sequence[Mapping],
        *,
        enable_thinking: bool,
        add_generation_prompt: bool = True,
    ) -> str:
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
        cut = _unused_character(messages)
        if not special_tokens_in_text:
            messages = [self._cut_up(message, cut) for message in messages]
        text = self.render_chat(
            messages, enable_thinking=enable_thinking, add_generation_prompt=add_generation_prompt
        )
        return self._encode_cut_up(text, cut)

    def _cut_up(self, message: Mapping, cut: str) -> dict:
        """`message` with the character `cut` after each character of a special token in it.

        Whatever the template does with the text, no part of it is a special token then. Tokens such
        as <think> are the assistant's own, and templates look for them in what it said: there they
        stay whole.
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
        """Ids of a rendered conversation; what is cut up is text, up to the next token."""
        if cut not in text:
            return self.encode(text)
        ids = []
        whole = ""  # to be encoded as it stands
        at = 0
        for match in re.finditer(rf"{self._all_marks.pattern}|\Z", text):
            part = text[at : match.start()]
            at = match.end()
            if cut in part:
                ids += self.encode(whole) + self._encode_text(part.replace(cut, ""))
                whole = match[0]
            else:
                whole += part + match[0]
        return ids + self.encode(whole)

    def _encode_text(self, text: str) -> list[int]:
        """Ids of `text` by the model alone, as if no token had been added.

        Raises ValueError where it has them itself.
        """
        if self._tokenizer.normalizer is not None:
            text = self._tokenizer.normalizer.normalize_str(text)
        words = [text]
        if self._tokenizer.pre_tokenizer is not None:
            words = [word for word, _ in self._tokenizer.pre_tokenizer.pre_tokenize_str(text)]
        ids = [token.id for word in words for token in self._tokenizer.model.tokenize(word)]
        made = set(ids)
        for number, token in self._tokenizer.get_added_tokens_decoder().items():
            if token.special and number in made:
                raise ValueError(
                    f"{self.folder / 'tokenizer.json'} makes the special token {token.content} of "
                    "plain text, so that a message cannot hold it; set "
                    "data.special_tokens_in_text=True, or leave the problem out"
                )
        return ids

    def _stops(self, named: Mapping[int, pathlib.Path]) -> tuple[int, ...]:
        eos = self._special["eos_token"]
        if eos and eos not in self._vocabulary:
            raise ValueError(
                f"{self.folder / 'tokenizer_config.json'}: eos_token {eos!r} is not in "
                "tokenizer.json"
            )
        found = [*named, *([self._vocabulary[eos]] if eos else [])]
        found = found or [
            self._vocabulary[token] for token in QWEN3_STOPS if token in self._vocabulary
        ]
        found = tuple(dict.fromkeys([*found, *self._turn_end()]))
        if not found:
            raise ValueError(
                f"{self.folder} names no stop token; put eos_token_id in its {GENERATION}"
            )
        return found

    def _turn_end(self) -> list[int]:
        """The special token that the chat template writes after what the assistant said, if any."""
        if self._template is None:
            return []
        turns = [
            {"role": "user", "content": "6 * 11?"},
            {"role": "assistant", "content": ANSWER},
        ]
        try:
            text = self.render_chat(turns, enable_thinking=False, add_generation_prompt=False)
        except ValueError:  # a template that is wrong is refused where it is used
            return []
        found = re.search(rf"{ANSWER}\s*({self._special_tokens.pattern})", text)
        return [self._vocabulary[found[1]]] if found else []


class SentencePieceTokenizer:
    """A SentencePiece model file. It has no chat template.

    A completion stops at its end-of-sentence id and at what the files beside it, or of the model's
    folder, name. Raises ValueError where there is none.
    """

    def __init__(self, file: str | pathlib.Path, model: str | pathlib.Path = ""):
        self.file = pathlib.Path(file)
        if not self.file.is_file():
            raise ValueError(f"SentencePiece model {self.file} does not exist")
        read = _import("sentencepiece").SentencePieceProcessor
        self._processor = _from_file(lambda name: read(model_file=name), self.file)
        self.vocab_size = self._processor.vocab_size()
        named, self.generation_config = _declared(
            _folders(self.file.parent, model), self.vocab_size
        )
        own = [self._processor.eos_id()] if self._processor.eos_id() >= 0 else []
        self.eos_ids = tuple(dict.fromkeys([*named, *own]))
        if not self.eos_ids:
            raise ValueError(f"{self.file} defines no end-of-sentence id; train it with eos_id set")
        self.pad_id = max(self._processor.pad_id(), 0)

    def encode(self, text: str) -> list[int]:
        return self._processor.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        # a model's vocabulary may be larger than its tokenizer's
        return self._processor.decode([int(i) for i in ids if i < self.vocab_size])

    @functools.cached_property
    def max_token_chars(self) -> int:
        return max(len(self._processor.id_to_piece(i)) for i in range(self.vocab_size))

    def render_chat(self, messages: Sequence[Mapping], **settings: bool) -> NoReturn:
        raise ValueError(
            f"{self.file} is a SentencePiece model and has no chat template; set data.chat=False"
        )

    encode_chat = render_chat


class CharacterTokenizer:
    """One id per character of `alphabet`, from 2 on; 0 is padding and 1 ends a completion.

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
        try:
            return [self._ids[character] for character in text]
        except KeyError as missing:
            raise ValueError(
                f"character {missing} is not in the alphabet {self.alphabet!r}; "
                "text of another kind needs its own --model.tokenizer"
            ) from None

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self._characters.get(int(i), "\ufffd") for i in ids)

    def render_chat(self, messages: Sequence[Mapping], **settings: bool) -> NoReturn:
        raise ValueError("a character tokenizer has no chat template; set data.chat=False")

    encode_chat = render_chat


def load(path: str | pathlib.Path, model: str | pathlib.Path = "") -> Tokenizer:
    """The tokenizer of a folder (`tokenizer.json`, else `tokenizer.model`) or of a SentencePiece
    `.model` file.

    `model` is the folder of the model that it serves, whose own stop tokens then count too. Raises
    ValueError where there is no tokenizer, or one that cannot be read.
    """
    path = pathlib.Path(path)
    if not path.exists():
        raise ValueError(f"tokenizer {path} does not exist")
    if path.is_file():
        if path.name == "tokenizer.json":
            return HuggingFaceTokenizer(path.parent, model)
        return SentencePieceTokenizer(path, model)
    if (path / "tokenizer.json").is_file():
        return HuggingFaceTokenizer(path, model)
    if (path / "tokenizer.model").is_file():
        return SentencePieceTokenizer(path / "tokenizer.model", model)
    if (path / "characters.json").is_file():
        alphabet = _read_json(path / "characters.json").get("alphabet")
        if not isinstance(alphabet, str):
            raise ValueError(f"{path / 'characters.json'} holds no alphabet; copy it again")
        return CharacterTokenizer(alphabet)
    raise ValueError(
        f"{path} holds no tokenizer: looked for tokenizer.json (Hugging Face) and tokenizer.model "
        "(SentencePiece); put one there or name the tokenizer's own folder"
    )


def save(tokenizer: Tokenizer, folder: str | pathlib.Path) -> None:
    """Writes the files that `load` reads into `folder`.

    Its generation_config.json is the model's own, with all the ids that `tokenizer` stops at.
    """
    folder = pathlib.Path(folder)
    if isinstance(tokenizer, CharacterTokenizer):
        (folder / "characters.json").write_text(json.dumps({"alphabet": tokenizer.alphabet}))
    elif isinstance(tokenizer, SentencePieceTokenizer):
        shutil.copyfile(tokenizer.file, folder / "tokenizer.model")
    else:
        for name in FILES:
            if (tokenizer.folder / name).is_file():
                shutil.copyfile(tokenizer.folder / name, folder / name)
    generation_config = {**tokenizer.generation_config, **special_token_ids(tokenizer)}
    (folder / GENERATION).write_text(json.dumps(generation_config, indent=2) + "\n")


def special_token_ids(tokenizer: Tokenizer) -> dict[str, Any]:
    """`eos_token_id` and its like, as config.json and generation_config.json name them."""
    eos = list(tokenizer.eos_ids)
    named = {"eos_token_id": eos if len(eos) > 1 else eos[0], "pad_token_id": tokenizer.pad_id}
    bos = tokenizer.generation_config.get("bos_token_id")
    return named if bos is None else {**named, "bos_token_id": bos}


def check_vocab_size(tokenizer: Tokenizer, model_vocab_size: int) -> None:
    """Raises ValueError where the tokenizer can give an id that the model has no embedding for."""
    needed = max(tokenizer.vocab_size, *(i + 1 for i in tokenizer.eos_ids))
    if needed > model_vocab_size:
        raise ValueError(
            f"the tokenizer has {needed} ids but the model's vocab_size is {model_vocab_size}; "
            "use the tokenizer that belongs to the model"
        )


# Special tokens


def _is_mark(token: str) -> bool:
    """True if an added token is written like a mark, as <think> is; others may be mere words."""
    return token.startswith("<") and token.endswith(">")


def _any_of(tokens: Iterable[str]) -> str:
    """A pattern for any of `tokens`, the max_token_chars first; it matches nothing where there is none."""
    return "|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)"


def _unused_character(messages: Sequence[Mapping]) -> str:
    """A character for private use that no message holds."""
    text = json.dumps([*messages], ensure_ascii=False)
    return next(chr(code) for code in range(0xF0000, 0xFFFFE) if chr(code) not in text)


# Files


def _folders(own: pathlib.Path, model: str | pathlib.Path) -> list[pathlib.Path]:
    """The model's folder, where there is one, and the tokenizer's."""
    return list(dict.fromkeys([*([pathlib.Path(model)] if model else []), own]))


def _declared(
    folders: Sequence[pathlib.Path], vocab_size: int
) -> tuple[dict[int, pathlib.Path], dict]:
    """The stop ids that files name, generation configs first, and what the first of those says.

    Raises ValueError on ids that are none: no integers, negative, past the vocabulary, or an empty
    list.
    """
    configs = {folder / "config.json": _read_json(folder / "config.json") for folder in folders}
    generations = {folder / GENERATION: _read_json(folder / GENERATION) for folder in folders}
    sizes = [config.get("vocab_size") for config in configs.values()]
    room = max([vocab_size, *(size for size in sizes if type(size) is int)])
    stops = {}
    ids = {}
    for file, said in {**generations, **configs}.items():
        for key in ("eos_token_id", "pad_token_id", "bos_token_id"):
            if said.get(key) is None:
                continue
            found = said[key]
            if not isinstance(found, list) or key != "eos_token_id":
                found = [found]
            if not found or not all(type(i) is int and 0 <= i < room for i in found):
                raise ValueError(
                    f"{file}: {key}={said[key]!r} is no token id from 0 to {room - 1}, "
                    "or list of such; mend it, or take it out"
                )
            if key == "eos_token_id":
                stops.update(dict.fromkeys(found, file))
            else:
                ids.setdefault(key, found[0])
    said = next((said for said in generations.values() if said), {})
    said = {key: value for key, value in said.items() if value is not None}  # null is unsaid
    return stops, {**said, **ids}


def _chat_template(folder: pathlib.Path, settings: dict) -> str | None:
    """The source of a folder's chat template, or None."""
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


def _from_file(read: Any, file: pathlib.Path) -> Any:
    """What a tokenizer library makes of a file. Raises ValueError where it makes nothing of it."""
    try:
        return read(str(file))
    except Exception as error:  # the libraries raise Exception itself, and RuntimeError
        said = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{file} is no tokenizer that can be read ({said}); copy or download it again"
        ) from None


def _read_json(file: pathlib.Path) -> dict:
    return files.read_json_object(file) if file.is_file() else {}


def _content(folder: pathlib.Path, settings: dict, name: str) -> str:
    """A special token as text; Hugging Face writes it as a string or as a record."""
    token = settings.get(name)
    token = token.get("content") if isinstance(token, dict) else token
    if not isinstance(token, str | None):
        raise ValueError(
            f"{folder / 'tokenizer_config.json'}: {name} is {files.describe(token)}, not a token's "
            "text"
        )
    return token or ""


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ValueError(f"{name} is not installed; pip install 'dcmdp-jax[train]'") from None
