"""`dcmdp doctor`: verdict, figures and page of files with and without a mistake."""

import csv
import json
import pathlib
import re

import numpy as np
import pytest

from dcmdp_jax import cli
from dcmdp_jax.models import weights
from dcmdp_jax.records import Sampling
from dcmdp_jax.rollout import log_prob_scorer
from dcmdp_jax.tokens import tokenizer
from dcmdp_jax.tools import doctor, doctor_page, rollout_records
from dcmdp_jax.tools.rollout_records import Record
from support import own_data
from support.engines import DENSE, G, make_params, sample
from support.pages import Page

pytestmark = pytest.mark.full

TOKENIZER = tokenizer.CharacterTokenizer("".join(chr(ord("A") + i) for i in range(35)))
SETTINGS = Sampling(0.7)
REPOSITORY = pathlib.Path(__file__).parents[1]
QWEN = own_data.SHARED / "qwen3_tokenizer"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model's folder, with its tokenizer."""
    path = tmp_path_factory.mktemp("model") / "hf"
    weights.save(path, DENSE, make_params(DENSE))
    tokenizer.save(TOKENIZER, path)
    return str(path)


@pytest.fixture(scope="module")
def model(folder):
    return doctor.load(folder)


@pytest.fixture(scope="module")
def records():
    """What an int8 engine sampled at temperature 0.7."""
    out = sample(DENSE, "int8", temperature=0.7)
    return [
        Record(
            out.prompts.tokens[i // G, : out.prompts.lengths[i // G]].tolist(),
            row[:n].tolist(),
            logp[:n].tolist(),
            None,
        )
        for i, (row, logp, n) in enumerate(zip(out.tokens, out.rollout_logp, out.lengths))
    ]


def reported(records, sampling):
    """The records with the log-probs of another distribution, as an exact engine reports them."""
    score = log_prob_scorer.scorer(make_params(DENSE), DENSE)
    tokens = [record.tokens for record in records]
    (flat,) = score([r.prompt for r in records], tokens, log_prob_scorer.fields([sampling]))
    rows = np.split(flat, np.cumsum([len(row) for row in tokens])[:-1])
    return [r._replace(logp=row.tolist()) for r, row in zip(records, rows, strict=True)]


@pytest.fixture
def run(folder, tmp_path, capsys):
    """Runs the command on records and returns its status, output, and page."""

    def command(records, *options, sampling=None):
        file = tmp_path / "rollouts.jsonl"
        rollout_records.write(file, records, sampling or {})
        page = tmp_path / "doctor.html"
        words = ["doctor", str(file), "--model", folder, "--output", str(page), *options]
        status = cli.main(words)
        return status, capsys.readouterr(), page.read_text() if page.exists() else ""

    return command


@pytest.mark.skipif(not QWEN.is_dir(), reason="the Qwen3 tokenizer is not there")
def test_prompts_that_an_engine_makes_of_the_text():
    qwen = tokenizer.load(QWEN)
    prompts = doctor.other_prompts(qwen)
    split = [i for character in "What is 7 + 4?" for i in qwen.encode(character)]
    assert prompts["its text was tokenized again"](split) == qwen.encode("What is 7 + 4?")
    message = {"role": "user", "content": "What is 7 + 4?"}
    wrapped = qwen.encode_chat([message], enable_thinking=True)
    off = qwen.encode_chat([message], enable_thinking=False)
    assert prompts["it was put into the chat template"](split) == wrapped
    assert prompts["it was put into the chat template, thinking off"](split) == off
    toggled = prompts["thinking is on in one and off in the other (enable_thinking)"]
    assert toggled(wrapped) == off
    assert toggled(off) == wrapped


def test_figures_of_a_gap_by_their_definitions(model, records):
    figures = doctor.examine(model, records, SETTINGS, SETTINGS).stated
    train = np.concatenate([r.logp for r in reported(records, SETTINGS)])
    engine = np.concatenate([r.logp for r in records])
    delta = np.abs(np.exp(train) - np.exp(engine))
    everything = figures.by_context["all"]
    assert everything.tokens == len(train)
    assert everything.delta == pytest.approx(delta.mean(), rel=1e-3)
    assert everything.logp_diff_mean == pytest.approx(np.abs(train - engine).mean(), rel=1e-3)
    assert float(figures.calibration.floor) == pytest.approx(delta.mean(), rel=1e-3)
    unlikely = np.exp(engine) < 0.1
    assert figures.by_probability["< 0.1"].tokens == unlikely.sum()
    assert figures.by_probability["< 0.1"].delta == pytest.approx(delta[unlikely].mean(), rel=1e-3)
    worst = figures.gaps["worst"][0]
    assert worst["delta"] == pytest.approx(delta.max(), rel=1e-3)


def test_corrections_are_shares_of_tokens_and_completions(model, records):
    """The first token of each completion has the ratio e, above all bounds but IcePop's."""
    exact = reported(records, SETTINGS)
    changed = [r._replace(logp=[r.logp[0] - 1.0, *r.logp[1:]]) for r in exact]
    figures = doctor.examine(model, changed, SETTINGS, SETTINGS).stated
    share = len(changed) / sum(len(r.tokens) for r in changed)
    tis, mis, icepop, sequence, geometric = figures.corrected
    assert tis == mis == pytest.approx(share)
    assert icepop == 0.0
    assert sequence == 0.0
    assert geometric == 1.0


def test_a_numerical_gap_ends_with_status_0(run, records):
    status, output, page = run(records, sampling={"temperature": 0.7})
    assert status == 0
    assert output.out.startswith("Verdict: as stated\n")
    assert "calls for a tolerance of" in output.out
    assert "once that is fixed" not in output.out
    assert "Verdict: as stated" in Page(page).text


def test_a_mistake_ends_with_status_1_and_shows_the_gap_without_it(run, records):
    status, output, page = run(reported(records, Sampling()), "--temperature", "0.7")
    assert status == 1
    assert output.out.startswith("Verdict: raw log-probs\n")
    assert "Remedy: have the engine report processed log-probs" in output.out
    (total,) = (line.split() for line in output.out.splitlines() if line.startswith("all "))
    assert float(total[2]) < 1e-6
    text = Page(page).text
    assert "once fixed" in text
    assert "raw log-probs" in text


def test_a_reading_that_does_not_explain_the_gap_gives_no_tolerance(run, records):
    """Raw log-probs are nearer than the stated ones, but 0.35 nats away."""
    rng = np.random.default_rng(0)
    off = [
        r._replace(logp=(np.array(r.logp) - rng.uniform(0, 0.7, len(r.logp))).tolist())
        for r in reported(records, Sampling())
    ]
    status, output, page = run(off, "--temperature", "0.3")
    assert status == 1
    assert output.out.startswith("Verdict: other weights\n")
    assert "the nearest reading, " in output.out
    for said in (output.out, Page(page).text):
        assert "no tolerance is suggested for a gap that is not explained" in said
        assert "calls for a tolerance" not in said and "fixed" not in said


def test_the_figures_beside_a_gap_are_those_of_the_recorded_table():
    with (REPOSITORY / "benchmarks" / "engines" / "gaps.csv").open() as table:
        delta = {
            row["format"]: row["mean delta"].replace("e-0", "e-")
            for row in csv.DictReader(table)
            if row["engine"] == "vLLM"
        }
    said = f"mean delta of {delta['bfloat16']} in bfloat16 and of {delta['float32']} in float32"
    assert said in doctor_page.COMPARE


def test_numbers_that_are_said_to_be_raw_are_compared_with_raw_ones(run, records):
    status, output, _ = run(reported(records, Sampling()), "--temperature", "0.7", "--raw")
    assert status == 0
    assert output.out.startswith("Verdict: as stated\n")


def test_placeholders_are_left_out_once_named(model, records):
    exact = reported(records, SETTINGS)
    clipped = [r._replace(logp=[-9999.0, *r.logp[1:]]) for r in exact]
    found = doctor.examine(model, clipped, SETTINGS, SETTINGS)
    assert found.verdict.name == "clipped values"
    assert found.stated.by_context["all"].logp_diff_max > 9000
    assert found.read.by_context["all"].logp_diff_max < 1e-4
    assert found.read.dropped == len(clipped)


@pytest.mark.parametrize("filling", [0.0, -1.0])
def test_fillings_are_left_out_once_named(model, records, filling):
    exact = reported(records, SETTINGS)
    padded = [r._replace(tokens=[*r.tokens, 2, 2], logp=[*r.logp, filling, filling]) for r in exact]
    found = doctor.examine(model, padded, SETTINGS, SETTINGS)
    assert found.verdict.name == "filled values"
    assert found.stated.by_context["all"].logp_diff_max > 1
    assert found.read.by_context["all"].logp_diff_max < 1e-4


@pytest.fixture
def few_are_judged(monkeypatch):
    """The first four tokens of a completion, as of long ones the first 24."""
    monkeypatch.setattr(doctor, "JUDGED_TOKENS", 4)


def test_fillings_after_the_tokens_that_are_judged_are_named(model, records, few_are_judged):
    """A tool's answer, recorded with 0."""
    exact = reported(records, SETTINGS)
    tool = [r._replace(logp=[*r.logp[:6], *[0.0] * len(r.logp[6:])]) for r in exact]
    found = doctor.examine(model, tool, SETTINGS, SETTINGS)
    assert found.verdict.name == "filled values"
    assert found.stated.by_context["all"].logp_diff_max > 1
    assert found.read.by_context["all"].logp_diff_max < 2
    assert found.read.by_context["all"].delta < found.stated.by_context["all"].delta / 4


def test_a_gap_of_the_later_tokens_is_named(model, records, few_are_judged):
    """As where the engine scales rotary embeddings otherwise."""
    exact = reported(records, SETTINGS)
    rng = np.random.default_rng(0)
    later = [
        r._replace(logp=[*r.logp[:4], *(x - rng.uniform(0, 2) for x in r.logp[4:])]) for r in exact
    ]
    found = doctor.examine(model, later, SETTINGS, SETTINGS)
    assert found.verdict.name == "later tokens differ"
    assert not found.verdict.is_explained and found.read is None
    assert doctor.examine(model, exact, SETTINGS, SETTINGS).verdict.name == "as stated"


def test_completions_that_differ_from_the_others_are_numbered(run, records):
    """Those of one engine in three are raw."""
    exact = reported(records, SETTINGS)
    raw = reported(records, Sampling())
    mixed = [raw[i] if i % 3 == 1 else exact[i] for i in range(len(exact))]
    status, output, page = run(mixed, sampling={"temperature": 0.7})
    assert status == 1
    assert output.out.startswith("Verdict: mixed: raw log-probs\n")
    (said,) = re.findall(r"Completions that differ from most, by number: ([\d, ]+)\.", output.out)
    numbers = [int(number) for number in said.split(", ")]
    assert len(numbers) >= 3 and all(number % 3 == 2 for number in numbers)
    assert said in Page(page).text
    assert "no tolerance is suggested" in output.out


def test_the_trainer_of_the_file_is_compared_too(model, records):
    """Its log-probs are 0.25 nats from the model's, so that one knows which of the two is off."""
    exact = reported(records, SETTINGS)
    theirs = [r._replace(trainer_logp=[x - 0.25 for x in r.logp]) for r in exact]
    found = doctor.examine(model, theirs, SETTINGS, SETTINGS).recorded_trainer
    assert found.engine == pytest.approx(0.25)
    assert found.model == pytest.approx(0.25, abs=1e-4)


def test_a_folder_without_a_tokenizer_shows_ids(records, tmp_path):
    weights.save(tmp_path / "hf", DENSE, make_params(DENSE))
    model = doctor.load(str(tmp_path / "hf"))
    assert model.tokenizer is None
    worst = doctor.examine(model, records, SETTINGS, SETTINGS).stated.gaps["worst"][0]
    assert worst["text"] == str(worst["token"])


def test_the_models_own_settings_are_tried(records, tmp_path):
    """A server takes them from generation_config.json where a request names none."""
    weights.save(tmp_path / "hf", DENSE, make_params(DENSE))
    settings = {"temperature": 0.6, "top_k": 5, "top_p": 0.95}
    (tmp_path / "hf" / "generation_config.json").write_text(json.dumps(settings))
    model = doctor.load(str(tmp_path / "hf"))
    changed = reported(records, Sampling(0.6, 5, 0.95))
    verdict = doctor.examine(model, changed, Sampling(), Sampling()).verdict
    assert verdict.name == "other sampling settings"
    assert "generation_config.json" in verdict.sentence


@pytest.mark.parametrize(
    "options, message",
    [
        ((), "give a file of recorded completions or --server URL, one of the two"),
        (("x.jsonl", "--limit", "0"), "--limit 0 must be at least 1"),
        (("x.jsonl", "--output", "none/doctor.html"), "--output none/doctor.html names no file"),
        (("x.jsonl",), "file of recorded completions x.jsonl does not exist"),
    ],
)
def test_bad_options_are_refused(folder, options, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["doctor", *options, "--model", folder]) == 2
    assert message in capsys.readouterr().err


def test_an_option_that_contradicts_the_file_is_refused(run, records):
    status, output, _ = run(records, "--temperature", "1", sampling={"temperature": 0.7})
    assert status == 2
    assert "--temperature 1 differs from the temperature of 0.7" in output.err


def test_a_family_that_is_not_supported_is_refused_before_the_file_is_read(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"architectures": ["GPT2LMHeadModel"]}')
    assert cli.main(["doctor", "none.jsonl", "--model", str(tmp_path)]) == 2
    assert "GPT2LMHeadModel" in capsys.readouterr().err


def test_a_file_that_goes_on_is_said_to(run, records):
    status, output, _ = run(records, "--limit", "5", sampling={"temperature": 0.7})
    assert status == 0
    assert "goes on; the first 5 completions are read (--limit)" in output.err
    assert "over 5 completions" in output.out
