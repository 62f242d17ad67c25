"""Plans against closed forms: bytes of the state, FLOPs of a pass, what fits; all compiled for a
TPU that is not there.
"""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import pytest

from dcmdp_jax import cli, sharding
from dcmdp_jax.config import MeshConfig, ModelConfig, Precision
from dcmdp_jax.models import decoder
from dcmdp_jax.tools import cost_model, plan
from support.steps import make_config

MODEL = ModelConfig(
    vocab_size=512,
    hidden_size=128,
    intermediate_size=256,
    num_layers=2,
    num_heads=4,
    num_kv_heads=4,
    head_dim=128,
    bfloat16=True,
    remat=True,
)
EXPERIMENTS = pathlib.Path(__file__).parents[1] / "experiments"
QUICKSTART = str(EXPERIMENTS / "quickstart.py")
MOE = dataclasses.replace(MODEL, num_experts=8, experts_per_token=2, expert_size=128)


def configure(model=MODEL, **rollout):
    config = make_config(model, microbatches=2)
    data = dataclasses.replace(config.data, max_prompt_tokens=64, path="problems.jsonl")
    rollout = dataclasses.replace(config.rollout, max_tokens=64, slots=4, devices=-1, **rollout)
    return dataclasses.replace(config, data=data, rollout=rollout)


@pytest.mark.slow
@pytest.mark.parametrize(
    "model, axes",
    [(MODEL, MeshConfig()), (MOE, MeshConfig(expert=2, fsdp=2))],
    ids=["dense", "moe"],
)
def test_every_program_compiles(model, axes):
    config = dataclasses.replace(configure(model, mesh=MeshConfig(tensor=4)), mesh=axes)
    found = plan.plan_run(config, model, "v5e:2x2")
    assert [item.program.name for item in found.programs] == [
        "train step",
        "scoring pass",
        "prefill",
        "decode, 16 tokens",
        "weight sync",
    ]
    assert all(item.peak > item.program.beside and not item.excess for item in found.programs)
    step = found.programs[0]
    scales = 2 * MODEL.num_layers * (MODEL.hidden_size + MODEL.head_dim) + MODEL.hidden_size
    state = 12 * (cost_model.parameters(model).total + scales) / 4
    batch = sharding.local_bytes(
        plan.abstract_batch(config, model, sharding.make_mesh(axes, plan.slice_devices("v5e:2x2")))
    )
    # small arrays are padded to whole tiles
    assert abs(step.arguments - state - batch) < 0.2 * state
    roomy = plan.compile_program(step.program, found.chip._replace(memory=step.peak))
    tight = plan.compile_program(step.program, found.chip._replace(memory=step.peak - 2**20))
    assert not roomy.excess and "more than" in tight.excess
    assert any(
        "train step does not fit" in line and "microbatches" in line
        for line in plan.verdict(found._replace(programs=(tight,)))
    )


@pytest.mark.parametrize(
    "said, gigabytes",
    [
        (
            "Ran out of memory in memory space hbm. Used 40.25G of 15.75G hbm. Exceeded by 24.50G.",
            40.25,
        ),
        ("CompileTimeHbmOom: HLO temporaries (2.5T) exceeds available HBM (15.75G).", 2560.0),
    ],
)
def test_a_program_that_the_compiler_refuses_for_want_of_memory_does_not_fit(said, gigabytes):
    class Lowered:
        def compile(self):
            raise jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: E1000: {said}")

    work = cost_model.Work(1.0, 1.0, 1.0)
    program = plan.Program("train step", Lowered(), work, 1, 0, "algorithm.microbatches")
    chip = plan.CHIPS["v5e"]
    found = plan.compile_program(program, chip)
    assert found.peak == gigabytes * 2**30
    line, _ = plan.verdict(plan.Plan("v5e:2x2", 4, chip, 100, (found,)))
    more = gigabytes - chip.memory / 2**30
    assert line == (
        f"train step does not fit: {more:.1f} GiB more than the {chip.memory / 2**30:.0f} of a chip; "
        "turn algorithm.microbatches"
    )


@pytest.mark.slow
def test_offloaded_moments_leave_the_chips():
    config = configure()
    devices = plan.slice_devices("v5e:2x2")
    away = dataclasses.replace(
        config, algorithm=dataclasses.replace(config.algorithm, offload=True)
    )
    here, there = (
        plan.compile_program(next(plan.programs(c, MODEL, devices)), plan.CHIPS["v5e"])
        for c in (config, away)
    )
    assert (
        abs(here.arguments - there.arguments - 8 * cost_model.parameters(MODEL).total / 4)
        < 0.1 * here.arguments
    )


