"""Whatever stands in a run's files, its pages have the elements of a page with plain words there.

And what is of a wrong type is named with its file and line.
"""

import contextlib
import copy
import functools
import html.parser
import io
import json
import pathlib
import re
import shutil
import xml.etree.ElementTree
from typing import NamedTuple

import pytest

from dcmdp_jax import cli
from dcmdp_jax.experiment import load_experiment
from dcmdp_jax.monitoring import metrics
from dcmdp_jax.report import comparison, run_data, run_page
from dcmdp_jax.tools import diagnose, diagnose_page
from support.pages import CONFIG, GAPS, ROWS, SAMPLES, SOURCES, make_run

QUICKSTART = pathlib.Path(__file__).parents[1] / "experiments" / "quickstart.py"
PLAIN = "word"
ATTACKS = {
    "script": "<script>alert(1)</script>",
    "attribute": '"><img src=x onerror=alert(1)>',
    "single quotes": "'><img src=x onerror='alert(1)'>",
    "handler": 'x" onmouseover="alert(1)" style="',
    "no quotes": "x onload=alert(1)",
    "title": "</title></style></pre></details></svg><svg onload=alert(1)>",
    "cdata": "]]><![CDATA[<script>",
    "comment": "--><script>alert(1)</script><!--",
    "half a tag": "<img src=x onerror=alert(1) ",
    "json": '\u2028</script>{"a": "<"}',
    "entity": "&lt;script&gt;&#60;b&#62;&amp",
    "control": "\0\x1b[2J\x07\r\n\t",
    "surrogate": "\ud800<b>",
    "right to left": "\u202e<i>",
}
PARITY = {
    "weights": "checkpoint 4",
    "context": {
        "all": {"tokens": 5, "delta": 0.1, "logp_diff_mean": 0.1, "logp_diff_max": 0.3, "k3": 0.01}
    },
}


class Elements(html.parser.HTMLParser):
    """Every start tag with its attributes, comments and declarations, as a browser meets them."""

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, sorted(attributes)))

    def handle_endtag(self, tag):
        self.found.append(f"/{tag}")

    def handle_comment(self, data):
        self.found.append("comment")

    def handle_decl(self, data):
        self.found.append(data)

    def unknown_decl(self, data):
        self.found.append(data)


def put(record, word):
    """`record` with the word after every text, so that texts that differ still do."""
    if isinstance(record, dict):
        return {key: put(value, word) for key, value in record.items()}
    if isinstance(record, list):
        return [put(value, word) for value in record]
    return record + word if isinstance(record, str) else record


def files_of(word):
    config = put(CONFIG, word) | {
        f"key {word}": {f"inner {word}": [word, {word: word}]},
        "seed": f"s{word}",
    }
    parity = put(PARITY, word)
    return {
        "config.json": config,
        "parity.json": parity | {"context": {f"all{word}": parity["context"]["all"]}},
        "diagnose.json": put(SOURCES, word),
        "gaps.jsonl": put(GAPS, word),
        "samples.jsonl": put(SAMPLES, word),
    }


def make(folder, word, **changes):
    make_run(folder, [{**row, f"metric {word}": 1.0} for row in ROWS])
    for name, record in files_of(word).items():
        (folder / name).write_text(json.dumps(record) + "\n")
    return folder


def elements(path):
    return Elements(path.read_text(encoding="utf-8")).found


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    """The elements of a run's page with plain words."""
    return elements(run_page.write(make(tmp_path_factory.mktemp("clean") / "run", PLAIN)))


def test_the_page_of_a_run_has_no_script_image_or_frame(clean):
    assert len(clean) > 200
    assert {tag for tag, _ in (item for item in clean if isinstance(item, tuple))}.isdisjoint(
        {"script", "img", "iframe"}
    )


@pytest.mark.parametrize("word", ATTACKS.values(), ids=ATTACKS)
def test_the_page_of_a_run_has_no_element_or_attribute_from_its_files(tmp_path, word, clean):
    assert elements(run_page.write(make(tmp_path / "run", word))) == clean


