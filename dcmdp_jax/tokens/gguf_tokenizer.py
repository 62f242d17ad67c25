"""The tokenizer and chat template of a GGUF file, as the files of a Hugging Face folder.

`tokenizer.ggml.model` is "gpt2" for a byte-level BPE, whose pre-tokenizer `tokenizer.ggml.pre`
names, or "llama" for a BPE of SentencePiece.
"""

from __future__ import annotations

import pathlib
from typing import Any

from dcmdp_jax import files
from dcmdp_jax.tokens.tokenizer import import_library

# kinds of token in tokenizer.ggml.token_type
NORMAL = 1
CONTROL = 3
USER_DEFINED = 4

SPLIT_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLIT_LLAMA3 = SPLIT_QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
# names of pre-tokenizers, with what splits a text before the bytes are encoded
GPT2 = ("gpt-2",)
SMOLLM = ("smollm",)
LLAMA3 = ("llama-bpe",)
QWEN2 = ("qwen2", "deepseek-r1-qwen")


def write(metadata: dict[str, Any], folder: pathlib.Path, place: str) -> None:
    """Writes tokenizer.json, tokenizer_config.json, generation_config.json and, if the file has a
    chat template, chat_template.jinja.

    Args:
        metadata: of the file.
        place: the file's name in messages.

    Raises ValueError if the file has no tokenizer, or one of another kind.
    """
    texts = metadata.get("tokenizer.ggml.tokens")
    if not texts:
        raise ValueError(f"{place} holds no tokenizer; give --tokenizer FOLDER")
    _check_types(metadata, place)
    if len(set(texts)) < len(texts):
        raise ValueError(f"{place}: tokenizer.ggml.tokens holds a token twice; take another file")
    kind = metadata.get("tokenizer.ggml.model")
    if kind == "gpt2":
        tokenizer = _byte_level(metadata, place)
    elif kind == "llama":
        tokenizer = _sentencepiece(metadata, place)
    else:
        raise ValueError(
            f"{place}: tokenizer.ggml.model is {kind!r:.60}; supported are gpt2 and llama; give "
            "--tokenizer FOLDER, that of the original model"
        )
    _add_special(tokenizer, metadata)
    named = {name: _token(metadata, name, place) for name in ("bos", "eos", "padding", "unknown")}
    if _adds_bos(metadata) and named["bos"]:
        _prepend(tokenizer, named["bos"])
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {
        "bos_token": named["bos"],
        "eos_token": named["eos"],
        "pad_token": named["padding"],
        "unk_token": named["unknown"],
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": _adds_bos(metadata),
        "clean_up_tokenization_spaces": False,
        **{name: text for name, text in special.items() if text},
    }
    files.write_json(folder / "tokenizer_config.json", settings)
    stops = [_id(metadata, name) for name in ("eos", "eot", "eom")]
    stops = list(dict.fromkeys(i for i in stops if i is not None))
    ids = {"bos_token_id": _id(metadata, "bos"), "pad_token_id": _id(metadata, "padding")}
    generation = {"eos_token_id": stops or None, **ids}
    generation = {name: value for name, value in generation.items() if value is not None}
    files.write_json(folder / "generation_config.json", generation)
    template = metadata.get("tokenizer.chat_template")
    if template:
        files.write_atomic(folder / "chat_template.jinja", template)


def _check_types(metadata: dict[str, Any], place: str) -> None:
    """Raises ValueError where a setting of the tokenizer is of another type than llama.cpp's."""
    ids = [f"{name}_token_id" for name in ("bos", "eos", "eot", "eom", "padding", "unknown")]
    lists = {"tokens": str, "merges": str, "scores": float, "token_type": int}
    for name in (*ids, *lists):
        value = metadata.get(f"tokenizer.ggml.{name}")
        items = value if name in lists else [value]
        kind = lists.get(name, int)
        if value is not None and not (isinstance(items, list) and _all_are(items, kind)):
            raise ValueError(
                f"{place}: tokenizer.ggml.{name} is not of the type that llama.cpp writes; give "
                "--tokenizer FOLDER, that of the original model"
            )
    if not isinstance(metadata.get("tokenizer.chat_template", ""), str):
        raise ValueError(f"{place}: tokenizer.chat_template is no text; give --tokenizer FOLDER")


def _all_are(values: list[Any], kind: type) -> bool:
    return all(isinstance(value, kind) for value in values)


