"""Tokenizers against Hugging Face transformers, and what a folder may hold."""

import json
import pathlib
import shutil
import sys
import threading
import time

import pytest

from dcmdp_jax.tokens import tokenizer as tokenizers

QWEN3 = pathlib.Path(__file__).parents[1].parent / "shared" / "data" / "qwen3_tokenizer"
needs_qwen3 = pytest.mark.skipif(not QWEN3.is_dir(), reason="needs ../shared/data/qwen3_tokenizer")

TEXTS = (
    "",
    " ",
    "\n\n  \t",
    "Hello, world",
    "3+5=8;8*2=6;#6",
    "  leading and trailing  ",
    "1234567890 1,000.50",
    "naïve café — “quoted” … ½ №",
    "e\u0301 decomposed",
    "日本語と中文，混合。",
    "🙂👩‍👩‍👧‍👦",
    "العربية עברית",
    "def f(x):\n    return x**2\n",
    r"\boxed{\frac{1}{2}}",
    "<|im_start|>user\nhi<|im_end|>\n",
    "<think>\nso\n</think>\n\n7",
    "a<|endoftext|>b",
    "<|im_end",
    "\u0000\u200b",
)

USER = {"role": "user", "content": "What is 2+2?"}
SYSTEM = {"role": "system", "content": "Be brief."}
ANSWER = {"role": "assistant", "content": "4"}
THOUGHT = {"role": "assistant", "content": "<think>\ntwo and two\n</think>\n\n4"}
REASONED = {"role": "assistant", "content": "4", "reasoning_content": "two and two"}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": "<é & 'x'>"}}}
    ],
}
RESULT = {"role": "tool", "content": "4"}
CONVERSATIONS = (
    [USER],
    [SYSTEM, USER],
    [USER, ANSWER, USER],
    [SYSTEM, USER, THOUGHT, USER],
    [USER, REASONED],
    [USER, THOUGHT],
    [USER, CALL, RESULT, ANSWER],
    [SYSTEM, USER, CALL, RESULT, RESULT],
    [USER, SYSTEM, USER],
    [{"role": "user", "content": "é<|im_end|>"}],
)


@pytest.fixture(scope="module")
def qwen3():
    return tokenizers.load(QWEN3)


@pytest.fixture(scope="module")
def tokenizer(chat_folder):
    return tokenizers.load(chat_folder)


@pytest.fixture(scope="module")
def oracle(chat_folder):
    transformers = pytest.importorskip("transformers")
    fast = transformers.PreTrainedTokenizerFast(tokenizer_file=str(chat_folder / "tokenizer.json"))
    fast.chat_template = (chat_folder / "chat_template.jinja").read_text()
    return fast


@pytest.fixture
def folder(tmp_path):
    """A small word-level tokenizer, whose added token has an id above a gap."""
    hf_tokenizers = pytest.importorskip("tokenizers")
    small = hf_tokenizers.Tokenizer(
        hf_tokenizers.models.WordLevel({"a": 0, "b": 1, "[stop]": 7}, unk_token="a")
    )
    small.pre_tokenizer = hf_tokenizers.pre_tokenizers.WhitespaceSplit()
    small.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def write(folder, name, value):
    (folder / name).write_text(json.dumps(value))


@pytest.mark.parametrize("text", TEXTS)
def test_encodes_as_transformers_does(tokenizer, oracle, text):
    ids = tokenizer.encode(text)
    assert ids == oracle.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == oracle.decode(
        ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
    )


@pytest.mark.parametrize("enable_thinking", [True, False])
@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("number", range(len(CONVERSATIONS)))
def test_chat_is_what_transformers_renders(
    tokenizer, oracle, number, enable_thinking, add_generation_prompt
):
    how = {"enable_thinking": enable_thinking, "add_generation_prompt": add_generation_prompt}
    text = tokenizer.render_chat(CONVERSATIONS[number], **how)
    assert text == oracle.apply_chat_template(CONVERSATIONS[number], tokenize=False, **how)
    ids = oracle.apply_chat_template(CONVERSATIONS[number], tokenize=True, return_dict=False, **how)
    assert tokenizer.encode(text) == ids