@pytest.mark.parametrize("word", ATTACKS.values(), ids=ATTACKS)
def test_nor_has_the_page_that_compares_runs(tmp_path, word):
    """Settings that differ in key and value, and the names of folders."""
    found = []
    for text, base in ((PLAIN, tmp_path / "plain"), (word, tmp_path / "attacked")):
        folders = []
        for i in range(3):
            name = re.sub(r"[/\0\ud800]", "", text)
            folder = make(base / f"{i}{name}", text)
            config = json.loads((folder / "config.json").read_text())
            config["rollout"]["precision"]["weights"] = f"{i} {text}"
            (folder / "config.json").write_text(json.dumps(config | {f"only{i}{text}": text}))
            folders.append(folder)
        found.append(elements(pathlib.Path(comparison.write(folders))))
    assert found[0] == found[1] and len(found[0]) > 300


@pytest.fixture(scope="module")
def diagnosis(tmp_path_factory):
    """Writes the page and the picture of a diagnosis with a text in it, and returns their texts."""
    config = load_experiment(str(QUICKSTART))
    gap = diagnose.Difference(0.1, 0.01, 0.2, 0.3, 0.01, 0.1)

    @functools.cache
    def write(text):
        sources = tuple(
            diagnose.Source(f"{name}{text}", text, gap, gap) for name in ("weights", "head")
        )
        attribution = diagnose.Attribution(text, 9, gap, sources, sources, text, (gap, gap), 1e-6)
        object.__setattr__(config, "name", text)
        page = diagnose_page.write(attribution, config, tmp_path_factory.mktemp("diagnosis"))
        picture = page.with_name("diagnose.svg")
        return page.read_text(encoding="utf-8"), picture.read_text(encoding="utf-8")

    return write


@pytest.mark.parametrize("word", ATTACKS.values(), ids=ATTACKS)
def test_nor_has_the_page_of_a_diagnosis(diagnosis, word):
    page, _ = diagnosis(word)
    assert Elements(page).found == Elements(diagnosis(PLAIN)[0]).found


@pytest.mark.parametrize("word", ATTACKS.values(), ids=ATTACKS)
def test_nor_has_the_picture_of_a_diagnosis(diagnosis, word):
    _, picture = diagnosis(word)
    assert Elements(picture).found == Elements(diagnosis(PLAIN)[1]).found


# without the characters that no XML may hold
OF_XML = {"plain": PLAIN} | {name: ATTACKS[name] for name in ATTACKS if name != "control"}


@pytest.mark.parametrize("word", OF_XML.values(), ids=OF_XML)
def test_the_picture_of_a_diagnosis_is_xml(diagnosis, word):
    _, picture = diagnosis(word)
    xml.etree.ElementTree.fromstring(picture)


# Wrong types

WRONG = {
    "text": '"><script>alert(1)</script>',
    "number as text": "0.5",
    "NaN as text": "NaN",
    "true": True,
    "list": [1],
    "object": {"a": 1},
    "huge": 10**400,
}


def paths(record, kinds):
    """Where values of these types lie."""
    if isinstance(record, (dict, list)):
        inner = record.items() if isinstance(record, dict) else enumerate(record)
        return [(key, *rest) for key, value in inner for rest in paths(value, kinds)]
    return [()] if isinstance(record, kinds) and not isinstance(record, bool) else []


def with_value(record, path, value):
    record = copy.deepcopy(record)
    inner = record
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return record


CASES = [
    (name, path)
    for name, record in files_of(PLAIN).items()
    for path in paths(record, (int, float))
    if name != "config.json"
]


OF_ONE_RUN = ("parity.json", "samples.jsonl")  # files that a page of several runs does not show
wrong_numbers = pytest.mark.parametrize("wrong", WRONG)
every_number = pytest.mark.parametrize(
    "name, path", CASES, ids=[f"{name}-{'.'.join(map(str, path))}" for name, path in CASES]
)


class Refused(NamedTuple):
    """What `dcmdp report` says, one message for each of its two pages, and what it has written."""

    file: pathlib.Path
    statuses: list[int]
    messages: list[str]
    pages: list[pathlib.Path]


