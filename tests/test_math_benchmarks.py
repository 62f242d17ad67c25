"""`dcmdp eval`: a sample depends on nothing but what it should, a resumed evaluation equals an
uninterrupted one, and bad input is refused in a sentence.
"""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from dcmdp_jax import buckets, cli
from dcmdp_jax.answers import judge
from dcmdp_jax.config import ModelSource, Precision
from dcmdp_jax.evaluation import math_benchmarks
from dcmdp_jax.models import weights
from dcmdp_jax.models.model_config import Compute, ModelConfig
from dcmdp_jax.records import Sampling
from dcmdp_jax.run import staging
from dcmdp_jax.stopping import Interrupted
from dcmdp_jax.tokens import tokenizer
from support import gcs_server, own_data
from support.random_params import random_params

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
    first = [{"problem": question, "answer": answer} for question, answer in PROBLEMS]
    second = [
        {"question": question, "solution": rf"so \boxed{{{answer}}}"}
        for question, answer in PROBLEMS[:3]
    ]
    (path / "aime24.jsonl").write_text("".join(json.dumps(row) + "\n" for row in first))
    (path / "minerva_math.jsonl").write_text("".join(json.dumps(row) + "\n" for row in second))
    return path


@pytest.fixture(scope="module")
def options(folder, sets):
    return math_benchmarks.Options(
        ModelSource(str(folder)),
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
def finished(options, tmp_path_factory):
    """An uninterrupted evaluation's folder and figures."""
    workdir = tmp_path_factory.mktemp("finished")
    return workdir, evaluate(options, workdir)


def assert_same_files(workdir, other):
    for name in ("aime24.jsonl", "minerva.jsonl", "summary.json", "options.json"):
        assert (workdir / name).read_bytes() == (other / name).read_bytes(), name


def read_samples(workdir):
    return [json.loads(line) for line in (workdir / "aime24.jsonl").read_text().splitlines()]


# What a work folder holds


def test_the_file_holds_a_line_a_sample_in_order(finished):
    keys = [(sample["problem"], sample["sample"]) for sample in read_samples(finished[0])]
    assert keys == [(i, j) for i in range(5) for j in range(3)]


def test_a_sample_has_its_problems_answer(finished):
    answers = [sample["gold"] for sample in read_samples(finished[0])[::3]]
    assert answers == [answer for _, answer in PROBLEMS]


def test_samples_differ(finished):
    assert len({sample["text"] for sample in read_samples(finished[0])}) > 5


def test_a_sample_that_did_not_stop_has_as_many_tokens_as_may_be(finished):
    """A token is a character."""
    for sample in read_samples(finished[0]):
        assert sample["tokens"] == len(sample["text"])
        assert sample["tokens"] < 12 if sample["stopped"] else sample["tokens"] == 12


def test_figures_count_samples(finished):
    workdir, figures = finished
    assert [figures[name]["samples"] for name in ("aime24", "minerva")] == [3, 2]
    cut_off = np.mean([not sample["stopped"] for sample in read_samples(workdir)])
    assert figures["aime24"]["truncated"].value == pytest.approx(cut_off)


# What a sample depends on


@pytest.mark.parametrize("kept, tail", [(0, ""), (1, ""), (7, '{"set": "aime24", "prob'), (15, "")])
def test_resumed_is_uninterrupted(options, finished, tmp_path, kept, tail):
    """A run that was killed leaves samples in any order, and a line that was cut short."""
    lines = (finished[0] / "aime24.jsonl").read_text().splitlines(keepends=True)
    order = np.random.default_rng(kept).permutation(len(lines))[:kept]
    shutil.copy(finished[0] / "options.json", tmp_path)
    (tmp_path / "aime24.jsonl").write_text("".join(lines[i] for i in order) + tail)
    evaluate(dataclasses.replace(options, slots=3), tmp_path)
    assert_same_files(tmp_path, finished[0])


def test_over_two_devices_the_samples_are_those_of_one(options, finished, tmp_path):
    evaluate(dataclasses.replace(options, tensor=2), tmp_path)
    assert_same_files(tmp_path, finished[0])


def test_other_precisions_sample_otherwise(options, finished, tmp_path):
    rough = dataclasses.replace(
        options,
        model=dataclasses.replace(options.model, compute=Compute(bfloat16=True)),
        precision=Precision(weights="int8", cache="int8"),
        sets=("aime24",),
        k=(3,),
    )
    evaluate(rough, tmp_path)
    assert read_samples(tmp_path) != read_samples(finished[0])


def test_a_stop_keeps_what_has_finished(options, finished, tmp_path):
    polls = iter(range(100))
    evaluation = math_benchmarks.prepare(options, tmp_path)
    with pytest.raises(Interrupted):
        # two problems a rollout
        math_benchmarks.run(evaluation, lambda: next(polls) > 1, max_positions=12 * 6)
    assert 0 < len(read_samples(tmp_path)) < 15
    evaluate(options, tmp_path)
    assert_same_files(tmp_path, finished[0])


def test_an_evaluation_in_a_bucket_goes_on_in_another_process(options, finished, monkeypatch):
    polls = iter(range(100))
    with gcs_server.stand_in():
        monkeypatch.setattr(staging, "_staged", {})
        evaluation = math_benchmarks.prepare(options, staging.folder("gs://own/eval"))
        with pytest.raises(Interrupted):
            math_benchmarks.run(evaluation, lambda: next(polls) > 1, max_positions=12 * 6)
        staging.upload_all()
        monkeypatch.setattr(staging, "_staged", {})
        folder = staging.folder("gs://own/eval")
        assert 0 < len(read_samples(folder)) < 15
        assert evaluate(options, folder) == finished[1]
        assert_same_files(folder, finished[0])
        names = set(buckets.listing(buckets.parse("gs://own/eval")))
        assert names == {"aime24.jsonl", "minerva.jsonl", "options.json", "summary.json"}


def test_an_evaluation_whose_folder_was_taken_over_says_so(options, monkeypatch):
    with gcs_server.stand_in():
        monkeypatch.setattr(staging, "_staged", {})
        evaluation = math_benchmarks.prepare(options, staging.folder("gs://own/eval"))
        evaluation.lock.lost = True
        with pytest.raises(OSError, match="taken over"):
            math_benchmarks.run(evaluation)
        assert "summary.json" not in buckets.listing(buckets.parse("gs://own/eval"))


def test_a_set_may_be_added(options, finished, tmp_path):
    evaluate(dataclasses.replace(options, sets=("minerva",), k=(2,)), tmp_path)
    evaluate(options, tmp_path)
    before, after = (
        json.loads((folder / "summary.json").read_text()) for folder in (finished[0], tmp_path)
    )
    assert after == before


def test_a_finished_evaluation_starts_no_engine(options, finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "out")
    assert evaluate(options, tmp_path / "out", start=None) == finished[1]


# What a work folder refuses


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
    ],
)
def test_a_folder_made_with_other_options_is_refused_with_their_names(
    options, finished, change, named
):
    before = (finished[0] / "options.json").read_bytes()
    message = f"was made with another .*{named}.*; give another --workdir, or the options"
    with pytest.raises(ValueError, match=message):
        math_benchmarks.prepare(dataclasses.replace(options, **change), finished[0])
    assert (finished[0] / "options.json").read_bytes() == before


