"""`dcmdp chat`: replies are completions of the conversation so far, of lines that are piped."""

import dataclasses
import io
import pathlib

import pytest

from dcmdp_jax import cli
from dcmdp_jax.models import weights
from dcmdp_jax.records import Sampling
from dcmdp_jax.tokens import tokenizer as tokenizers
from dcmdp_jax.tools import chat, complete
from support import hosts_experiment, own_data
from support.random_params import random_params
from support.tiny_models import TINY

pytestmark = pytest.mark.full

MODEL = dataclasses.replace(TINY, vocab_size=512)
DRAWN = Sampling(0.9)
GREEDY = Sampling(0.0)
TOKENS = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model's folder, with a tokenizer that has a chat template."""
    path = tmp_path_factory.mktemp("model") / "hf"
    weights.save(path, MODEL, random_params(MODEL, 0.16, norms=1.0))
    own = own_data.write_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    tokenizers.save(tokenizers.load(own), path)
    return str(path)


@pytest.fixture(scope="module")
def begin(folder):
    """(sampling, ...) -> a conversation without messages."""

    def make(sampling, **options):
        model, params = weights.load(folder)
        made = chat.Chat(
            model, tokenizers.load(folder), max_tokens=TOKENS, sampling=sampling, **options
        )
        made.load(params)
        return made

    return make


def generated(folder, prompt, sampling, **options):
    """The text of one completion by `dcmdp generate`."""
    ((completion,),) = complete.texts(
        folder, [prompt], max_tokens=TOKENS, sampling=sampling, **options
    )
    return completion.text


@pytest.mark.parametrize("template", [True, False])
def test_a_first_reply_is_what_generate_samples(template, begin, folder):
    reply = "".join(begin(DRAWN, seed=3, template=template).reply("How many?"))
    want = generated(folder, "How many?", DRAWN, seed=3, chat=template)
    assert reply == want and reply


def test_a_later_reply_continues_the_conversation(begin, folder):
    conversation = begin(GREEDY, system="Be brief.")
    said = [{"role": "system", "content": "Be brief."}]
    for text in ("How many?", "And red?"):
        said.append({"role": "user", "content": text})
        prompt = tokenizers.load(folder).render_chat(said, enable_thinking=False)
        reply = "".join(conversation.reply(text))
        assert reply == generated(folder, prompt, GREEDY)
        said.append({"role": "assistant", "content": reply})


def test_a_conversation_that_is_forgotten_begins_again(begin):
    conversation = begin(GREEDY)
    first = "".join(conversation.reply("How many?"))
    "".join(conversation.reply("And red?"))
    conversation.forget()
    assert "".join(conversation.reply("How many?")) == first


def test_a_conversation_without_room_is_refused_and_goes_on_after_new(begin):
    conversation = begin(GREEDY, max_length=48)
    first = "".join(conversation.reply("Red?"))
    with pytest.raises(ValueError, match="more than 48; start another with /new"):
        "".join(conversation.reply("How many apples are in the box?"))
    conversation.forget()
    assert "".join(conversation.reply("Red?")) == first


def piped(words, text, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    return cli.main(["chat", *words, "--max-tokens", str(TOKENS)])


def test_piped_lines_are_answered_one_by_one(begin, folder, monkeypatch, capsys):
    conversation = begin(GREEDY)
    first, second = ("".join(conversation.reply(text)) for text in ("How many?", "And red?"))
    text = "How many?\n\nAnd red?\n/new\nHow many?\n/quit\nno more\n"
    assert piped([folder, "--temperature", "0"], text, monkeypatch) == 0
    assert capsys.readouterr().out == f"{first}\n{second}\n{first}\n"


@pytest.mark.slow
def test_a_run_is_talked_to_by_its_experiment(tmp_path, monkeypatch, capsys):
    """The same reply as from the folder that convert writes."""
    run = ["--workdir", str(tmp_path / "run")]
    file = hosts_experiment.__file__
    words = "--steps 1 --warmup.steps 0 --eval.every 0 --constraint.tolerance 1".split()
    assert cli.main(["train", file, *run, *words]) == 0
    out = str(tmp_path / "out")
    assert cli.main(["convert", file, out, *run]) == 0
    capsys.readouterr()
    plain = ["--no-chat", "--max-length", "32"]
    assert piped([file, *run, *plain], "1+2\n", monkeypatch) == 0
    of_run = capsys.readouterr().out
    assert piped([out, *plain], "1+2\n", monkeypatch) == 0
    assert of_run == capsys.readouterr().out and of_run.strip()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--max-tokens", "0"], "--max-tokens must be at least 1"),
        (["--system", "Hi", "--no-chat"], "--system needs the chat template"),
        (["--workdir", "runs/x"], "--workdir is for a run; give its experiment file"),
        (["--weights", "int5"], "--weights='int5' is not one of"),
        (["--steps", "5"], "unknown option --steps"),
    ],
)
def test_bad_options_are_refused(words, message, folder, capsys):
    assert cli.main(["chat", folder, *words]) == 2
    assert message in capsys.readouterr().err


def test_a_model_without_a_template_is_refused_with_the_remedy(tmp_path, capsys):
    weights.save(tmp_path / "model", TINY, random_params(TINY))
    tokenizers.save(tokenizers.CharacterTokenizer("abc"), tmp_path / "model")
    assert cli.main(["chat", str(tmp_path / "model")]) == 2
    assert "has no chat template; set data.chat=False (here: --no-chat)" in capsys.readouterr().err


def test_a_folder_of_a_run_is_refused_with_the_remedy(tmp_path, capsys):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.json").write_text("{}")
    assert cli.main(["chat", str(tmp_path)]) == 2
    assert "is the folder of a run; give its experiment file, with --workdir" in (
        capsys.readouterr().err
    )
    assert pathlib.Path(tmp_path / "config.json").read_text() == "{}"