@pytest.fixture(scope="module")
def refused(tmp_path_factory):
    """Runs the command on a run with a wrong value in one of its files, alone and beside another;
    those that the comparison does not show alone.
    """

    @functools.cache
    def report(name, path, wrong):
        base = tmp_path_factory.mktemp("runs")
        folder = make(base / "a", PLAIN)
        other = make(base / "b", PLAIN)
        lines = [with_value(files_of(PLAIN)[name], path, WRONG[wrong])]
        if name.endswith("l"):
            lines = [files_of(PLAIN)[name], *lines, files_of(PLAIN)[name]]
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
        found = Refused(folder / name, [], [], [])
        for runs in ([folder], [folder, other])[: 1 if name in OF_ONE_RUN else 2]:
            with contextlib.redirect_stderr(io.StringIO()) as written:
                found.statuses.append(cli.main(["report", *map(str, runs)]))
            found.messages.append(written.getvalue())
        found.pages.extend(base.rglob("report.html"))
        shutil.rmtree(base)
        return found

    return report


@wrong_numbers
@every_number
def test_a_number_that_is_none_is_named_with_its_file(refused, name, path, wrong):
    found = refused(name, path, wrong)
    place = f"{found.file}: line 2" if name.endswith("l") else str(found.file)
    assert found.statuses == [2] * (1 if name in OF_ONE_RUN else 2)
    assert all(message.startswith(f"dcmdp: {place}") for message in found.messages)


@wrong_numbers
@every_number
def test_a_number_that_is_none_is_one_short_sentence(refused, name, path, wrong):
    found = refused(name, path, wrong)
    place = f"{found.file}: line 2" if name.endswith("l") else str(found.file)
    for message in found.messages:
        assert message.count("\n") == 1 and len(message) < len(place) + 250


@wrong_numbers
@every_number
def test_a_number_that_is_none_is_on_no_page(refused, name, path, wrong):
    assert not refused(name, path, wrong).pages


TEXTS = [
    (name, path)
    for name, path in (
        (name, path) for name, record in files_of(PLAIN).items() for path in paths(record, str)
    )
    if name != "config.json"
]


@pytest.mark.parametrize("wrong", [7, None, True, ["<script>"], {"<b>": 1}], ids=repr)
@pytest.mark.parametrize(
    "name, path", TEXTS, ids=[f"{name}-{'.'.join(map(str, path))}" for name, path in TEXTS]
)
def test_a_text_that_is_none_is_named_with_its_file(tmp_path, capsys, name, path, wrong):
    folder = make(tmp_path, PLAIN)
    (folder / name).write_text(json.dumps(with_value(files_of(PLAIN)[name], path, wrong)) + "\n")
    assert cli.main(["report", str(folder)]) == 2
    assert capsys.readouterr().err.startswith(f"dcmdp: {folder / name}")


@pytest.mark.parametrize("name", ["diagnose.json", "parity.json", "config.json"])
@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"null", b"[1]", b"\xe9", b"[" * 10**5, b"1" * 9999],
    ids=["empty", "cut", "null", "list", "bytes", "deep", "digits"],
)
def test_a_file_that_is_no_object_is_one_sentence(tmp_path, capsys, name, content):
    folder = make(tmp_path, PLAIN)
    (folder / name).write_bytes(content)
    assert cli.main(["report", str(folder)]) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"dcmdp: {folder / name} ") and message.count("\n") == 1


@pytest.mark.parametrize("name", ["gaps.jsonl", "samples.jsonl", "diagnose.json", "parity.json"])
@pytest.mark.parametrize("empty", [None, 3, "<b>", [], {}, [3], {"a": 3}, [None]], ids=repr)
def test_any_container_may_be_anything(tmp_path, name, empty):
    """A page, or a sentence that names the file; nothing else."""
    record = files_of(PLAIN)[name]
    inner = [path[:i] for path in paths(record, (int, float, str)) for i in range(1, len(path))]
    for i, path in enumerate(dict.fromkeys(inner)):
        folder = make(tmp_path / str(i), PLAIN)
        (folder / name).write_text(json.dumps(with_value(record, path, empty)) + "\n")
        try:
            Elements(run_page.write(folder).read_text())
        except ValueError as error:
            assert str(error).startswith(str(folder / name)), path


@pytest.mark.parametrize(
    "key",
    [
        "reward",
        "delta_mean",
        "multiplier_next",
        "seconds",
        "tokens",
        "reward_eval_infer",
        "skipped",
        "new",
    ],
)
@pytest.mark.parametrize(
    "wrong",
    [value for value in WRONG.values() if value is not True],
    ids=[name for name in WRONG if name != "true"],
)
def test_a_metric_that_is_no_number_is_named_with_its_line(tmp_path, capsys, key, wrong):
    folder = make_run(tmp_path / "a", [ROWS[0], ROWS[1] | {key: wrong}, *ROWS[2:]])
    other = make_run(tmp_path / "b", ROWS)
    for runs in ([folder], [other, folder]):
        assert cli.main(["report", *map(str, runs)]) == 2
        message = capsys.readouterr().err
        assert (
            message.startswith(f"dcmdp: {folder / metrics.FILE}: line 2 has '{key}' = ")
            and message.count("\n") == 1
        )