def _byte_level(metadata: dict[str, Any], place: str) -> Any:
    library = import_library("tokenizers")
    name = metadata.get("tokenizer.ggml.pre")
    known = (*GPT2, *SMOLLM, *LLAMA3, *QWEN2)
    if name not in known:
        raise ValueError(
            f"{place}: the pre-tokenizer tokenizer.ggml.pre={name!r:.60} is not supported; "
            f"supported are {', '.join(known)}; give --tokenizer FOLDER, that of the original model"
        )
    vocabulary = _vocabulary(metadata)
    merges = [tuple(merge.split(" ")) for merge in metadata.get("tokenizer.ggml.merges", [])]
    for parts in merges:
        if len(parts) != 2 or not {*parts, "".join(parts)} <= vocabulary.keys():
            raise ValueError(
                f"{place}: the merge {' '.join(parts)!r:.60} of tokenizer.ggml.merges is not of "
                "two tokens to one; give --tokenizer FOLDER, that of the original model"
            )
    # Llama 3 keeps a word that is a token whole, even if no merges lead to it
    tokenizer = library.Tokenizer(
        library.models.BPE(vocabulary, merges, ignore_merges=name in LLAMA3)
    )
    pre = library.pre_tokenizers
    if name in (*LLAMA3, *QWEN2):
        pattern = library.Regex(SPLIT_LLAMA3 if name in LLAMA3 else SPLIT_QWEN2)
        steps = [
            pre.Split(pattern, "isolated"),
            pre.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    else:
        steps = [pre.Digits(individual_digits=True)] * (name in SMOLLM)
        steps.append(pre.ByteLevel(add_prefix_space=False))
    tokenizer.pre_tokenizer = pre.Sequence(steps)
    if name in QWEN2:
        tokenizer.normalizer = library.normalizers.NFC()
    tokenizer.decoder = library.decoders.ByteLevel()
    return tokenizer


def _sentencepiece(metadata: dict[str, Any], place: str) -> Any:
    """Returns a BPE whose merges have the order of the pieces' scores."""
    library = import_library("tokenizers")
    vocabulary = _vocabulary(metadata)
    scores = metadata.get("tokenizer.ggml.scores")
    if not scores or len(scores) != len(vocabulary):
        raise ValueError(f"{place}: tokenizer.ggml.scores has not one score for each token")
    kinds = metadata.get("tokenizer.ggml.token_type", [NORMAL] * len(vocabulary))
    merges = []
    for text, index in vocabulary.items():
        if kinds[index] != NORMAL:
            continue
        parts = [(text[:cut], text[cut:]) for cut in range(1, len(text))]
        parts = [pair for pair in parts if pair[0] in vocabulary and pair[1] in vocabulary]
        parts.sort(key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
        merges += [(scores[index], pair) for pair in parts]
    merges.sort(key=lambda merge: merge[0], reverse=True)
    unknown = _token(metadata, "unknown", place)
    tokenizer = library.Tokenizer(
        library.models.BPE(
            vocabulary,
            [pair for _, pair in merges],
            unk_token=unknown or None,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    normalizers = library.normalizers
    steps = [normalizers.Prepend("▁")] * bool(prefix) + [normalizers.Replace(" ", "▁")]
    tokenizer.normalizer = normalizers.Sequence(steps)
    decoders = library.decoders
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        + [decoders.Strip(" ", 1, 0)] * bool(prefix)
    )
    return tokenizer


def _vocabulary(metadata: dict[str, Any]) -> dict[str, int]:
    return {text: i for i, text in enumerate(metadata["tokenizer.ggml.tokens"])}


def _add_special(tokenizer: Any, metadata: dict[str, Any]) -> None:
    """Makes the control tokens special, and the user's tokens indivisible."""
    library = import_library("tokenizers")
    texts = metadata["tokenizer.ggml.tokens"]
    kinds = metadata.get("tokenizer.ggml.token_type", [])

    def added(kind: int, special: bool) -> list[Any]:
        return [
            library.AddedToken(text, normalized=False, special=special)
            for text, own in zip(texts, kinds)
            if own == kind
        ]

    tokenizer.add_special_tokens(added(CONTROL, special=True))
    tokenizer.add_tokens(added(USER_DEFINED, special=False))


def _prepend(tokenizer: Any, bos: str) -> None:
    """Makes `tokenizer` write `bos` before a text."""
    library = import_library("tokenizers")
    tokenizer.post_processor = library.processors.TemplateProcessing(
        single=f"{bos} $A",
        pair=f"{bos} $A {bos} $B",
        special_tokens=[(bos, tokenizer.token_to_id(bos))],
    )


def _adds_bos(metadata: dict[str, Any]) -> bool:
    """Returns True if a text begins with the BOS token; if the file is silent, as llama.cpp."""
    silent = (
        metadata.get("tokenizer.ggml.model") == "llama"
        or metadata.get("tokenizer.ggml.pre") in LLAMA3
    )
    return bool(metadata.get("tokenizer.ggml.add_bos_token", silent))


def _id(metadata: dict[str, Any], name: str) -> int | None:
    return metadata.get(f"tokenizer.ggml.{name}_token_id")


def _token(metadata: dict[str, Any], name: str, place: str) -> str:
    """Returns the text of a token that the file names, or "" if it names none."""
    number = _id(metadata, name)
    texts = metadata["tokenizer.ggml.tokens"]
    if number is None:
        return ""
    if not 0 <= number < len(texts):
        raise ValueError(f"{place}: tokenizer.ggml.{name}_token_id={number} is no token")
    return texts[number]
