"""Imports go one way, and some libraries have a single door."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1] / "dcmdp_jax"
FILES = {
    str(path.relative_to(ROOT).with_suffix("")).replace("/", "."): path
    for path in ROOT.rglob("*.py")
}

# Each may import from the package only what stands in an earlier line, or its own line where it is
# a folder.
ORDER = [
    ["errors", "files", "limits", "seeds", "records", "monitoring.quantities"],
    ["monitoring.screen"],
    ["monitoring.phases"],
    ["buckets"],
    ["hub", "run.staging"],
    ["models.model_config"],
    ["stopping", "run.lock", "tasks", "answers"],
    ["tokens.chat_template", "tokens.chat_renderer", "tokens.folder_files", "config_checks"],
    ["tokens.segments"],
    ["config", "verifier_pool"],
    ["sharding", "experiment", "losses", "rewards", "tokens.tokenizer", "evaluation.intervals"],
    ["run.record", "constraint", "distributed", "reference", "tokens.gguf_tokenizer"],
    ["verifier_process"],
    ["models"],
    ["optimizers", "data", "tokens.packing", "rollout.sampling"],
    ["rollout.log_prob_readings", "rollout.log_prob_values"],
    ["rollout.log_prob_mixture", "rollout.log_prob_scorer"],
    ["acceptance", "entropy_bonus", "objective"],
    ["monitoring.gaps", "monitoring.measurements", "monitoring.terminal"],
    ["train_state", "run.pairs", "dynamic_sampling"],
    ["rollout.decode", "rollout.log_prob_meaning", "trainer_scores"],
    ["step_metrics"],
    ["rollout.generate", "step", "sync", "run.checkpoint", "monitoring.metrics"],
    ["rollout.jetstream", "compiled_step", "rollout.http_client", "run.supervised"],
    ["rollout.server_probe", "rollout.temporary_weights"],
    ["rollout.server_sampler"],
    ["rollout.vllm", "rollout.sglang", "rollout.llama_cpp"],
    ["rollout.servers"],
    ["rollout.replay", "run.inputs", "run.folder", "run.warmup"],
    ["batches", "run.starting", "evaluation", "report"],
    ["calibrate", "run.recovery"],
    ["run.export", "train"],
    ["serving"],
    ["tools"],
    ["cli"],
]
FOLDERS = (
    "answers",
    "cli",
    "distributed",
    "evaluation",
    "losses",
    "models",
    "report",
    "serving",
    "tools",
)
DOORS = {
    "jetstream": {"rollout.jetstream", "serving.service"},
    "grpc": {"serving.server", "serving.service"},
    "safetensors": {"models.peft", "models.weights"},
    "huggingface_hub": {"hub"},
    "google": {"buckets", "serving.service"},  # Google's storage; protobuf
    "gcsfs": {"run.staging"},
    "gguf": {"models.gguf_file"},
    "tokenizers": {"tokens.tokenizer", "tokens.gguf_tokenizer"},
    "sentencepiece": {"tokens.tokenizer"},
    "jinja2": {"tokens.chat_renderer"},
    "orbax": {"run.checkpoint"},
    "grain": {"data"},
    "cloudpickle": {"verifier_pool"},
}


def imports(path):
    """Absolute names of everything a file imports, wherever in it the import stands."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def level(module):
    for i, line in enumerate(ORDER):
        if any(module == name or module.startswith(name + ".") for name in line):
            return i
    raise AssertionError(f"{module} has no place in ORDER")


def station(name):
    """The file of the package that an imported name lives in."""
    parts = name.split(".")[1:]
    while parts and ".".join(parts) not in FILES and ".".join([*parts, "__init__"]) not in FILES:
        parts = parts[:-1]
    return ".".join(parts)


@pytest.mark.parametrize("module", sorted(m for m in FILES if not m.endswith("__init__")))
def test_direction(module):
    own = level(module)
    for name in imports(FILES[module]):
        if name.split(".")[0] != "dcmdp_jax" or not (target := station(name)):
            continue
        folder = target.split(".")[0]
        same_folder = folder in FOLDERS and module.split(".")[0] == folder
        assert level(target) < own or same_folder, (
            f"{module} imports {target}, which does not stand before it"
        )


@pytest.mark.parametrize("library", DOORS)
def test_single_doors(library):
    late = f'import_library("{library}")'  # imported where it is first needed
    doors = {
        m
        for m, path in FILES.items()
        if late in path.read_text() or any(name.split(".")[0] == library for name in imports(path))
    }
    assert doors == DOORS[library]


def test_partition_specs_are_built_in_one_place():
    assert [m for m, path in FILES.items() if "PartitionSpec(" in path.read_text()] == ["sharding"]


@pytest.mark.parametrize(
    "module", sorted(m for m in FILES if m.startswith("losses") or m == "constraint")
)
def test_losses_need_only_arrays(module):
    allowed = {"jax", "numpy", "optax", "dcmdp_jax"} | set(sys.stdlib_module_names)
    assert {name.split(".")[0] for name in imports(FILES[module])} <= allowed


def test_importing_the_losses_is_light():
    code = (
        "import sys, dcmdp_jax.losses, dcmdp_jax.constraint; "
        "heavy = ('flax', 'orbax', 'grain', 'tensorflow', 'torch', 'transformers'); "
        "print([name for name in heavy if name in sys.modules])"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "[]"
    )
