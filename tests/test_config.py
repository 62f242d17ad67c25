"""Configuration: typed overrides, refusals in one sentence, the record beside the run."""

import dataclasses
import functools
import json
import pathlib

import optax
import pytest

from dcmdp_jax import cli, constraint, train
from dcmdp_jax.config_checks import scalar_fields
from dcmdp_jax.experiment import load_experiment, override, replace_fields
from dcmdp_jax.losses import policy
from dcmdp_jax.run.record import to_json

QUICKSTART = pathlib.Path(__file__).parents[1] / "experiments" / "quickstart.py"


@pytest.fixture(scope="module")
def quickstart():
    return load_experiment(str(QUICKSTART))


@pytest.mark.parametrize(
    "row_length, shares",
    [
        (0, False),
        (12 - 1 + 2 * 34 - 1, False),  # a longest prompt and two longest completions lack a token
        (12 - 1 + 2 * 34, True),
        (32_768, True),
        (32_769, False),
    ],
)
def test_prompts_are_shared_where_a_row_holds_two_longest_completions(
    quickstart, row_length, shares
):
    options = {"algorithm.row_length": str(row_length), "algorithm.share_prompts": "true"}
    assert override(quickstart, options).shares_prompts == shares


def test_the_language_experiment_shares_prompts():
    assert load_experiment(str(QUICKSTART.parent / "language" / "smollm2.py")).shares_prompts


@pytest.mark.parametrize(
    "name, text, value",
    [
        ("constraint.tolerance", "0.01", 0.01),
        ("steps", "50", 50),
        ("data.shuffle", "false", False),
        ("rollout.precision.weights", "int8", "int8"),
        ("model.architecture.num_layers", "3", 3),
        ("data.task.operations", "4", 4),
    ],
)
def test_an_override_has_the_type_of_its_field(quickstart, name, text, value):
    changed = override(quickstart, {name: text})
    assert functools.reduce(getattr, name.split("."), changed) == value


def test_overrides_leave_the_other_fields(quickstart):
    there = {"steps": "50", "data.shuffle": "false", "data.task.operations": "4"}
    back = {"steps": str(quickstart.steps), "data.shuffle": "true", "data.task.operations": "5"}
    assert override(override(quickstart, there), back) == quickstart


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("constraint.tolerence", "0.1", "did you mean --constraint.tolerance"),
        ("stepz", "1", "did you mean --steps"),
        ("constraint.shaping", "foo", "constraint.shaping is a function; set it in"),
        ("constraint", "1", "--constraint is no scalar field; set it in"),
        ("steps", "many", "--steps takes a value of type int, not 'many'"),
        ("steps", "1.5", "type int"),
        ("constraint.tolerance", "nan", "type float"),
        ("data.shuffle", "perhaps", "type bool"),
        ("algorithm.advantage", "grpo", "algorithm.advantage is a function; set it in"),
        ("steps", "0", "steps=0 must be at least 1"),
        ("rollout.top_p", "0", "rollout.top_p=0.0 must lie in (0, 1]"),
        ("rollout.temperature", "0", "rollout.temperature=0.0 must be at least 1e-06"),
        ("algorithm.minibatches", "3", "128 completions do not divide into"),
        ("algorithm.row_length", "10", "shorter than one prompt and completion"),
        ("constraint.multiplier_init", "2", "0 <= multiplier_init <= multiplier_max"),
        ("model.architecture.num_kv_heads", "3", "num_heads=4 is not a multiple of num_kv_heads=3"),
        ("model.architecture.compute.remat", "true", "set model.compute instead"),
    ],
)
def test_bad_overrides_are_refused_in_one_sentence(quickstart, name, value, message):
    with pytest.raises(ValueError) as error:
        override(quickstart, {name: value})
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name, function, message",
    [
        (
            "algorithm.surrogate",
            policy.clipped,
            "algorithm.surrogate=clipped is called with (logp, old_logp, rollout_logp, advantage, "
            "mask): too many positional arguments; losses.corrections.decoupled makes a surrogate",
        ),
        ("algorithm.reduce", lambda loss: loss, "algorithm.reduce=<lambda> is called with (loss,"),
        ("constraint.shaping", constraint.delta, "constraint.shaping=delta is called with (adv"),
        ("constraint.penalty", 1.0, "constraint.penalty=1.0 is no function: 1.0 is not a callable"),
    ],
)
def test_functions_that_cannot_be_called_are_refused(quickstart, name, function, message):
    with pytest.raises(ValueError) as error:
        replace_fields(quickstart, {tuple(name.split(".")): function})
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_builtin_without_a_signature_is_taken_as_it_is(quickstart):
    assert replace_fields(quickstart, {("algorithm", "reduce"): max}).algorithm.reduce is max


