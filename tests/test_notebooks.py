"""The notebooks of colab/: short, stored with their output, and executed.

Those that need SmolLM2-135M run with a tiny Llama that transformers makes, and the first one in the
slow tier with the real model too, where the README's first command has left it in models/.
"""

import ast
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager
from nbclient import NotebookClient

from dcmdp_jax.experiment import run_file
from support.training import TINY

ROOT = pathlib.Path(__file__).parents[1]
COLAB = ROOT / "colab"
NAMES = ("quickstart", "losses", "doctor", "reading_a_run")
IN_A_CHECKOUT = ("quickstart", "doctor", "reading_a_run")
WITH_PLOTS = {"quickstart": 1, "losses": 2, "doctor": 1, "reading_a_run": 1}
REAL = ROOT / "models" / "smollm2-135m"
# what the losses do without
EXTRAS = (
    *("orbax", "etils", "grain", "cloudpickle", "tokenizers", "gguf", "huggingface_hub", "jinja2"),
    *("sentencepiece", "pyarrow", "jetstream", "grpc", "httpx2", "math_verify"),
)


def read(name):
    return nbformat.read(COLAB / f"{name}.ipynb", 4)


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(notebook):
    """What the cells of a notebook print, as one text."""
    outputs = [output for cell in code(notebook) for output in cell.outputs]
    return "".join(output.text for output in outputs if output.output_type == "stream")


def test_there_are_four():
    assert {path.stem for path in COLAB.glob("*.ipynb")} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_has_at_most_60_lines_of_code(name):
    lines = [line for cell in code(read(name)) for line in cell.source.splitlines()]
    assert len([line for line in lines if line.strip()]) <= 60


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_defines_nothing(name):
    to_python = TransformerManager().transform_cell
    definitions = (ast.FunctionDef, ast.ClassDef, ast.Lambda)
    trees = [ast.parse(to_python(cell.source)) for cell in code(read(name))]
    assert not [node for tree in trees for node in ast.walk(tree) if isinstance(node, definitions)]


@pytest.mark.parametrize("name", NAMES)
def test_its_badge_opens_it_at_the_version_that_it_installs(name):
    notebook = read(name)
    source = code(notebook)[0].source
    address = re.search(r"colab\.research\.google\.com/github/(\S+)\)", notebook.cells[0].source)[1]
    (repository,) = set(re.findall(r"github\.com/(\S+)", source)) or {address.split("/blob/")[0]}
    version = re.search(r"--branch v(\S+)|dcmdp-jax==([\d.]+)", source)
    assert address == f"{repository}/blob/v{version[1] or version[2]}/colab/{name}.ipynb"


def test_all_name_one_repository_and_tag():
    text = "".join(read(name).cells[0].source for name in NAMES)
    assert len(set(re.findall(r"/github/(\S+)/colab/", text))) == 1


@pytest.mark.parametrize("name", NAMES)
def test_what_is_stored_is_a_complete_run(name):
    cells = code(read(name))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not [o for cell in cells for o in cell.outputs if o.output_type == "error"]


@pytest.mark.parametrize("name", NAMES)
def test_what_is_stored_names_no_folder_of_a_machine_and_no_warning(name):
    outputs = json.dumps([cell.outputs for cell in code(read(name))])
    assert not re.findall(r"/(?:work|tmp|root|home|usr)/|Warning|WARNING|\\u001b", outputs)


@pytest.mark.parametrize("name", NAMES)
def test_the_plots_are_stored(name):
    outputs = [output for cell in code(read(name)) for output in cell.outputs]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == WITH_PLOTS[name]


def execute(notebook, folder):
    NotebookClient(notebook, timeout=800, resources={"metadata": {"path": str(folder)}}).execute()
    return notebook


@pytest.mark.full
def test_the_losses_run_without_a_checkout_and_print_what_is_stored():
    stored = printed(read("losses"))
    assert stored and printed(execute(read("losses"), pathlib.Path.cwd())) == stored


