"""Pieces of a streamed text end between characters, and joined are the decoded completion."""

import random

import pytest

from dcmdp_jax.serving.streamed_text import StreamedText
from dcmdp_jax.tokens import tokenizer


@pytest.mark.parametrize(
    "decode_ids",
    [
        lambda ids: bytes(ids).decode("utf-8", "replace"),
        # as SentencePiece does
        lambda ids: bytes(ids).decode("utf-8", "replace").removeprefix(" "),
    ],
    ids=["bytes", "leading space dropped"],
)
def test_pieces_end_between_characters_and_lose_none(decode_ids):
    rng = random.Random(0)
    for _ in range(300):
        characters = ["a", " ", "é", "日", "🙂", "\n", "<0x41>"]
        completion = "".join(rng.choices(characters, k=rng.randrange(1, 20)))
        ids = list(completion.encode())
        text = StreamedText(decode_ids, stop_ids=(300,))
        pieces = []
        while ids:
            size = rng.randrange(1, 6)
            part = ids[:size]
            ids = ids[size:]
            pieces.append(text.add(part + [300] * (not ids), not ids))
        assert "".join(pieces) == decode_ids(completion.encode())
        assert not any("\ufffd" in piece for piece in pieces)


def test_tokens_without_text_of_their_own_are_not_lost():
    """SentencePiece drops a text's first space, and shows nothing for control tokens."""
    pieces = ("▁", "a", "", "▁b")
    rng = random.Random(0)

    def decode_ids(ids):
        return "".join(pieces[i] for i in ids).replace("▁", " ").removeprefix(" ")

    for _ in range(300):
        ids = [rng.randrange(4) for _ in range(rng.randrange(1, 9))]
        text = StreamedText(decode_ids, stop_ids=())
        pieces_sent = [text.add([i], n == len(ids) - 1) for n, i in enumerate(ids)]
        assert "".join(pieces_sent) == decode_ids(ids), ids


def test_a_broken_character_is_shown_at_the_end():
    text = StreamedText(lambda ids: bytes(ids).decode("utf-8", "replace"), stop_ids=())
    assert text.add(list("a🙂".encode()[:3]), False) == ""
    assert text.add([0x62], False) == "a\ufffdb"
    assert text.add([0xF0, 0x9F], True) == "\ufffd"


def test_pieces_of_a_byte_level_tokenizer_are_joined_to_the_text(chat_folder):
    byte_level = tokenizer.load(chat_folder)
    completion = "naïve 日本語と中文 🙂👩‍👩‍👧‍👦 <0x41>\n  x  العربية ½"
    ids = byte_level.encode(completion)
    for size in (1, 2, 3, 7):
        text = StreamedText(byte_level.decode, byte_level.eos_ids)
        parts = [ids[i : i + size] for i in range(0, len(ids), size)]
        pieces = [text.add(part, i == len(parts) - 1) for i, part in enumerate(parts)]
        assert "".join(pieces) == completion
        assert not any("\ufffd" in piece for piece in pieces)