OFF_AT_0 = {  # where 0 means off, all, or none
    "model.architecture.num_experts",
    "model.architecture.experts_per_token",
    "model.architecture.expert_size",
    "data.verifier_timeout",
    "data.max_refills",
    "model.lora.rank",
    "model.lora.base_group",
    "rollout.top_k",
    "rollout.top_logprobs",
    "rollout.min_p",
    "rollout.precision.group",
    "rollout.precision.experts_per_token",
    "rollout.staleness",
    "rollout.devices",
    "rollout.mesh.fsdp",
    "mesh.fsdp",
    "algorithm.row_length",
    "algorithm.entropy_coefficient",
    "algorithm.entropy_target",
    "algorithm.learning_rate",
    "algorithm.lr_warmup_steps",
    "algorithm.beta1",
    "algorithm.beta2",
    "algorithm.weight_decay",
    "algorithm.grad_clip",
    "algorithm.max_skipped",
    "constraint.tolerance",
    "constraint.dual_lr",
    "constraint.multiplier_init",
    "seed",
    "warmup.steps",
    "warmup.learning_rate",
    "eval.every",
    "checkpoint.every",
}
FIELDS = scalar_fields(load_experiment(str(QUICKSTART)))
NUMBERS = {name: kind for name, kind in FIELDS.items() if kind in (int, float)}


def of_one_sentence(error):
    return isinstance(error, ValueError) and str(error) and "\n" not in str(error)


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_may_be_0_where_that_means_off(name, quickstart):
    assert accepted(quickstart, name, "0") == (name in OFF_AT_0)


@pytest.mark.parametrize("name", NUMBERS)
def test_few_numbers_may_be_negative(name, quickstart):
    below = ("rollout.devices", "rollout.precision.group", "model.lora.base_group")
    assert accepted(quickstart, name, "-1") == (name in below)


@pytest.mark.parametrize("text", ["1" + 40 * "0", "-1e300", "nan", "inf", "-inf", "", "x", "1e400"])
@pytest.mark.parametrize("name", NUMBERS)
def test_no_number_goes_past_32_bits_or_is_nan(name, text, quickstart):
    assert not accepted(quickstart, name, text)


@pytest.mark.parametrize("name", NUMBERS)
def test_an_experiment_file_cannot_set_what_is_no_number(name, quickstart):
    bad = [float("nan"), float("inf"), None, "3", 10**40]
    for value in bad + [2.5] * (NUMBERS[name] is int):
        with pytest.raises(ValueError) as error:
            replace_fields(quickstart, {tuple(name.split(".")): value})
        assert of_one_sentence(error.value), value


def accepted(config, name, text):
    try:
        override(config, {name: text})
    except Exception as error:
        assert of_one_sentence(error), repr(error)
        return False
    return True


@pytest.mark.slow
@pytest.mark.parametrize("name", NUMBERS)
def test_what_passes_is_read_or_refused_before_anything_is_left(name, quickstart, tmp_path):
    for text in ("0", "-1", "1", "3", "1000", "1000000", "2147483647", "1e30"):
        if accepted(quickstart, name, text):
            try:
                train.prepare(override(quickstart, {name: text}), tmp_path / text)
            except Exception as error:
                assert of_one_sentence(error), repr(error)
                assert not (tmp_path / text).exists()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"algorithm.entropy_lr": "0.1"}, "entropy_lr needs algorithm.entropy_target"),
        ({"algorithm.entropy_coefficient_max": "1"}, "entropy_coefficient_max needs algorithm."),
        ({"algorithm.beta1": "1"}, "algorithm.beta1=1.0 must lie in [0, 1)"),
        ({"algorithm.beta2": "2"}, "algorithm.beta2=2.0 must lie in [0, 1)"),
        ({"checkpoint.keep": "0"}, "checkpoint.keep=0 must be at least 1"),
        ({"seed": "4294967296"}, "seed=4294967296 must be at most 4.29497e+09"),
        ({"algorithm.grad_clip": "-1"}, "algorithm.grad_clip=-1.0 must not be negative"),
        ({"warmup.batch_size": "0"}, "warmup.batch_size=0 must be at least 1"),
        ({"steps": "1073741824"}, "steps=1073741824 must be at most"),
        ({"rollout.staleness": "100000"}, "rollout.staleness=100000 must be at most 16"),
        ({"model.architecture.head_dim": "7"}, "model: head_dim=7 must be even"),
        ({"model.architecture.hidden_size": "-64"}, "model: hidden_size=-64 must be at least 1"),
        (
            {
                "model.architecture.num_experts": "4",
                "model.architecture.experts_per_token": "5",
                "model.architecture.expert_size": "8",
            },
            "experts_per_token=5 must lie in 1..4",
        ),
        (
            {"model.architecture.num_experts": "4", "model.architecture.experts_per_token": "2"},
            "model: expert_size=0 must be at least 1",
        ),
        ({"name": ""}, "name is empty"),
        (
            {"rollout.mesh.tensor": "0", "rollout.devices": "1"},
            "rollout.mesh.tensor=0 must be at least 1",
        ),
    ],
)
def test_numbers_that_make_no_run_are_refused(quickstart, changes, message):
    with pytest.raises(ValueError) as error:
        override(quickstart, changes)
    assert message in str(error.value) and of_one_sentence(error.value)