@pytest.mark.full
def test_the_losses_run_on_the_light_core():
    """Every extra is hidden, as if it were not installed."""
    hide = f"import sys; sys.modules.update(dict.fromkeys({EXTRAS}))\n"
    source = "\n".join(cell.source for cell in code(read("losses")))
    subprocess.run(
        [sys.executable, "-c", hide + source.replace("    %pip", "    raise SystemExit #")],
        env=os.environ | {"MPLBACKEND": "agg", "PYTHONPATH": str(ROOT)},
        check=True,
    )


def write_tiny_llama(folder, prompts):
    """Writes a Llama with random weights and a tokenizer that is trained on the prompts."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=alphabet, special_tokens=["<end>"], show_progress=False
    )
    tokenizer.train_from_iterator(prompts, trainer)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=tokenizer.get_vocab_size(),
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            initializer_range=0.3,  # so that the temperature matters
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=0,
        )
    )
    model.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>"}))


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A copy of what the notebooks use, with this environment as its .venv and no model."""
    for folder in ("colab", "experiments"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    (tmp_path / "models").mkdir()
    (tmp_path / ".venv").symlink_to(sys.prefix)
    monkeypatch.setenv("XLA_FLAGS", "")  # one device
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return tmp_path


@pytest.fixture
def with_tiny_model(checkout, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "experiments" / "language"))
    task = run_file(str(ROOT / "experiments" / "language" / "two_words.py"), "task")["TwoWords"]()
    prompts = [task.example(index, 0).prompt for index in range(500)]
    write_tiny_llama(checkout / "models" / "smollm2-135m", prompts)
    return checkout


def changed(name, *replacements):
    """A notebook with another text in its code; each must be there."""
    notebook = read(name)
    for old, new in replacements:
        assert sum(old in cell.source for cell in code(notebook)) == 1
        for cell in code(notebook):
            cell.source = cell.source.replace(old, new)
    return notebook


SHORT = (("steps = 3", "steps = 1"), ("--eval.prompts 32", "--eval.prompts 8"))


@pytest.mark.full
def test_the_quickstart_runs_with_a_tiny_model(with_tiny_model):
    run_the_quickstart(with_tiny_model)


@pytest.mark.slow
@pytest.mark.skipif(not REAL.is_dir(), reason="models/smollm2-135m is not there")
def test_the_quickstart_runs_with_the_real_model(checkout):
    (checkout / "models" / "smollm2-135m").symlink_to(REAL)
    run_the_quickstart(checkout)


def run_the_quickstart(checkout):
    text = printed(execute(changed("quickstart", *SHORT), checkout / "colab"))
    assert len((checkout / "runs" / "notebook" / "metrics.jsonl").read_text().splitlines()) == 1
    sentences = re.findall(r"^ +step 1 +reward [01]", text, re.MULTILINE)
    assert len(sentences) == 4 and "CpuDevice" in text


@pytest.mark.full
def test_the_doctor_finds_the_mistake_in_a_file_of_the_tiny_model(with_tiny_model):
    script = with_tiny_model / "experiments" / "language" / "record_rollouts.py"
    (with_tiny_model / "colab" / "rollouts.jsonl").unlink()
    subprocess.run([sys.executable, str(script)], check=True)
    verdicts = verdicts_of(execute(read("doctor"), with_tiny_model / "colab"))
    assert verdicts == ["raw log-probs", "as stated"]


def test_the_doctor_found_the_mistake_in_the_file_that_is_stored():
    assert verdicts_of(read("doctor")) == ["raw log-probs", "as stated"]


def verdicts_of(notebook):
    return re.findall(r"^Verdict: (.+?)\r?$", printed(notebook), re.MULTILINE)