@pytest.mark.slow
def test_decoding_copies_no_experts():
    """A device has 192 columns of each expert, which are no whole vectors."""
    model = dataclasses.replace(MOE, hidden_size=2048, num_experts=32, expert_size=768)
    config = configure(model, mesh=MeshConfig(tensor=4), precision=Precision(weights="bfloat16"))
    decode = next(
        p
        for p in plan.programs(config, model, plan.slice_devices("v5e:2x2"))
        if p.name.startswith("decode")
    )
    padded = 32 * 2048 * 256 * 2  # bytes of one of a layer's two
    assert plan.compile_program(decode, plan.CHIPS["v5e"]).temporaries < padded / 2


def test_flops_of_a_pass_are_the_compilers():
    """Against XLA's count of prefill and head; prefill has no causal half, and ends with the last
    layer's keys and values.
    """
    params = jax.eval_shape(lambda: decoder.unstack(decoder.init(jax.random.key(0), MODEL), MODEL))
    tokens = jax.ShapeDtypeStruct((1, 512), jnp.int32)
    last = jax.ShapeDtypeStruct((1, 512, 128), jnp.bfloat16)

    def scored(params, tokens, last):
        return decoder.prefill(params, tokens, MODEL), decoder.head(params, last, MODEL)

    d = MODEL.hidden_size
    f = MODEL.intermediate_size
    heads = MODEL.num_heads * MODEL.head_dim
    unused = 512 * (2 * (3 * d * f + 2 * d * heads) + 4 * 512 * heads)
    counted = sum(cost_model.forward(MODEL, 512, 512, 512)) - unused
    found = jax.jit(scored).lower(params, tokens, last).cost_analysis()["flops"]
    assert counted <= found <= 1.1 * counted  # the compiler counts norms and softmax, too


def test_unknown_topologies_are_refused():
    for name in ("v9:2x2", "v5p", "v5e:3x5x7"):
        with pytest.raises(ValueError, match=f"(?i)topology.*{name}"):
            plan.slice_devices(name)
    for name, slices in (("v5e:0x2", 1), ("v5e:2x2", 0)):
        with pytest.raises(ValueError, match="has no devices"):
            plan.slice_devices(name, slices)


@pytest.mark.parametrize(
    "words, named",
    [
        (["--rollout.precision.weights", "int5"], "precision.weights='int5' is not one of"),
        (["--json", "nowhere/plan.json"], "nowhere/plan.json: its folder does not exist"),
    ],
)
def test_what_cannot_work_is_refused_before_compiling(words, named, capsys):
    assert cli.main(["plan", QUICKSTART, "--topology", "v5e:2x2", *words]) == 2
    assert named in capsys.readouterr().err


FOLDER = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rope_theta": 1e6,
    "max_position_embeddings": 100,
}