@pytest.fixture
def record(quickstart):
    return json.loads(json.dumps(to_json(quickstart)))


def test_a_record_names_functions(record):
    assert record["constraint"]["shaping"] == "dcmdp_jax.constraint.shape_advantage"


def test_a_record_names_the_type_of_a_task(record):
    assert record["data"]["task"] == {"type": "Chain", "operations": 5, "noise": [0.15, 0.2, 0.3]}


def test_a_record_holds_what_a_function_is_made_of(record):
    assert "clip_high" in json.dumps(record["algorithm"]["surrogate"])


def test_a_record_holds_the_numbers_of_an_optax_schedule():
    made = to_json(optax.warmup_cosine_decay_schedule(0.0, 1.0, 10, 100))
    assert made["boundaries"] == [10] and made["schedules"][1]["decay_steps"] == 90


def test_a_record_has_no_address():
    """It would differ in every process, and no run could be resumed."""
    held = object()

    def of_a_closure():
        return held

    assert "0x" not in json.dumps(to_json(of_a_closure))


def test_the_verifier_is_the_task_s_own_unless_there_is_another(quickstart):
    assert quickstart.data.reward_function() == quickstart.data.task.reward
    other = dataclasses.replace(quickstart.data, verifier=max)
    assert other.reward_function() is max


def test_without_a_task_a_verifier_is_needed(quickstart):
    data = dataclasses.replace(quickstart.data, task=None, path="problems.jsonl")
    with pytest.raises(ValueError, match="data.verifier is not set"):
        dataclasses.replace(quickstart, data=data)


def test_a_configuration_is_frozen(quickstart):
    with pytest.raises(dataclasses.FrozenInstanceError):
        quickstart.steps = 1


def test_an_architecture_is_hashable(quickstart):
    hash(quickstart.model.architecture)


def test_an_experiment_file_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        load_experiment(str(tmp_path / "none.py"))


def test_an_experiment_file_without_a_configuration_is_refused(tmp_path):
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(ValueError, match="defines no CONFIG"):
        load_experiment(str(tmp_path / "empty.py"))


def test_an_experiment_names_the_module_it_lacks(tmp_path):
    file = tmp_path / "lacking.py"
    file.write_text("import nothing_of_this_name")
    with pytest.raises(
        ValueError,
        match="lacking.py imports 'nothing_of_this_name', which is neither in its folder nor "
        "installed",
    ):
        load_experiment(str(file))


def test_the_work_folder_of_a_study_is_no_address(capsys):
    study = str(QUICKSTART.parent / "laptop" / "main.py")
    assert cli.main(["study", study, "--workdir", "gs://bucket/run"]) == 2
    assert capsys.readouterr().err == (
        "dcmdp: --workdir gs://bucket/run is no folder here, and a study runs on one machine; give "
        "a path\n"
    )


def test_an_address_that_is_not_read_is_no_workdir(capsys):
    assert cli.main(["train", str(QUICKSTART), "--workdir", "s3://bucket/run"]) == 2
    assert "s3://bucket/run is no address that is read; give a path" in capsys.readouterr().err


@pytest.mark.parametrize(
    "source, said",
    [
        ("x = 1\ny = 1 / 0\n", ", line 2: ZeroDivisionError: division by zero"),
        ("x = 1\nfor\n", ", line 2: SyntaxError: invalid syntax"),
        ("def f():\n    raise KeyError('b')\n\nf()\n", ", line 2: KeyError: 'b'"),
        ("import json\n\njson.loads('{')\n", ", line 3: JSONDecodeError"),
        (
            "from dcmdp_jax.config import EvalConfig, MeshConfig\nMeshConfig(dat=2)\n",
            ", line 2: TypeError",
        ),
        ("import sys\nsys.exit('no')\n", ", line 2: SystemExit: no"),
    ],
)
def test_an_experiment_that_fails_shows_its_own_line(tmp_path, capsys, source, said):
    file = tmp_path / "mine.py"
    file.write_text(source)
    assert cli.main(["train", str(file), "--workdir", str(tmp_path / "run")]) == 2
    _, _, err = capsys.readouterr().err.partition("\n")  # after what was started
    assert err.startswith(f"dcmdp: experiment {file} fails at {file}{said}")
    assert str(pathlib.Path(cli.__file__).parents[1]) not in err
