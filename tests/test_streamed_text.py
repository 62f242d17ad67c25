"""Text that is streamed: whole characters, and joined the text of the whole."""

import random

import pytest

from dcmdp_jax import tokenizer
from dcmdp_jax.serving.server import Text


@pytest.mark.parametrize(
    "decode_ids",
    [
        lambda ids: bytes(ids).decode("utf-8", "replace"),
        lambda ids: (
            bytes(ids).decode("utf-8", "replace").removeprefix(" ")
        ),  # as SentencePiece does
    ],
    ids=["bytes", "leading space dropped"],
)
def test_it_has_whole_characters_and_loses_none(decode_ids):
    rng = random.Random(0)
    for _ in range(300):
        whole = "".join(
            rng.choice(["a", " ", "é", "日", "🙂", "\n", "<0x41>"])
            for _ in range(rng.randrange(1, 20))
        )
        ids = list(whole.encode())
        text = Text(decode_ids, stop_ids=(300,))
        pieces = []
        while ids:
            size = rng.randrange(1, 6)
            part = ids[:size]
            ids = ids[size:]
            pieces.append(text.add(part + [300] * (not ids), not ids))
        assert "".join(pieces) == decode_ids(whole.encode())
        assert not any("\ufffd" in piece for piece in pieces)


def test_it_keeps_what_shows_only_later():
    """SentencePiece drops the space that a text begins with, and shows nothing for control tokens."""
    pieces = ("▁", "a", "", "▁b")
    rng = random.Random(0)

    def decode_ids(ids):
        return "".join(pieces[i] for i in ids).replace("▁", " ").removeprefix(" ")

    for _ in range(300):
        ids = [rng.randrange(4) for _ in range(rng.randrange(1, 9))]
        text = Text(decode_ids, stop_ids=())
        assert "".join(text.add([i], n == len(ids) - 1) for n, i in enumerate(ids)) == decode_ids(
            ids
        ), ids


def test_it_shows_what_stays_broken_once_it_ends():
    text = Text(lambda ids: bytes(ids).decode("utf-8", "replace"), stop_ids=())
    assert [
        text.add(list("a🙂".encode()[:3]), False),
        text.add([0x62], False),
        text.add([0xF0, 0x9F], True),
    ] == ["", "a\ufffdb", "\ufffd"]


def test_it_works_with_a_byte_level_tokenizer(chat_folder):
    found = tokenizer.load(chat_folder)
    whole = "naïve 日本語と中文 🙂👩‍👩‍👧‍👦 <0x41>\n  x  العربية ½"
    ids = found.encode(whole)
    for size in (1, 2, 3, 7):
        text = Text(found.decode, found.eos_ids)
        parts = [ids[i : i + size] for i in range(0, len(ids), size)]
        pieces = [text.add(part, i == len(parts) - 1) for i, part in enumerate(parts)]
        assert "".join(pieces) == whole and not any("\ufffd" in piece for piece in pieces)