@needs_qwen3
def test_qwen3_ids(qwen3):
    assert (qwen3.vocab_size, qwen3.eos_ids, qwen3.pad_id) == (151669, (151645, 151643), 151643)
    assert qwen3.encode("<think></think>") == [151667, 151668]


@needs_qwen3
def test_ids_that_only_the_model_has_are_dropped(qwen3):
    assert qwen3.decode([151700, 9, 151935]) == "*"


@needs_qwen3
def test_a_model_may_have_more_ids_than_its_tokenizer(qwen3):
    tokenizers.check_vocab_size(qwen3, 151936)


@needs_qwen3
def test_a_model_with_fewer_ids_than_its_tokenizer_is_refused(qwen3):
    with pytest.raises(ValueError, match="151669 ids but the model's vocab_size is 151668"):
        tokenizers.check_vocab_size(qwen3, 151668)


def test_vocab_size_is_highest_id_plus_one(folder):
    write(folder, "tokenizer_config.json", {"eos_token": {"content": "[stop]"}})
    assert tokenizers.load(folder).vocab_size == 8


def test_encoding_adds_nothing(folder):
    settings = json.loads((folder / "tokenizer.json").read_text())
    settings["post_processor"] = {"type": "BertProcessing", "sep": ["b", 1], "cls": ["[stop]", 7]}
    write(folder, "tokenizer.json", settings)
    write(folder, "tokenizer_config.json", {"eos_token": "[stop]"})
    assert tokenizers.load(folder).encode("a") == [0]


@pytest.mark.parametrize("declared, expected", [(7, (7, 1)), ([1, 7], (1, 7)), (None, (1,))])
def test_stop_tokens_of_the_generation_config_come_first(folder, declared, expected):
    write(folder, "generation_config.json", {"eos_token_id": declared})
    write(folder, "tokenizer_config.json", {"eos_token": "b"})
    assert tokenizers.load(folder).eos_ids == expected


def test_special_tokens_of_tokenizer_config(folder):
    settings = {"eos_token": "b", "pad_token": {"content": "a"}}
    write(folder, "tokenizer_config.json", settings)
    loaded = tokenizers.load(folder)
    assert (loaded.eos_ids, loaded.pad_id) == ((1,), 0)


def test_of_several_templates_the_default_is_used(folder):
    template = (
        "{{ eos_token }}{% for m in messages %}{{ m.content | tojson }}{% break %}{% endfor %}"
    )
    templates = [{"name": "tools", "template": "no"}, {"name": "default", "template": template}]
    write(folder, "tokenizer_config.json", {"eos_token": "b", "chat_template": templates})
    text = tokenizers.load(folder).render_chat(
        [{"role": "user", "content": "<é>"}, USER], enable_thinking=False
    )
    assert text == 'b"<é>"'


@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
@pytest.mark.parametrize("value", [[], "7", ["7"], -1, [1, -1], 20, [1, 20], True, 1.0, {}, [[1]]])
def test_a_stop_token_that_is_none_is_refused_by_file(folder, name, value):
    write(folder, "tokenizer_config.json", {"eos_token": "b"})
    write(folder, name, {"eos_token_id": value})
    with pytest.raises(ValueError, match=f"{name}: eos_token_id=.* is no token id from 0 to 7"):
        tokenizers.load(folder)


@pytest.mark.parametrize("key", ["pad_token_id", "bos_token_id"])
@pytest.mark.parametrize("value", [-1, "1", [1], 8])
def test_other_token_ids_are_checked_too(folder, key, value):
    write(folder, "config.json", {"eos_token_id": 1, key: value})
    with pytest.raises(ValueError, match=f"config.json: {key}=.* is no token id"):
        tokenizers.load(folder)


@pytest.fixture(params=["pad_token_id", "bos_token_id", "eos_token_id"])
def with_null(folder, request):
    """A tokenizer one of whose ids is null in the generation config."""
    write(folder, "config.json", {"eos_token_id": 7})
    write(
        folder, "generation_config.json", {"temperature": 0.6, "top_k": None, request.param: None}
    )
    return tokenizers.load(folder)