@pytest.mark.full
def test_two_short_runs_are_read_and_compared(checkout):
    sizes = {"steps": 2, "eval.every": 1}
    words = " ".join(f"--{name} {value}" for name, value in (TINY | sizes).items())
    options = "--steps 20 --eval.every 10 --eval.prompts 128"
    notebook = execute(changed("reading_a_run", (options, words)), checkout / "colab")
    outputs = [output for cell in code(notebook) for output in cell.outputs]
    assert any("&lt;svg" in output.get("data", {}).get("text/html", "") for output in outputs)
    assert (checkout / "comparison.html").is_file()


@pytest.mark.full
@pytest.mark.parametrize("name", IN_A_CHECKOUT)
def test_the_first_cell_fetches_the_tag_and_does_nothing_more_in_a_checkout(
    name, tmp_path, monkeypatch
):
    """Run twice where nothing is, with a repository of this machine in place of the real one."""
    source = code(read(name))[0].source
    address = re.search(r"https://\S+", source)[0]
    tag = re.search(r"--branch (\S+)", source)[1]
    origin = tmp_path / "origin"
    shutil.copytree(COLAB, origin / "colab", ignore=shutil.ignore_patterns("*.ipynb"))
    (origin / ".venv" / "bin").mkdir(parents=True)
    (origin / ".venv" / "bin" / "dcmdp").touch(mode=0o755)  # so that install.sh has nothing to do
    git = ["git", "-C", str(origin), "-c", "user.name=t", "-c", "user.email=t@example.org"]
    for words in (["init", "-q"], ["add", "-A", "-f"], ["commit", "-qm", "t"], ["tag", tag]):
        subprocess.run([*git, *words], check=True)
    monkeypatch.setenv("GIT_CONFIG_COUNT", "1")
    monkeypatch.setenv("GIT_CONFIG_KEY_0", f"url.file://{origin}.insteadOf")
    monkeypatch.setenv("GIT_CONFIG_VALUE_0", address)
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(text) for text in (source, source, "print(os.getcwd())")]
    )
    bare = tmp_path / "content"
    bare.mkdir()
    text = printed(execute(notebook, bare))
    assert text.strip().splitlines()[-1] == str(bare / address.rpartition("/")[2])


INSTALLED = {"none": "", "535.104.05": "jax[cuda12]", "580.65.06": "jax[cuda13]"}


@pytest.mark.parametrize("driver", INSTALLED)
@pytest.mark.skipif(
    bool([*pathlib.Path("/dev").glob("accel*"), *pathlib.Path("/dev/vfio").glob("[0-9]*")]),
    reason="this machine has a TPU, which comes first",
)
def test_jax_is_installed_for_the_driver_that_is_there(driver, tmp_path, monkeypatch):
    """Stand-ins for Python and nvidia-smi; what pip is asked for is written to a file."""
    shutil.copytree(COLAB, tmp_path / "colab", ignore=shutil.ignore_patterns("*.ipynb"))
    asked = tmp_path / "asked"
    programs = tmp_path / "programs"
    programs.mkdir()
    pip = f'#!/bin/sh\necho "$@" >> {asked}\n'
    write_program(tmp_path / "pip", pip)
    make = f"mkdir -p .venv/bin && cp {tmp_path}/pip .venv/bin/pip"
    write_program(programs / "python3", f'#!/bin/sh\ncase "$2" in virtualenv) {make};; esac\n')
    if driver != "none":
        write_program(programs / "nvidia-smi", f"#!/bin/sh\necho {driver}\n")
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}/usr/bin{os.pathsep}/bin")
    subprocess.run(["bash", str(tmp_path / "colab" / "install.sh")], check=True)
    lines = asked.read_text().splitlines()
    assert lines[0].endswith("-r requirements.txt") and lines[-1].endswith("--no-deps .")
    assert re.findall(r"jax\[\w+\]", " ".join(lines)) == [INSTALLED[driver]] * bool(
        INSTALLED[driver]
    )


def write_program(path, text):
    path.write_text(text)
    path.chmod(0o755)
