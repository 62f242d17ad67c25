"""Tokenizers of SentencePiece and of single characters."""

import json

import pytest

from dcmdp_jax.tokens import tokenizer as tokenizers

USER = {"role": "user", "content": "What is 2+2?"}


@pytest.fixture(scope="module")
def sentencepiece_folder(tmp_path_factory):
    sentencepiece = pytest.importorskip("sentencepiece")
    path = tmp_path_factory.mktemp("sentencepiece")
    (path / "text.txt").write_text("the quick brown fox jumps over the lazy dog 0123456789\n" * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(path / "text.txt"),
        model_prefix=str(path / "tokenizer"),
        vocab_size=60,
        hard_vocab_limit=False,
        minloglevel=2,
        pad_id=3,
    )
    return path


@pytest.fixture(scope="module")
def pieces(sentencepiece_folder):
    """The library's own reading of the model file."""
    sentencepiece = pytest.importorskip("sentencepiece")
    return sentencepiece.SentencePieceProcessor(
        model_file=str(sentencepiece_folder / "tokenizer.model")
    )


@pytest.fixture(scope="module")
def sentence_piece(sentencepiece_folder):
    return tokenizers.load(sentencepiece_folder)


def test_sentencepiece_encodes_as_the_library_does(sentence_piece, pieces):
    ids = sentence_piece.encode("the lazy fox 42")
    assert [pieces.id_to_piece(i) for i in ids] == pieces.encode("the lazy fox 42", out_type=str)


def test_sentencepiece_drops_ids_that_only_the_model_has(sentence_piece):
    ids = sentence_piece.encode("the lazy fox 42")
    assert sentence_piece.decode([*ids, sentence_piece.vocab_size]) == "the lazy fox 42"


def test_sentencepiece_ids(sentence_piece, pieces):
    assert sentence_piece.vocab_size == pieces.get_piece_size()
    assert (sentence_piece.eos_ids, sentence_piece.pad_id) == ((2,), 3)


def test_a_sentencepiece_prompt_gets_bos_only_if_a_file_asks_for_it(
    sentencepiece_folder, sentence_piece, tmp_path
):
    assert sentence_piece.encode_prompt("lazy") == sentence_piece.encode("lazy")
    tokenizers.save(sentence_piece, tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": true}')
    (tmp_path / "saved").mkdir()
    tokenizers.save(tokenizers.load(tmp_path), tmp_path / "saved")
    asks = tokenizers.load(tmp_path / "saved")
    assert asks.encode_prompt("lazy") == [1, *sentence_piece.encode("lazy")]


def test_no_sentencepiece_piece_is_longer_than_the_longest(sentence_piece, pieces):
    longest = max(len(pieces.id_to_piece(i)) for i in range(pieces.get_piece_size()))
    assert sentence_piece.max_token_chars == longest


def test_sentencepiece_has_no_chat_template(sentence_piece):
    with pytest.raises(ValueError, match="no chat template"):
        sentence_piece.render_chat([USER], enable_thinking=False)


@pytest.mark.parametrize("method", ["render_chat", "encode_chat"])
def test_without_a_template_no_conversation_is_encoded(method):
    characters = tokenizers.CharacterTokenizer("ab")
    with pytest.raises(ValueError, match="has no chat template; set data.chat=False"):
        getattr(characters, method)([{"role": "user", "content": "a"}], enable_thinking=False)


CHAIN = tokenizers.CharacterTokenizer("0123456789+-*=;#")


def test_characters_are_decoded_to_the_text():
    text = "9*8=2;#2"
    assert CHAIN.decode(CHAIN.encode(text)) == text


def test_characters_have_an_id_each_after_padding_and_stop():
    assert (CHAIN.vocab_size, CHAIN.eos_ids, CHAIN.pad_id) == (18, (1,), 0)
    assert sorted(CHAIN.encode(CHAIN.alphabet)) == list(range(2, 18))


def test_ids_without_a_character_are_seen():
    assert CHAIN.decode([2, 0, 1, 18]) == "0\ufffd\ufffd\ufffd"


def test_a_character_outside_the_alphabet_is_named():
    with pytest.raises(ValueError, match="'x' is not in the alphabet"):
        CHAIN.encode("1x")


def test_an_alphabet_has_no_character_twice():
    with pytest.raises(ValueError, match="twice"):
        tokenizers.CharacterTokenizer("aa")


def test_a_character_is_one_character():
    assert tokenizers.CharacterTokenizer("ab").max_token_chars == 1


def test_saved_characters_are_loaded(tmp_path):
    tokenizers.save(tokenizers.CharacterTokenizer("ab"), tmp_path)
    assert tokenizers.load(tmp_path).alphabet == "ab"


def test_saved_characters_stop_too(tmp_path):
    tokenizers.save(tokenizers.CharacterTokenizer("ab"), tmp_path)
    written = json.loads((tmp_path / "generation_config.json").read_text())
    assert written == {"eos_token_id": 1, "pad_token_id": 0}
