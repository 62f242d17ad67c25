"""`dcmdp eval`: real sets and a real engine give sane zeros, a rigged sampler the closed forms;
resumed is uninterrupted.
"""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from dcmdp_jax import cli, data, rewards, tokenizer
from dcmdp_jax.answers import judge
from dcmdp_jax.config import ModelConfig, Precision
from dcmdp_jax.evaluation import math_benchmarks
from dcmdp_jax.intervals import Interval
from dcmdp_jax.models import weights
from dcmdp_jax.records import Prompts, Sampling
from dcmdp_jax.stopping import Interrupted
from support import own_data
from support.random_params import random_params
from support.rollouts import make_rollout

pytestmark = pytest.mark.full

TEXT = tokenizer.CharacterTokenizer("0123456789\\boxed{}+-*/= ?")
MODEL = ModelConfig(
    vocab_size=32,
    hidden_size=32,
    intermediate_size=48,
    num_layers=1,
    num_heads=2,
    num_kv_heads=2,
    head_dim=16,
    max_position=64,
)
PROBLEMS = [("1+1=?", "2"), ("2*3=?", "6"), ("1/2=?", "1/2"), ("10-3=?", "7"), ("4/6=?", "2/3")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "hf"
    weights.save(path, MODEL, random_params(MODEL, 0.3, norms=1.0))
    tokenizer.save(TEXT, path)
    return path


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Two sets in two layouts."""
    path = tmp_path_factory.mktemp("sets")
    (path / "aime24.jsonl").write_text(
        "".join(json.dumps({"problem": q, "answer": a}) + "\n" for q, a in PROBLEMS)
    )
    (path / "minerva_math.jsonl").write_text(
        "".join(
            json.dumps({"question": q, "solution": rf"so \boxed{{{a}}}"}) + "\n"
            for q, a in PROBLEMS[:3]
        )
    )
    return path


@pytest.fixture
def options(folder, sets):
    return math_benchmarks.Options(
        str(folder),
        str(sets),
        sets=("aime24", "minerva"),
        k=(3, 2),
        max_tokens=12,
        sampling=Sampling(0.9),
        slots=4,
        seed=5,
        chat=False,
        instruction="",
    )


def evaluate(options, workdir, **how):
    return math_benchmarks.run(math_benchmarks.prepare(options, workdir), **how)


@pytest.fixture(scope="module")
def whole(folder, sets, tmp_path_factory):
    """An uninterrupted evaluation's folder and figures."""
    workdir = tmp_path_factory.mktemp("whole")
    options = math_benchmarks.Options(
        str(folder),
        str(sets),
        sets=("aime24", "minerva"),
        k=(3, 2),
        max_tokens=12,
        sampling=Sampling(0.9),
        slots=4,
        seed=5,
        chat=False,
        instruction="",
    )
    return workdir, evaluate(options, workdir)


def same(workdir, whole):
    for name in ("aime24.jsonl", "minerva.jsonl", "summary.json", "options.json"):
        assert (workdir / name).read_bytes() == (whole / name).read_bytes(), name


def test_one_line_a_sample(whole):
    workdir, figures = whole
    lines = [json.loads(line) for line in (workdir / "aime24.jsonl").read_text().splitlines()]
    assert [(line["problem"], line["sample"]) for line in lines] == [
        (i, j) for i in range(5) for j in range(3)
    ]
    assert [line["gold"] for line in lines[::3]] == [answer for _, answer in PROBLEMS]
    assert len({line["text"] for line in lines}) > 5
    for line in lines:
        assert (
            line["tokens"] == len(line["text"]) == 12
            or line["stopped"]
            and line["tokens"] == len(line["text"]) < 12
        )
    assert [figures[name]["samples"] for name in ("aime24", "minerva")] == [3, 2]
    assert figures["aime24"]["truncated"].value == pytest.approx(
        np.mean([not line["stopped"] for line in lines])
    )


@pytest.mark.parametrize("kept, tail", [(0, ""), (1, ""), (7, '{"set": "aime24", "prob'), (15, "")])
def test_resumed_is_uninterrupted(options, whole, tmp_path, kept, tail):
    """A run that was killed leaves samples of any order, and a line that was cut short."""
    lines = (whole[0] / "aime24.jsonl").read_text().splitlines(keepends=True)
    order = np.random.default_rng(kept).permutation(len(lines))[:kept]
    shutil.copy(whole[0] / "options.json", tmp_path)
    (tmp_path / "aime24.jsonl").write_text("".join(lines[i] for i in order) + tail)
    evaluate(dataclasses.replace(options, slots=3), tmp_path)
    same(tmp_path, whole[0])


def test_over_two_devices_the_samples_are_those_of_one(options, whole, tmp_path):
    evaluate(dataclasses.replace(options, tensor=2), tmp_path)
    same(tmp_path, whole[0])


def test_other_precisions_sample_otherwise(options, whole, tmp_path):
    rough = dataclasses.replace(
        options,
        precision=Precision(weights="int8", cache="int8"),
        bfloat16=True,
        sets=("aime24",),
        k=(3,),
    )
    figures = evaluate(rough, tmp_path)
    assert figures["aime24"]["samples"] == 3 and figures != whole[1]
    assert (tmp_path / "aime24.jsonl").read_text() != (whole[0] / "aime24.jsonl").read_text()


def test_a_run_that_is_asked_to_stop_keeps_what_has_ended(options, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(math_benchmarks, "POSITIONS", 12 * 6)  # two problems a rollout
    polls = iter(range(100))
    with pytest.raises(Interrupted):
        evaluate(options, tmp_path, asked=lambda: next(polls) > 1)
    left = (tmp_path / "aime24.jsonl").read_text().splitlines()
    assert 0 < len(left) < 15
    evaluate(options, tmp_path)
    same(tmp_path, whole[0])


def test_a_set_may_be_added_and_a_finished_one_is_not_sampled_again(
    options, whole, tmp_path, monkeypatch
):
    evaluate(dataclasses.replace(options, sets=("minerva",), k=(2,)), tmp_path)
    evaluate(options, tmp_path)
    assert json.loads((tmp_path / "summary.json").read_text()) == json.loads(
        (whole[0] / "summary.json").read_text()
    )
    monkeypatch.setattr(math_benchmarks, "_start", None)
    assert evaluate(options, tmp_path) == whole[1]


@pytest.mark.parametrize(
    "change, named",
    [
        ({"seed": 6}, r"--seed \(5, now 6\)"),
        ({"sampling": Sampling(0.7)}, r"--temperature \(0.9, now 0.7\)"),
        ({"max_tokens": 13}, "--max-tokens"),
        ({"precision": Precision(weights="int8")}, "--weights"),
        ({"k": (3, 4)}, r"--k \(2, now 4, minerva\)"),
        ({"limit": 2}, r"--limit \(5, now 2, aime24\)"),
        ({"enable_thinking": True}, "--enable-thinking"),
        ({"bfloat16": True}, "--bfloat16"),
    ],
)
def test_a_folder_made_with_other_options_is_refused_with_their_names(
    options, whole, change, named
):
    before = (whole[0] / "options.json").read_bytes()
    with pytest.raises(
        ValueError,
        match=f"was made with another .*{named}.*; give another --workdir, or the options",
    ):
        math_benchmarks.prepare(dataclasses.replace(options, **change), whole[0])
    assert (whole[0] / "options.json").read_bytes() == before


def test_other_weights_and_other_problems_are_told_apart(options, whole, folder, sets, tmp_path):
    weights.save(tmp_path / "hf", MODEL, random_params(MODEL, 0.31, norms=1.0))
    tokenizer.save(TEXT, tmp_path / "hf")
    with pytest.raises(ValueError, match=r"made with another --model \("):
        math_benchmarks.prepare(dataclasses.replace(options, folder=str(tmp_path / "hf")), whole[0])
    shutil.copytree(sets, tmp_path / "sets")
    text = (sets / "aime24.jsonl").read_text()
    (tmp_path / "sets" / "aime24.jsonl").write_text(text.replace('"7"', '"8"'))
    with pytest.raises(ValueError, match=r"made with another --data-dir \(.*aime24\)"):
        math_benchmarks.prepare(
            dataclasses.replace(options, data_dir=str(tmp_path / "sets")), whole[0]
        )
    (tmp_path / "sets" / "aime24.jsonl").write_text(text)
    shutil.copytree(folder, tmp_path / "moved")  # the same content elsewhere is the same
    math_benchmarks.prepare(
        dataclasses.replace(
            options, data_dir=str(tmp_path / "sets"), folder=str(tmp_path / "moved")
        ),
        whole[0],
    )


@pytest.mark.parametrize(
    "line",
    [
        "no json",
        '{"set": "aime24"}',
        '{"set": "aime24", "problem": 5, "sample": 0}',
        '{"set": "minerva", "problem": 0, "sample": 0}',
        "[]",
        "[" * 10**5,
        '{"set": "aime24", "problem": 1, "sample": 0, "right": true}',
    ],
)
def test_a_strange_line_is_named_before_anything_is_sampled(options, whole, tmp_path, line):
    shutil.copy(whole[0] / "options.json", tmp_path)
    first = (whole[0] / "aime24.jsonl").read_text().splitlines(keepends=True)[0]
    (tmp_path / "aime24.jsonl").write_text(first + line + "\n")
    with pytest.raises(
        ValueError, match="line 2 of .*aime24.jsonl is no sample of this evaluation"
    ):
        math_benchmarks.prepare(options, tmp_path)
    assert (tmp_path / "aime24.jsonl").read_text() == first + line + "\n"


@pytest.mark.parametrize(
    "change, named",
    [
        (
            {"sets": ("aime24", "aime99")},
            "there is no set 'aime99'; --sets takes names out of aime24,",
        ),
        ({"sets": ("aime24", "aime24")}, "names no set, or one twice"),
        (
            {"sets": ("aime24", "amc23")},
            "set amc23 is not in .*: looked for amc23.jsonl; put the file there",
        ),
        ({"k": (1, 2, 3)}, "--k takes one number for all sets or one for each of the 2, not 3"),
        ({"k": (0,)}, "--k 0 must be"),
        ({"max_tokens": 0}, "--max-tokens 0 must be"),
        ({"slots": 0}, "--slots 0 must be"),
        ({"limit": -1}, "--limit -1 must be"),
        ({"tensor": 99}, "--tensor 99 are more devices"),
        ({"data_dir": "/absent"}, "--data-dir /absent is no folder"),
        (
            {"max_tokens": 60},
            "problem 4 of .*aime24.jsonl has 6 tokens, which with --max-tokens 60 are more than the model's 64 pos",
        ),
        ({"folder": "/absent"}, "/absent does not exist"),
        ({"precision": Precision(weights="int3")}, "int3"),
        ({"chat": True}, "has no chat template"),
    ],
)
def test_what_cannot_work_is_refused_before_a_folder_is_made(options, tmp_path, change, named):
    with pytest.raises(ValueError, match=named):
        math_benchmarks.prepare(dataclasses.replace(options, **change), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_empty_model_folder_is_refused(options, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty"):
        math_benchmarks.prepare(
            dataclasses.replace(options, folder=str(tmp_path / "empty")), tmp_path / "out"
        )


@pytest.mark.parametrize("name", ["options.json", "summary.json"])
@pytest.mark.parametrize(
    "content, fault",
    [
        ("{", "is not valid JSON"),
        ("[" * 10**5, "nested too deeply"),
        ("[]", "holds a list"),
        (b"\xff", "is not valid JSON"),
    ],
)
def test_a_damaged_record_is_named_before_anything_is_sampled(
    options, whole, tmp_path, name, content, fault
):
    out = shutil.copytree(whole[0], tmp_path / "out")
    (out / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=f"{name} .*{fault}.*; move it away") as error:
        math_benchmarks.prepare(options, out)
    assert "\n" not in str(error.value)


def test_samples_of_no_known_origin_are_left_alone(options, whole, tmp_path):
    shutil.copy(whole[0] / "aime24.jsonl", tmp_path)
    with pytest.raises(ValueError, match="aime24.jsonl is there but .*options.json is not"):
        math_benchmarks.prepare(options, tmp_path)


def rig(monkeypatch, say):
    """A sampler that says `say(problem, sample)` -> (text, stopped)."""

    def rollout(engine, policy, prompts, *, samples, key, ended, **rest):
        for i in range(len(prompts.lengths) * samples):
            problem = [example.prompt for example in prompts.examples].index(
                prompts.examples[i // samples].prompt
            )
            text, stopped = say(problem, i % samples)
            ended(i, np.array(TEXT.encode(text)), stopped)

    monkeypatch.setattr(math_benchmarks, "rollout", rollout)
    monkeypatch.setattr(math_benchmarks, "_start", lambda evaluation: (None, None))


def test_a_rigged_sampler_gives_the_closed_forms(options, tmp_path, monkeypatch):
    """Problem i is right in its first i of 4 samples, in another spelling each time; the first
    sample of each is cut off.
    """
    right = [
        ["2", "2/1", "x=2", "4/2"],
        ["6", "6.0", "12/2", "06"],
        ["1/2", ".5", "2/4", "0.5"],
        ["7", "7.0", "07", "14/2"],
        ["2/3", "4/6", "6/9", "20/30"],
    ]
    monkeypatch.setattr(TEXT, "_ids", TEXT._ids | {".": 31})
    rig(
        monkeypatch,
        lambda problem, sample: (
            rf"\boxed{{{right[problem][sample] if sample < problem else 40 + sample}}}",
            sample > 0,
        ),
    )
    figures = evaluate(dataclasses.replace(options, sets=("aime24",), k=(4,)), tmp_path)["aime24"]
    # the decoder spells "." as U+FFFD, so that the answers with a point are the wrong ones of
    # problems 1 to 4
    texts = [json.loads(line) for line in (tmp_path / "aime24.jsonl").read_text().splitlines()]
    counts = [sum(line["right"] for line in texts if line["problem"] == i) for i in range(5)]
    whole = [[answer for answer in right[i][:i] if "." not in answer] for i in range(5)]
    assert counts == [len(answers) for answers in whole] == [0, 1, 1, 2, 4]
    assert figures["avg@4"].value == pytest.approx(8 / 20)
    # the cut sample of problems 1 to 4 is right
    assert figures["completed@4"].value == pytest.approx((8 - 4) / 20)
    assert figures["pass@1"].value == pytest.approx(8 / 20)
    assert figures["pass@2"].value == pytest.approx((0 + 1 / 2 + 1 / 2 + 5 / 6 + 1) / 5)
    assert figures["pass@4"].value == pytest.approx(4 / 5)
    assert figures["majority@4"].value == pytest.approx((0 + 1 / 4 + 1 / 4 + 1 + 1) / 5)
    assert figures["truncated"].value == figures["truncated"].low == 1 / 4
    assert figures["answered"].value == 1


def test_a_comparison_that_is_given_up_is_told(options, tmp_path, monkeypatch):
    rig(monkeypatch, lambda problem, sample: (rf"\boxed{{{40 + 2 * problem + sample}}}", True))

    class Slow(judge.Pool):
        def _compared(self, gold, answer):
            self.given_up += 1
            return False

    slow = Slow()
    monkeypatch.setattr(judge, "library", lambda: slow)
    monkeypatch.setattr(judge, "compare", lambda gold, answer: judge.Verdict.UNREADABLE)
    said = []
    figures = evaluate(
        dataclasses.replace(options, sets=("aime24",), k=(2,)), tmp_path, say=said.append
    )
    assert figures["aime24"]["avg@2"].value == 0 and said[-1].startswith(
        "5 comparisons took longer than 2 s"
    )


COMPLETIONS = [
    "Guess \\boxed{3}, no.\n#### 2",
    r"<think>\boxed{2}</think> I do not know.",
    "<think>7</think>\n**Answer:** 2",
    r"\boxed{\textbf{2}}",
    r"\boxed{1+1}",
    r"So \boxed{1} and \boxed{2}.",
    r"\fbox{2}",
    r"\boxed{2\text{ pens}}",
    r"\boxed{\sqrt{4}}",
    "no answer",
]


def test_a_completion_is_right_exactly_where_training_pays_for_it(sets):
    examples = data.read(sets / "aime24.jsonl")
    prompts = Prompts(np.zeros((5, 1)), np.ones(5), tuple(examples))
    item = math_benchmarks.EvalSet("aime24", prompts, 1, sets / "unused")
    for place, example in enumerate(examples):
        for text in (completion.replace("2", example.answer) for completion in COMPLETIONS):
            line = math_benchmarks._judged(item, (place, 0), text, 9, True)
            rollout = make_rollout(
                prompts._replace(examples=(example,)),
                np.zeros((1, 9), np.int32),
                [9],
                np.zeros((1, 9)),
                [True],
            )
            paid = rewards.score(rollout, lambda ids: text, rewards.math_answer).reward[0]
            assert line["right"] is bool(paid == 1.0)
            assert line["answer"] == rewards.final_answer(text)
    assert [
        math_benchmarks._judged(item, (0, 0), text, 9, True)["right"] for text in COMPLETIONS
    ] == [True, False, True, True, False, False, True, True, False, False]


def test_a_cut_off_completion_counts_in_an_evaluation_and_earns_nothing_in_training(sets):
    example = data.read(sets / "aime24.jsonl")[0]
    prompts = Prompts(np.zeros((1, 1)), np.ones(1), (example,))
    text = rf"\boxed{{{example.answer}}} and so"
    item = math_benchmarks.EvalSet("aime24", prompts, 1, sets / "unused")
    for stopped, paid in ((True, 1.0), (False, 0.0)):
        line = math_benchmarks._judged(item, (0, 0), text, 9, stopped)
        assert (line["right"], line["stopped"]) == (True, stopped)
        rollout = make_rollout(
            prompts, np.zeros((1, 9), np.int32), [9], np.zeros((1, 9)), [stopped]
        )
        assert rewards.score(rollout, lambda ids: text, rewards.math_answer).reward[0] == paid


def test_a_folder_of_a_version_with_another_option_goes_on_where_it_was_not_set(
    options, whole, tmp_path
):
    shutil.copytree(whole[0], tmp_path / "out")
    path = tmp_path / "out" / "options.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "math_verify": False}))
    assert evaluate(options, tmp_path / "out") == whole[1]
    assert json.loads(path.read_text()) == record
    path.write_text(json.dumps({**record, "math_verify": True}))
    with pytest.raises(
        ValueError, match="made with math_verify, which is not known here; give another"
    ):
        math_benchmarks.prepare(options, tmp_path / "out")


def test_the_command_prints_a_table_and_refuses_in_one_sentence(options, whole, capsys, tmp_path):
    given = [
        "eval",
        "--model",
        options.folder,
        "--data-dir",
        options.data_dir,
        "--sets",
        "aime24,minerva",
        "--k",
        "3,2",
        "--max-tokens",
        "12",
        "--temperature",
        "0.9",
        "--seed",
        "5",
        "--no-chat",
        "--instruction",
        "",
        "--slots",
        "4",
    ]
    assert cli.main([*given, "--workdir", str(whole[0])]) == 0
    table = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in table] == ["set", "aime24", "minerva", "wrote"]
    for more, named in (
        (["--k", "3,x"], "--k 3,x must be integers"),
        (["--top-p", "0"], "--top-p lies in"),
        (["--seeds", "1"], "unknown option --seeds"),
        (["--model", str(tmp_path)], "config.json"),
    ):
        assert cli.main([*given, "--workdir", str(tmp_path), *more]) == 2
        error = capsys.readouterr().err
        assert named in error and error.count("\n") == 1


def test_the_six_sets_with_a_random_model(tmp_path, chat_folder, data_root):
    """Qwen3's vocabulary; every problem is read and tokenized, the first of each is asked."""
    model = dataclasses.replace(
        MODEL, vocab_size=151_936, max_position=40_960, tie_word_embeddings=True
    )
    weights.save(tmp_path / "hf", model, random_params(model, 0.05))
    for name in ("tokenizer.json", "chat_template.jinja"):
        shutil.copyfile(chat_folder / name, tmp_path / "hf" / name)
    asked = math_benchmarks.Options(str(tmp_path / "hf"), str(data_root / "math_eval"))
    found = math_benchmarks.prepare(asked, tmp_path / "paper")
    published = data_root == own_data.SHARED
    assert [(item.name, item.samples) for item in found.sets] == [
        ("aime24", 32),
        ("aime25", 32),
        ("amc23", 32),
        ("math500", 4),
        ("minerva", 4),
        ("olympiad", 4),
    ]
    counts = [30, 30, 40, 500, 272, 675] if published else [12] * 6
    assert [len(item.prompts.lengths) for item in found.sets] == counts
    first = found.tokenizer.decode(
        found.sets[0].prompts.tokens[0, : found.sets[0].prompts.lengths[0]].tolist()
    )
    asks = "Every morning Aya" if published else "A hall has"
    assert first.startswith(f"<|im_start|>user\n{asks}") and math_benchmarks.INSTRUCTION in first
    figures = evaluate(
        dataclasses.replace(asked, k=(2,), limit=1, max_tokens=4, slots=2), tmp_path / "out"
    )
    assert list(figures) == list(math_benchmarks.BENCHMARKS)
    for of in figures.values():
        assert all(
            of[name][:2] == (0, 0) and of[name].high < 1
            for name in ("avg@2", "pass@2", "majority@2", "completed@2")
        )
        assert of["tokens_max"] == 4 and isinstance(of["truncated"], Interval)