def test_null_in_a_generation_config_is_left_out(with_null):
    assert (with_null.eos_ids, with_null.pad_id) == ((7,), 7)
    assert with_null.generation_config == {"temperature": 0.6}


def test_null_in_a_generation_config_is_not_saved(with_null, tmp_path):
    (tmp_path / "out").mkdir()
    tokenizers.save(with_null, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert written == {"eos_token_id": 7, "pad_token_id": 7, "temperature": 0.6}


def test_null_in_one_generation_config_leaves_the_other_s_id(folder, tmp_path):
    (tmp_path / "model").mkdir()
    write(tmp_path / "model", "generation_config.json", {"eos_token_id": 7, "pad_token_id": None})
    write(folder, "generation_config.json", {"pad_token_id": 1})
    assert tokenizers.load(folder, tmp_path / "model").pad_id == 1


@pytest.fixture
def padded(folder):
    """A tokenizer of 8 ids that stops at an id that only its model has."""
    write(folder, "config.json", {"eos_token_id": 11, "vocab_size": 12})
    return tokenizers.load(folder)


def test_ids_of_a_padded_vocabulary_may_stop(padded):
    assert padded.eos_ids == (11,)


def test_a_model_needs_the_stop_ids_too(padded):
    tokenizers.check_vocab_size(padded, 12)
    with pytest.raises(ValueError, match="12 ids but the model's vocab_size is 8"):
        tokenizers.check_vocab_size(padded, 8)


@pytest.mark.parametrize(
    "files, expected",
    [
        ({"config.json": 1}, (1,)),
        ({"config.json": [7, 1]}, (7, 1)),
        ({"config.json": 0, "generation_config.json": 7}, (7, 0)),
        (
            {"config.json": 0, "generation_config.json": [7, 0], "tokenizer_config.json": "b"},
            (7, 0, 1),
        ),
        ({"config.json": None, "generation_config.json": None, "tokenizer_config.json": "b"}, (1,)),
        ({"model/generation_config.json": 7, "tokenizer_config.json": "b"}, (7, 1)),
        ({"model/config.json": 7, "generation_config.json": 0}, (0, 7)),
        (
            {
                "model/generation_config.json": [7],
                "generation_config.json": [0, 7],
                "model/config.json": 1,
            },
            (7, 0, 1),
        ),
    ],
)
def test_whatever_any_file_names_stops(folder, tmp_path, files, expected):
    """Those of generation configs first; a tokenizer given apart does not lose the model's."""
    (tmp_path / "model").mkdir()
    for name, value in files.items():
        key = "eos_token" if name == "tokenizer_config.json" else "eos_token_id"
        write(folder, name, {key: value})
    assert tokenizers.load(folder, tmp_path / "model").eos_ids == expected


def test_a_stop_token_that_the_tokenizer_lacks_is_refused(folder):
    write(folder, "tokenizer_config.json", {"eos_token": "<|im_end|>"})
    with pytest.raises(
        ValueError, match="tokenizer_config.json: eos_token '<|im_end|>' is not in tokenizer.json"
    ):
        tokenizers.load(folder)


def test_template_tags_leave_no_lines_behind(folder):
    template = (
        "{% for m in messages %}\n  {% if true %}\n{{ m.role }}\n  {% endif %}\n{% endfor %}\n"
    )
    write(folder, "tokenizer_config.json", {"eos_token": "b", "chat_template": template})
    transformers = pytest.importorskip("transformers")
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), chat_template=template
    )
    text = tokenizers.load(folder).render_chat([USER, ANSWER], enable_thinking=False)
    assert text == fast.apply_chat_template([USER, ANSWER], tokenize=False) == "user\nassistant\n"


def test_a_template_that_fails_names_its_folder(folder):
    template = "{{ messages.append(1) }}"
    write(folder, "tokenizer_config.json", {"eos_token": "b", "chat_template": template})
    with pytest.raises(ValueError, match=f"chat template of {folder} fails with SecurityError"):
        tokenizers.load(folder).render_chat([USER], enable_thinking=False)