@pytest.mark.parametrize(
    "words, named",
    [
        ("--rollout.slots 6", "rollout.slots=6 does not divide over the mesh's 4 batch shards"),
        (
            "--rollout.max_tokens 60",
            "rollout.max_tokens = 110 positions are more than the model's 100",
        ),
        (
            "--algorithm.replay_routing yes",
            "replays the choices of a router, and this model is dense",
        ),
        ("--rollout.devices 3", "rollout.slots=64 does not divide over the mesh's 3 batch shards"),
        ("--rollout.devices 5", "rollout.devices=5 are more than the 4 there are"),
        ("--mesh.tensor 4", "kv_heads axis of size 2 does not divide over mesh.tensor=4"),
        (
            "--rollout.precision.experts_per_token 2",
            "precision.experts_per_token=2 must lie in 1..0",
        ),
        ("--algorithm.microbatches 3", "completions do not divide into"),
        ("--rollout.precision.group 7", "group"),
        ("--warmup.steps 3", "warmup needs data.task"),
        ("--seed -1", "seed=-1 must not be negative"),
        ("--rollout.staleness 99", "rollout.staleness=99 must be at most 16"),
    ],
)
def test_what_train_refuses_is_not_compiled(words, named, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(plan, "compile_program", None)
    (tmp_path / "config.json").write_text(json.dumps(FOLDER))
    gsm8k = str(pathlib.Path(QUICKSTART).with_name("gsm8k.py"))
    fitting = (
        "--data.path later.jsonl --rollout.samples 2 --algorithm.microbatches 2 "
        "--data.max_prompt_tokens 50 --rollout.max_tokens 50 --rollout.slots 64"
    )
    assert (
        cli.main(
            [
                "plan",
                gsm8k,
                "--topology",
                "v5e:2x2",
                "--model.folder",
                str(tmp_path),
                *fitting.split(),
                *words.split(),
            ]
        )
        == 2
    )
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("dcmdp: ") and named in said


@pytest.mark.parametrize(
    "words, named",
    [
        (
            "--model.architecture.vocab_size 10",
            "the tokenizer has 18 ids but the model's vocab_size is 10",
        ),
        (
            "--data.max_prompt_tokens 5",
            "a prompt has 12 tokens, more than data.max_prompt_tokens=5",
        ),
        ("--data.task.operations 1", "too few problems to hold out 512"),
    ],
)
def test_a_generated_task_is_asked_before_compiling(words, named, capsys, monkeypatch):
    monkeypatch.setattr(plan, "compile_program", None)
    assert cli.main(["plan", QUICKSTART, "--topology", "v5e:2x2", *words.split()]) == 2
    assert named in capsys.readouterr().err


def test_stale_rollouts_are_scored_twice_and_experts_are_read_as_they_are_chosen():
    """By hand: with 2 of 8 experts a token, 4 slots leave (3/4)^4 of them unread."""
    config = configure(MOE)
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:4])
    scoring = cost_model.scoring(MOE, 4, 128, 2, config, mesh).flops
    stale = dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, staleness=1))
    one, fresh, aged = (
        cost_model.update(MOE, 4, 128, *rest).flops
        for rest in ((config, mesh, True), (config, mesh, False), (stale, mesh, False))
    )
    assert fresh - one == pytest.approx(scoring) and aged - one == pytest.approx(2 * scoring)
    alone = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    rollout = dataclasses.replace(config.rollout, tokens_per_dispatch=1)
    experts = 4 * cost_model.parameters(MOE).experts

    def without_cache(slots):
        position = 2 * MOE.num_layers * MOE.num_kv_heads * MOE.head_dim * 2
        read = cost_model.decode(MOE, rollout, slots, 128, alone).memory
        return read - position * (128 - 64 / 2) * slots

    assert without_cache(4) - without_cache(1) == pytest.approx(((1 - 0.75**4) - 0.25) * experts)


def test_links_follow_one_convention():
    """The sum over a chip's links, one way; a v4 and a v5p have six, a v5e and a v6e four."""
    assert {kind: plan.CHIPS[kind].link for kind in ("v4", "v5p", "v5e", "v6e")} == {
        "v4": 6 * 45e9,
        "v5p": 6 * 100e9,
        "v5e": 4 * 50e9,
        "v6e": 4 * 100e9,
    }


def test_a_mesh_that_does_not_fit_is_refused_before_compiling(capsys):
    experiment = str(EXPERIMENTS / "pods" / "dcgrpo_8b_bf16.py")
    assert cli.main(["plan", experiment, "--topology", "v5e:2x2", "--mesh.tensor", "3"]) == 2
    assert "does not make 4, the number of devices" in capsys.readouterr().err


def test_experts_travel_and_weights_are_gathered():
    """Bytes over the links by hand, for one scoring pass on a mesh of 2 x 2."""
    config = dataclasses.replace(configure(MOE), mesh=MeshConfig(expert=2, fsdp=2))
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:4])
    work = cost_model.scoring(MOE, 4, 128, 1, config, mesh)
    d = 128
    f = 128
    e = 8
    k = 2
    layers = 2
    attention = 4 * d * 4 * 128
    gathered = (
        2 * 3 / 4 * (layers * (attention + d * e) + 512 * d) + 2 / 2 * layers * (e // 2) * 3 * d * f
    )
    sent = 2 * (4 * 128 / 4) * k * d * 2 * layers / 2
    assert work.link == gathered + sent


def test_json_has_what_the_table_shows(tmp_path):
    item = plan.Compiled(
        plan.Program("train step", None, cost_model.Work(459e12, 0, 0), 2, 0, "x"), 1, 2, 3, 0.5, ""
    )
    made = plan.Plan("v5p:2x2x1", 4, plan.CHIPS["v5p"], 400, (item,))
    plan.write(made, tmp_path / "plan.json")
    [row] = json.loads((tmp_path / "plan.json").read_text())["programs"]
    assert row["seconds"] == 1 and row["calls"] == 2 and row["peak"] == 3
    assert "takes 2 s at the roof, 50 tokens/s a device" in plan.verdict(made)[-1]