@pytest.mark.parametrize("step", ["<b>", True, 1.5, None, [1], 10**400, 2**60])
def test_a_step_that_is_none_is_named_with_its_line(tmp_path, step):
    make_run(tmp_path, [ROWS[0], ROWS[1] | {"step": step}, *ROWS[2:]])
    with pytest.raises(
        ValueError, match=r"metrics\.jsonl: line 2 is not a row with a step; remove the line"
    ):
        run_page.write(tmp_path)


@pytest.mark.parametrize(
    "rows",
    [
        [{**row, "seconds": None} for row in ROWS],
        [{**row, "seconds": 0, "tokens": 0} for row in ROWS],
        [{**row, "seconds": -1.0} for row in ROWS],
        [{**row, "delta_mean": 1e308} for row in ROWS],
        [{**row, "delta_mean": 5e-324} for row in ROWS],
        [{**row, "reward": True} for row in ROWS],
        [{**row, "step": 10**15 + i} for i, row in enumerate(ROWS)],
        [ROWS[0] | {"step": 0}, ROWS[1] | {"step": 10**12}],
        ROWS[::-1],
        [ROWS[0]] * 3,
        [{**row, "step": -row["step"]} for row in ROWS],
    ],
    ids=[
        "null seconds",
        "no seconds",
        "back in time",
        "large",
        "denormal",
        "true",
        "late steps",
        "far apart",
        "backwards",
        "twice",
        "negative",
    ],
)
def test_odd_numbers_have_a_page_at_once(tmp_path, rows):
    assert elements(run_page.write(make_run(tmp_path, rows)))


def test_nan_and_infinity_spelt_in_the_file_have_a_page(tmp_path):
    make_run(tmp_path, ROWS)
    text = (
        (tmp_path / metrics.FILE)
        .read_text()
        .replace("0.02", "NaN")
        .replace("0.004", "-Infinity")
        .replace("2.0", "Infinity")
    )
    (tmp_path / metrics.FILE).write_text(text)
    page = run_page.write(tmp_path).read_text()
    assert not re.search(r"\b(nan|inf)\b", re.sub(r"<pre>.*</pre>", "", page, flags=re.S))


SETTINGS = [
    pytest.param(names, value, id=f"{'.'.join(names)}-{kind}")
    for names in run_data.NUMBERS
    for kind, value in {**WRONG, "negative": -3}.items()
    if (names, kind) != (("constraint", "tolerance"), "object")  # one that is still to be measured
]


@pytest.fixture
def two_runs(tmp_path):
    """Makes two runs with a setting."""

    def make_both(names, value):
        config = with_value(CONFIG, names, value)
        return [make_run(tmp_path / name, ROWS, config) for name in "ab"]

    return make_both


@pytest.mark.parametrize("names, wrong", SETTINGS)
def test_a_setting_that_is_no_number_is_named(two_runs, capsys, names, wrong):
    folders = two_runs(names, wrong)
    for runs in (folders[:1], folders):
        assert cli.main(["report", *map(str, runs)]) == 2
        assert f"{folders[0] / 'config.json'} has '{'.'.join(names)}' = " in capsys.readouterr().err


def test_a_tolerance_that_is_still_to_be_measured_has_a_page(two_runs):
    folders = two_runs(("constraint", "tolerance"), WRONG["object"])
    for runs in (folders[:1], folders):
        assert cli.main(["report", *map(str, runs)]) == 0


def test_a_bucket_without_tokens_is_named(tmp_path):
    folder = make(tmp_path, PLAIN)
    row = with_value(GAPS, ("positions", 1, "tokens"), 0)
    (folder / metrics.GAPS).write_text(json.dumps(row) + "\n")
    with pytest.raises(
        ValueError, match=r"gaps\.jsonl: line 1: a position has no tokens; remove it"
    ):
        run_page.write(folder)