def with_model(options, **change):
    return dataclasses.replace(options, model=dataclasses.replace(options.model, **change))


def test_a_folder_made_in_another_precision_of_the_model_is_refused(options, finished):
    with pytest.raises(ValueError, match="was made with another --bfloat16"):
        math_benchmarks.prepare(with_model(options, compute=Compute(bfloat16=True)), finished[0])


def test_a_folder_made_with_other_weights_is_refused(options, finished, tmp_path):
    weights.save(tmp_path / "hf", MODEL, random_params(MODEL, 0.31, norms=1.0))
    tokenizer.save(TEXT, tmp_path / "hf")
    with pytest.raises(ValueError, match=r"made with another --model \("):
        math_benchmarks.prepare(with_model(options, folder=str(tmp_path / "hf")), finished[0])


def test_a_folder_made_with_other_problems_is_refused(options, finished, sets, tmp_path):
    shutil.copytree(sets, tmp_path / "sets")
    text = (sets / "aime24.jsonl").read_text()
    (tmp_path / "sets" / "aime24.jsonl").write_text(text.replace('"7"', '"8"'))
    other = dataclasses.replace(options, data_dir=str(tmp_path / "sets"))
    with pytest.raises(ValueError, match=r"made with another --data-dir \(.*aime24\)"):
        math_benchmarks.prepare(other, finished[0])


def test_the_same_weights_and_problems_may_have_moved(options, finished, folder, sets, tmp_path):
    shutil.copytree(folder, tmp_path / "hf")
    shutil.copytree(sets, tmp_path / "sets")
    moved = dataclasses.replace(
        with_model(options, folder=str(tmp_path / "hf")), data_dir=str(tmp_path / "sets")
    )
    assert math_benchmarks.prepare(moved, finished[0]).sets