def test_a_folder_without_a_stop_token_is_refused(folder):
    with pytest.raises(ValueError, match="names no stop token"):
        tokenizers.load(folder)


def test_a_folder_without_a_chat_template_is_named(folder):
    write(folder, "tokenizer_config.json", {"eos_token": "b"})
    with pytest.raises(ValueError, match="has no chat template"):
        tokenizers.load(folder).render_chat([USER], enable_thinking=False)


def test_a_folder_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        tokenizers.load(tmp_path / "nowhere")


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(ValueError, match="tokenizer.json .* and tokenizer.model"):
        tokenizers.load(tmp_path)


def test_a_missing_library_names_the_extra(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(
        ValueError, match=r"tokenizers is not installed; pip install 'dcmdp-jax\[train\]'"
    ):
        tokenizers.load(folder)


def test_no_token_stands_for_more_characters_than_the_longest(folder):
    write(folder, "generation_config.json", {"eos_token_id": 7})
    assert tokenizers.load(folder).max_token_chars == len("[stop]")


@needs_qwen3
def test_qwen3_longest_token_is_of_spaces(qwen3):
    lengths = [len(qwen3.encode(" " * (qwen3.max_token_chars + more))) for more in (0, 1)]
    assert lengths == [1, 2]


def test_encoding_a_long_text_lets_other_threads_run(folder):
    write(folder, "generation_config.json", {"eos_token_id": 7})
    found = tokenizers.load(folder)
    ticks = []
    done = threading.Event()

    def tick():
        while not done.wait(0.001):
            ticks.append(time.perf_counter())

    watch = threading.Thread(target=tick)
    watch.start()
    began = time.perf_counter()
    assert len(found.encode("a b " * 300_000)) == 600_000
    ended = time.perf_counter()
    done.set()
    watch.join()
    inside = [began, *(at for at in ticks if began < at < ended), ended]
    assert max(b - a for a, b in zip(inside, inside[1:])) < 0.7 * (ended - began)


def test_a_tokenizer_file_stands_for_its_folder(tmp_path, chat_folder, tokenizer):
    assert tokenizers.load(chat_folder / "tokenizer.json").vocab_size == tokenizer.vocab_size
    shutil.copy(chat_folder / "tokenizer.json", tmp_path)
    assert tokenizers.load(tmp_path).eos_ids == tokenizer.eos_ids


@pytest.mark.parametrize("enable_thinking", [True, False])
@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("number", range(len(CONVERSATIONS)))
def test_conversations_are_encoded_as_by_transformers(
    tokenizer, oracle, number, enable_thinking, add_generation_prompt
):
    how = {"enable_thinking": enable_thinking, "add_generation_prompt": add_generation_prompt}
    want = oracle.apply_chat_template(
        CONVERSATIONS[number], tokenize=True, return_dict=False, **how
    )
    assert tokenizer.encode_chat(CONVERSATIONS[number], special_tokens_in_text=True, **how) == want
    if CONVERSATIONS[number] is not CONVERSATIONS[-1]:  # whose text holds a special token
        assert tokenizer.encode_chat(CONVERSATIONS[number], **how) == want


def test_a_special_token_that_plain_text_makes_too_is_refused(folder):
    settings = json.loads((folder / "tokenizer.json").read_text())
    settings["added_tokens"] = [
        {
            "id": 7,
            "content": "[stop]",
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
    ]
    write(folder, "tokenizer.json", settings)
    write(
        folder,
        "tokenizer_config.json",
        {"eos_token": "b", "chat_template": "{{ messages[0].content }}"},
    )
    found = tokenizers.load(folder)
    assert found.encode_chat([{"role": "user", "content": "a b"}], enable_thinking=False) == [0, 1]
    with pytest.raises(
        ValueError, match=r"tokenizer.json makes the special token \[stop\] of plain text"
    ):
        found.encode_chat([{"role": "user", "content": "a [stop]"}], enable_thinking=False)


@needs_qwen3
def test_a_base_model_stops_at_all_that_its_files_name(tmp_path):
    shutil.copytree(QWEN3, tmp_path / "base")
    write(tmp_path / "base", "generation_config.json", {"eos_token_id": 151643})
    write(tmp_path / "base", "tokenizer_config.json", {"eos_token": "<|endoftext|>"})
    assert tokenizers.load(tmp_path / "base").eos_ids == (151643, 151645)


# Files that are none


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("tokenizer.json", b"\x00\xff", "tokenizer.json is no tokenizer"),
        ("tokenizer.json", b"", "tokenizer.json is no tokenizer"),
        ("tokenizer.json", b"[]", "tokenizer.json is no tokenizer"),
        ("tokenizer.json", b"[" * 10**5, "tokenizer.json is no tokenizer"),
        (
            "tokenizer.json",
            b'{"model": {"type": "WordLevel", "vocab": {"a": -1}, "unk_token": "a"}}',
            "is no tokenizer",
        ),
        (
            "tokenizer.json",
            b'{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}}',
            "is no tokenizer",
        ),
        (
            "tokenizer.json",
            b'{"model": {"type": "BPE", "vocab": {}, "merges": []}}',
            "holds no tokens",
        ),
        ("tokenizer_config.json", b"[]", "tokenizer_config.json holds a list"),
        ("tokenizer_config.json", b"\xff", "not valid JSON"),
        ("tokenizer_config.json", b'{"eos_token": 5}', "eos_token is a number, not a token's text"),
        (
            "tokenizer_config.json",
            b'{"eos_token": {"content": [1]}}',
            "eos_token is a list, not a token's text",
        ),
        (
            "tokenizer_config.json",
            b'{"chat_template": 5}',
            "chat_template is a number, not a string",
        ),
        ("tokenizer_config.json", b'{"chat_template": ["x"]}', "items without name and template"),
        ("chat_template.jinja", b"\xff", "chat_template.jinja is not UTF-8"),
        ("generation_config.json", b"[1]", "generation_config.json holds a list"),
        ("config.json", b"{", "config.json is not valid JSON"),
    ],
)
def test_files_that_are_none_are_named(folder, name, content, message):
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        tokenizers.load(folder)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("tokenizer.model", b"garbage", "tokenizer.model is no tokenizer"),
        ("tokenizer.model", b"", "tokenizer.model is no tokenizer"),
        ("characters.json", b'{"alphabet": 5}', "holds no alphabet"),
        ("characters.json", b"[]", "holds a list"),
    ],
)
def test_other_tokenizers_that_are_none_are_named(tmp_path, name, content, message):
    if name == "tokenizer.model":
        pytest.importorskip("sentencepiece")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        tokenizers.load(tmp_path)