@pytest.mark.parametrize("name", ["options.json", "summary.json"])
@pytest.mark.parametrize(
    "content, fault",
    [
        (b"{", "is not valid JSON"),
        (b"[" * 10**5, "nested too deeply"),
        (b"[]", "holds a list"),
        (b"\xff", "is not valid JSON"),
    ],
)
def test_a_damaged_record_is_named_before_anything_is_sampled(
    options, finished, tmp_path, name, content, fault
):
    out = shutil.copytree(finished[0], tmp_path / "out")
    (out / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name} .*{fault}.*; move it away") as error:
        math_benchmarks.prepare(options, out)
    assert "\n" not in str(error.value)


def test_a_damaged_file_of_samples_is_named_before_anything_is_sampled(options, finished, tmp_path):
    out = shutil.copytree(finished[0], tmp_path / "out")
    with (out / "aime24.jsonl").open("a") as file:
        file.write("no json\n")
    with pytest.raises(ValueError, match="line 16 of .*aime24.jsonl is no sample"):
        math_benchmarks.prepare(options, out)


def test_samples_of_unknown_origin_are_left_alone(options, finished, tmp_path):
    shutil.copy(finished[0] / "aime24.jsonl", tmp_path)
    with pytest.raises(ValueError, match="aime24.jsonl is there but .*options.json is not"):
        math_benchmarks.prepare(options, tmp_path)


def add_to_record(workdir, **options):
    path = workdir / "options.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **options}))


def test_a_folder_with_an_unknown_option_that_was_not_set_goes_on(options, finished, tmp_path):
    out = shutil.copytree(finished[0], tmp_path / "out")
    add_to_record(out, math_verify=False)
    assert evaluate(options, out) == finished[1]
    assert_same_files(out, finished[0])


def test_a_folder_with_an_unknown_option_that_was_set_is_refused(options, finished, tmp_path):
    out = shutil.copytree(finished[0], tmp_path / "out")
    add_to_record(out, math_verify=True)
    message = "made with math_verify, which is not known here; give another"
    with pytest.raises(ValueError, match=message):
        math_benchmarks.prepare(options, out)


# What is refused before a work folder is made


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
            "problem 4 of .*aime24.jsonl has 6 tokens, which with --max-tokens 60 are more than "
            "the model's 64 pos",
        ),
        ({"model": ModelSource("/absent")}, "/absent does not exist"),
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
        math_benchmarks.prepare(with_model(options, folder=str(tmp_path / "empty")), tmp_path / "o")


# Figures of a sampler whose completions are known


def sampler_of(completion):
    """A `start` whose sampler gives `completion(problem, sample)` -> (text, stopped)."""
    questions = [question for question, _ in PROBLEMS]

    def sample(prompts, *, samples, key, should_stop, on_completion):
        for i in range(len(prompts.lengths) * samples):
            problem = questions.index(prompts.examples[i // samples].prompt)
            text, stopped = completion(problem, i % samples)
            on_completion(i, np.array(TEXT.encode(text)), stopped)

    return lambda evaluation: sample


@pytest.fixture(scope="module")
def known_figures(options, tmp_path_factory):
    """Of four samples of problem i the first i are right, in different spellings; the first sample
    of each is cut off.
    """
    right = [[], ["6"], ["1/2", "2/4"], ["7", "07", "14/2"], ["2/3", "4/6", "6/9", "20/30"]]
    start = sampler_of(
        lambda problem, sample: (
            rf"\boxed{{{right[problem][sample] if sample < problem else 40 + sample}}}",
            sample > 0,
        )
    )
    workdir = tmp_path_factory.mktemp("known")
    return evaluate(dataclasses.replace(options, sets=("aime24",), k=(4,)), workdir, start=start)[
        "aime24"
    ]


@pytest.mark.parametrize(
    "name, expected",
    [
        ("avg@4", (0 + 1 + 2 + 3 + 4) / 20),
        ("completed@4", (0 + 0 + 1 + 2 + 3) / 20),
        ("pass@1", 10 / 20),
        ("pass@2", (0 + 1 / 2 + 5 / 6 + 1 + 1) / 5),
        ("pass@4", 4 / 5),
        # the wrong ones of a problem are all different
        ("majority@4", (0 + 1 / 4 + 1 + 1 + 1) / 5),
        ("truncated", 1 / 4),
        ("answered", 1.0),
    ],
)
def test_a_sampler_with_known_completions_gives_the_closed_forms(known_figures, name, expected):
    assert known_figures[name].value == pytest.approx(expected)


def test_a_comparison_that_is_given_up_is_logged(options, tmp_path, monkeypatch):
    class Slow(judge.Pool):
        def _compared(self, gold, answer):
            self.given_up += 1
            return False

    slow = Slow()
    monkeypatch.setattr(judge, "library", lambda: slow)
    monkeypatch.setattr(judge, "compare", lambda gold, answer: judge.Verdict.UNREADABLE)
    start = sampler_of(lambda problem, sample: (rf"\boxed{{{40 + 2 * problem + sample}}}", True))
    lines = []
    figures = evaluate(
        dataclasses.replace(options, sets=("aime24",), k=(2,)),
        tmp_path,
        log=lines.append,
        start=start,
    )
    assert figures["aime24"]["avg@2"].value == 0
    assert lines[-1].startswith("5 comparisons took longer than 2 s")


# The command


def arguments(options):
    return [
        "eval",
        *("--model", options.model.folder),
        *("--data-dir", options.data_dir),
        *("--sets", "aime24,minerva"),
        *("--k", "3,2"),
        *("--max-tokens", "12"),
        *("--temperature", "0.9"),
        *("--seed", "5"),
        *("--slots", "4"),
        *("--instruction", ""),
        "--no-chat",
    ]


def test_the_command_prints_a_table(options, finished, capsys):
    assert cli.main([*arguments(options), "--workdir", str(finished[0])]) == 0
    table = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in table] == ["set", "aime24", "minerva", "wrote"]


@pytest.mark.parametrize(
    "more, named",
    [
        (["--k", "3,x"], "--k 3,x must be integers"),
        (["--top-p", "0"], "--top-p lies in"),
        (["--seeds", "1"], "unknown option --seeds"),
        (["--model", "/absent"], "/absent does not exist"),
    ],
)
def test_the_command_refuses_in_one_sentence(options, tmp_path, capsys, more, named):
    assert cli.main([*arguments(options), "--workdir", str(tmp_path), *more]) == 2
    error = capsys.readouterr().err
    assert named in error and error.count("\n") == 1


# The published sets


@pytest.fixture(scope="module")
def published_options(tmp_path_factory, chat_folder, data_root):
    """A random model with Qwen3's tokenizer, and all six sets."""
    folder = tmp_path_factory.mktemp("published") / "hf"
    model = dataclasses.replace(
        MODEL, vocab_size=151_936, max_position=40_960, tie_word_embeddings=True
    )
    weights.save(folder, model, random_params(model, 0.05))
    for name in ("tokenizer.json", "chat_template.jinja"):
        shutil.copyfile(chat_folder / name, folder / name)
    return math_benchmarks.Options(ModelSource(str(folder)), str(data_root / "math_eval"))


@pytest.fixture(scope="module")
def published(published_options, tmp_path_factory):
    return math_benchmarks.prepare(published_options, tmp_path_factory.mktemp("paper"))


def test_the_samples_of_the_six_sets_are_the_papers(published):
    assert {item.name: item.samples for item in published.sets} == {
        "aime24": 32,
        "aime25": 32,
        "amc23": 32,
        "math500": 4,
        "minerva": 4,
        "olympiad": 4,
    }


def test_every_problem_of_the_six_sets_is_read(published, data_root):
    counts = [30, 30, 40, 500, 272, 675] if data_root == own_data.SHARED else [12] * 6
    assert [len(item.prompts.lengths) for item in published.sets] == counts


def test_a_prompt_of_the_six_sets_is_a_chat_with_the_instruction(published, data_root):
    prompts = published.sets[0].prompts
    first = published.tokenizer.decode(prompts.tokens[0, : prompts.lengths[0]].tolist())
    question = "Every morning Aya" if data_root == own_data.SHARED else "A hall has"
    assert first.startswith(f"<|im_start|>user\n{question}")
    assert math_benchmarks.INSTRUCTION in first


def test_a_random_model_solves_nothing(published_options, tmp_path):
    short = dataclasses.replace(published_options, k=(2,), limit=1, max_tokens=4, slots=2)
    figures = evaluate(short, tmp_path)
    assert list(figures) == list(math_benchmarks.BENCHMARKS)
    for figure in figures.values():
        for name in ("avg@2", "pass@2", "majority@2", "completed@2"):
            assert figure[name][:2] == (0, 0) and figure[name].high < 1