# Out


@pytest.fixture
def saved(folder, tmp_path):
    """A tokenizer whose stop tokens stand in several files, and the folder it is saved to."""
    model = tmp_path / "model"
    out = tmp_path / "out"
    model.mkdir()
    out.mkdir()
    write(folder, "tokenizer_config.json", {"eos_token": "b"})
    generation = {"eos_token_id": [7], "temperature": 0.6, "bos_token_id": 0}
    write(model, "generation_config.json", generation)
    first = tokenizers.load(folder, model)
    tokenizers.save(first, out)
    return first, out


IDS = {"eos_token_id": [7, 1], "bos_token_id": 0, "pad_token_id": 7}


def test_the_special_ids_of_all_files_are_saved(saved):
    written = json.loads((saved[1] / "generation_config.json").read_text())
    assert written == IDS | {"temperature": 0.6}


def test_special_token_ids_are_named_as_hugging_face_names_them(saved):
    assert tokenizers.special_token_ids(saved[0]) == IDS


def test_a_saved_tokenizer_stops_where_the_first_did(saved):
    first, out = saved
    again = tokenizers.load(out)
    assert (again.eos_ids, again.pad_id) == (first.eos_ids, first.pad_id)


def test_a_saved_tokenizer_encodes_as_the_first_did(saved):
    assert tokenizers.load(saved[1]).encode("a b") == [0, 1]
