"""Plans against closed forms: bytes of the state, FLOPs of a pass, what fits; all compiled for a
TPU that is not attached.
"""

import dataclasses
import functools
import itertools
import json
import pathlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcmdp_jax import cli, sharding, train_state
from dcmdp_jax.config import Calibrated, EvalConfig, Lora, MeshConfig, Precision, WarmupConfig
from dcmdp_jax.losses import centering, kl
from dcmdp_jax.models import decoder, inference, lora
from dcmdp_jax.models.model_config import Compute, ModelConfig
from dcmdp_jax.records import Prompts
from dcmdp_jax.rollout import generate
from dcmdp_jax.tools import cost_model, plan, slices
from support.steps import make_config

pytestmark = pytest.mark.full

MODEL = ModelConfig(
    vocab_size=512,
    hidden_size=128,
    intermediate_size=256,
    num_layers=2,
    num_heads=4,
    num_kv_heads=4,
    head_dim=128,
    compute=Compute(bfloat16=True, remat=True),
)
EXPERIMENTS = pathlib.Path(__file__).parents[1] / "experiments"
MOE = dataclasses.replace(MODEL, num_experts=8, experts_per_token=2, expert_size=128)


def configure(model=MODEL, **rollout):
    config = make_config(model, microbatches=2, row_length=0)
    data = dataclasses.replace(config.data, max_prompt_tokens=64, path="problems.jsonl")
    rollout = dataclasses.replace(config.rollout, max_tokens=64, slots=4, devices=-1, **rollout)
    return dataclasses.replace(config, data=data, rollout=rollout)


@pytest.fixture(
    scope="module",
    params=[(MODEL, MeshConfig()), (MOE, MeshConfig(expert=2, fsdp=2))],
    ids=["dense", "moe"],
)
def planned(request):
    """A configuration, its model, and its plan on four chips."""
    model, axes = request.param
    config = dataclasses.replace(configure(model, mesh=MeshConfig(tensor=4)), mesh=axes)
    return config, model, plan.plan_run(config, model, "v5e:2x2")


@pytest.mark.slow
def test_every_program_compiles_and_fits(planned):
    _, _, result = planned
    assert [item.program.name for item in result.programs] == [
        "train step",
        "scoring pass",
        "prefill",
        "decode, 16 tokens",
        "weight sync",
    ]
    assert all(item.peak > item.program.beside and not item.excess for item in result.programs)


@pytest.mark.slow
def test_the_arguments_of_a_step_are_its_state_and_batch(planned):
    config, model, result = planned
    scales = 2 * MODEL.num_layers * (MODEL.hidden_size + MODEL.head_dim) + MODEL.hidden_size
    state = 12 * (cost_model.parameters(model).total + scales) / 4
    mesh = sharding.make_mesh(config.mesh, slices.slice_devices("v5e:2x2"))
    batch = sharding.local_bytes(plan.abstract_batch(config, model, mesh))
    # Small arrays are padded to complete tiles.
    assert abs(result.programs[0].arguments - state - batch) < 0.2 * state


@pytest.mark.slow
def test_a_program_fits_into_its_peak_and_not_into_less(planned):
    _, _, result = planned
    step = result.programs[0]
    enough = plan.compile_program(step.program, result.chip._replace(memory=step.peak))
    too_little = plan.compile_program(step.program, result.chip._replace(memory=step.peak - 2**20))
    assert not enough.excess and "more than" in too_little.excess
    (line, _) = plan.verdict(result._replace(programs=(too_little,)))
    assert "train step does not fit" in line and "microbatches" in line


class Refused:
    """A lowered program that the compiler refuses with a message."""

    def __init__(self, message):
        self.message = message

    def compile(self):
        raise jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: E1000: {self.message}")


def refused(message):
    work = cost_model.Work(1.0, 1.0, 1.0)
    program = plan.Program("train step", Refused(message), work, 1, 0, "algorithm.microbatches")
    return plan.compile_program(program, slices.CHIPS["v5e"])


@pytest.mark.parametrize(
    "message, gibibytes",
    [
        (
            "Ran out of memory in memory space hbm. Used 40.25G of 15.75G hbm. Exceeded by 24.50G.",
            40.25,
        ),
        ("CompileTimeHbmOom: HLO temporaries (2.5T) exceeds available HBM (15.75G).", 2560.0),
    ],
)
def test_a_program_that_the_compiler_refuses_for_its_memory_does_not_fit(message, gibibytes):
    chip = slices.CHIPS["v5e"]
    compiled = refused(message)
    assert compiled.peak == gibibytes * 2**30
    line, _ = plan.verdict(plan.Plan("v5e:2x2", 4, chip, 100, (compiled,)))
    excess = gibibytes - chip.memory / 2**30
    assert line == (
        f"train step does not fit: {excess:.1f} GiB more than the {chip.memory / 2**30:g} of a "
        "chip; change algorithm.microbatches"
    )


def test_a_program_of_some_devices_is_refused_with_the_remedy():
    with pytest.raises(ValueError, match="train step takes some; set rollout.one_engine to yes"):
        refused("limited ICI routing")


def test_another_error_of_the_compiler_is_raised_as_it_is():
    with pytest.raises(jax.errors.JaxRuntimeError, match="a bug"):
        refused("a bug")


@pytest.mark.slow
def test_offloaded_moments_take_no_memory_of_the_chips():
    config = configure()
    algorithm = dataclasses.replace(config.algorithm, offload=True)
    arguments = []
    for each in (config, dataclasses.replace(config, algorithm=algorithm)):
        step = next(plan.programs(each, MODEL, slices.slice_devices("v5e:2x2")))
        arguments.append(plan.compile_program(step, slices.CHIPS["v5e"]).arguments)
    on_chip, offloaded = arguments
    moments = 8 * cost_model.parameters(MODEL).total / 4
    assert abs(on_chip - offloaded - moments) < 0.1 * on_chip


@pytest.mark.slow
def test_the_programs_of_another_sampler_are_left_out():
    config = configure()
    rollout = dataclasses.replace(config.rollout, sampler=lambda *arguments: None)
    config = dataclasses.replace(config, rollout=rollout)
    programs = plan.programs(config, MODEL, slices.slice_devices("v5e:2x2"))
    assert [program.name for program in programs] == ["train step", "scoring pass"]


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["bfloat16", "int8", "float8_e4m3fn", "int4"])
def test_decoding_copies_no_experts(weights):
    """A device has 192 columns of each expert, which do not fill the vectors of 128."""
    model = dataclasses.replace(MOE, hidden_size=2048, num_experts=32, expert_size=768)
    config = configure(model, mesh=MeshConfig(tensor=4), precision=Precision(weights=weights))
    decode = next(
        p
        for p in plan.programs(config, model, slices.slice_devices("v5e:2x2"))
        if p.name.startswith("decode")
    )
    padded = 32 * 2048 * 256 * 2  # bytes of one of a layer's two projections
    assert plan.compile_program(decode, slices.CHIPS["v5e"]).temporaries < padded / 2


def test_a_reference_costs_a_copy_of_the_parameters_and_a_scoring_pass():
    plain = configure()
    near = dataclasses.replace(
        plain, algorithm=dataclasses.replace(plain.algorithm, reference_penalty=kl.k3)
    )
    mesh = sharding.single_device_mesh()
    bytes_of = [
        sharding.local_bytes(train_state.abstract(config, MODEL, mesh)) for config in (plain, near)
    ]
    assert bytes_of[1] - bytes_of[0] == sharding.local_bytes(
        train_state.abstract_params(MODEL, mesh)
    )
    before, after = (
        cost_model.update(MODEL, 4, 128, config, mesh, one_pass=True) for config in (plain, near)
    )
    assert after == before + cost_model.scoring(MODEL, 4, 128, 2, plain, mesh)


class Recorded:
    """An engine that notes the shapes of what it prefills."""

    def __init__(self):
        self.shapes = []

    def prefill(self, *, params, padded_tokens, true_length):
        self.shapes.append(padded_tokens.shape)


@pytest.mark.parametrize("width, prompts", [(1024, 64), (600, 64), (600, 7), (600, 3), (5000, 2)])
def test_a_planned_prefill_is_the_largest_of_a_rollout(width, prompts):
    """Of prompts at their limit; several are padded to a power of two."""
    config = configure()
    config = dataclasses.replace(
        config, data=dataclasses.replace(config.data, max_prompt_tokens=width)
    )
    mesh = sharding.single_device_mesh()
    engine = plan.engine_of(
        config, MODEL, train_state.abstract_params(MODEL, mesh), mesh, 1, prompts
    )
    longest = Prompts(np.zeros((prompts, width)), np.full(prompts, width), ((),) * prompts)
    recorded = Recorded()
    waiting = generate._Waiting(
        recorded, None, longest, 1, generate.PREFILL_TOKENS, generate.SMALLEST_BUCKET
    )
    list(waiting.take(prompts))
    assert max(recorded.shapes) == (engine.at_once, width)
    assert (len(recorded.shapes) > 1) == engine.is_repeated


def test_an_engine_that_rounds_nothing_prefills_the_prompts_of_the_evaluation():
    """They are the run's own engine's, whose weights also lie beside the scoring pass if the run
    measures its tolerance.
    """
    few = configure(mesh=MeshConfig(tensor=4))
    constraint = dataclasses.replace(few.constraint, tolerance=Calibrated())
    data = dataclasses.replace(few.data, eval_path="held_out.jsonl")
    many = dataclasses.replace(
        few, data=data, eval=EvalConfig(every=1, prompts=16), constraint=constraint
    )
    _, scoring, prefill = itertools.islice(plan.programs(few, MODEL, jax.devices()[:4]), 3)
    _, measured, evaluated = itertools.islice(plan.programs(many, MODEL, jax.devices()[:4]), 3)
    prompts = few.data.prompts_per_step
    assert (prefill.calls, evaluated.calls) == (1, -(-prompts // 16))
    assert evaluated.work.flops == prefill.work.flops * 16 / prompts
    weights = 4 * cost_model.parameters(MODEL).total / 4
    assert measured.beside - scoring.beside == pytest.approx(weights, rel=0.05)


def test_flops_of_a_pass_are_the_compilers():
    """Against XLA's count of prefill and head; prefill has no causal half, and ends with the last
    layer's keys and values.
    """
    params = jax.eval_shape(
        lambda: inference.unstack(decoder.init(jax.random.key(0), MODEL), MODEL)
    )
    tokens = jax.ShapeDtypeStruct((1, 512), jnp.int32)
    last = jax.ShapeDtypeStruct((1, 512, 128), jnp.bfloat16)

    def scored(params, tokens, last):
        return inference.prefill(params, tokens, MODEL), decoder.head(params, last, MODEL)

    d = MODEL.hidden_size
    f = MODEL.intermediate_size
    heads = MODEL.num_heads * MODEL.head_dim
    unused = 512 * (2 * (3 * d * f + 2 * d * heads) + 4 * 512 * heads)
    expected = sum(cost_model.forward(MODEL, 512, 512, 512)) - unused
    compilers = jax.jit(scored).lower(params, tokens, last).cost_analysis()["flops"]
    assert expected <= compilers <= 1.1 * expected  # the compiler counts norms and softmax too


@pytest.mark.parametrize("name", ["v9:2x2", "v5p", "v5e:3x5x7"])
def test_unknown_topologies_are_refused(name):
    with pytest.raises(ValueError, match=f"(?i)topology.*{name}"):
        slices.slice_devices(name)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("v5p-128", "counts cores, two a chip; give the shape of its 64 chips, such as v5p:4x4x4"),
        ("v5p-8", "its 4 chips, such as v5p:2x2x1"),
        ("v5litepod-8", "names no shape; give the shape of its 8 chips, such as v5e:2x4"),
        ("v6e-12", "its 12 chips$"),
    ],
)
def test_an_accelerator_type_is_answered_by_the_shape_of_its_chips(name, said):
    with pytest.raises(ValueError, match=said):
        slices.slice_devices(name)


def test_a_v4_chip_is_one_device():
    assert len(slices.slice_devices("v4:2x2x1")) == 4


@pytest.mark.parametrize("name, count", [("v5e:0x2", 1), ("v5e:2x2", 0)])
def test_topologies_without_devices_are_refused(name, count):
    with pytest.raises(ValueError, match="has no devices"):
        slices.slice_devices(name, count)


def test_the_scoring_pass_is_counted_once_or_twice_for_stale_rollouts():
    config = configure(MOE)
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:4])
    stale = dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, staleness=1))

    def update(config, one_pass):
        return cost_model.update(MOE, 4, 128, config, mesh, one_pass).flops

    scoring = cost_model.scoring(MOE, 4, 128, 2, config, mesh).flops
    assert update(config, False) - update(config, True) == pytest.approx(scoring)
    assert update(stale, False) - update(config, True) == pytest.approx(2 * scoring)


def sharing(row_length, **algorithm):
    """16 completions of 64 + 64 tokens, four of a prompt, in two microbatches."""
    config = configure()
    options = {"row_length": row_length} | algorithm
    return dataclasses.replace(config, algorithm=dataclasses.replace(config.algorithm, **options))


GROUP = 63 + 4 * 65  # the tokens of a prompt without its last, and of four branches
PAIR = 63 + 2 * 65


@pytest.mark.parametrize(
    "row_length, share_prompts, rows, is_shared",
    [
        (GROUP, True, 2, True),  # a row for each group of a microbatch
        (GROUP - 1, True, 4, True),  # a group in two rows
        (PAIR - 1, True, 8, False),
        (GROUP, False, 8, False),
    ],
)
def test_the_bound_of_a_batch_has_a_row_for_the_completions_that_share_one(
    row_length, share_prompts, rows, is_shared
):
    config = sharing(row_length, share_prompts=share_prompts)
    batch = plan.abstract_batch(config, MODEL, sharding.single_device_mesh())
    assert batch.tokens.shape == (1, 2, rows, row_length)
    assert (batch.prefix_ids is not None) == is_shared


@pytest.mark.parametrize("row_length, rows", [(GROUP, 2), (GROUP - 1, 4)], ids=["whole", "cut"])
def test_prompts_are_counted_once_a_row_and_completions_once(row_length, rows):
    """A scoring pass by hand: the pairs that attend are those of the prefixes, causal, and of eight
    branches, which attend to a prefix and, causally, to themselves.
    """
    mesh = sharding.single_device_mesh()
    work = cost_model.scoring(MODEL, rows, row_length, 1, sharing(row_length), mesh)
    w = cost_model.parameters(MODEL)
    pairs = rows * 63**2 / 2 + 8 * (65 * 63 + 65**2 / 2)
    attention = 4 * MODEL.num_layers * MODEL.num_heads * MODEL.head_dim * pairs
    assert work.flops == pytest.approx(
        2 * (w.layers + w.routed) * rows * row_length + attention + 2 * w.head * 8 * 64
    )


@pytest.mark.parametrize(
    "algorithm, said",
    [
        (
            {"row_length": GROUP},
            "computed once for 4 of its 4 completions, as many as a row of 323",
        ),
        ({"row_length": GROUP - 1}, "computed once for 3 of its 4 completions"),
        ({"row_length": GROUP, "microbatches": 8}, "computed once for 2 of its 4 completions"),
        ({"row_length": PAIR}, "computed once for 2 of its 4 completions"),
        ({"row_length": PAIR - 1}, "are shared with algorithm.row_length=193 or longer"),
        ({"row_length": 32_769}, "32769 tokens is longer than 32768; prompts are shared with a"),
        ({"row_length": 128, "microbatches": 16}, "a microbatch holds one completion of each"),
        ({"row_length": GROUP, "share_prompts": False}, "algorithm.share_prompts=False"),
    ],
)
def test_the_plan_says_how_often_a_prompt_is_computed(algorithm, said):
    assert said in plan.prompts_shared(sharing(**algorithm))


def test_the_plan_says_where_no_row_can_share_a_prompt():
    config = sharing(0)
    rollout = dataclasses.replace(config.rollout, max_tokens=16_384)
    said = plan.prompts_shared(dataclasses.replace(config, rollout=rollout))
    assert "take a row of 32833 tokens, and prompts are shared in rows of at most 32768" in said


def test_decoding_reads_the_experts_that_are_chosen():
    """With 2 of 8 experts a token, 4 slots leave (3/4)^4 of them unread."""
    one_chip = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    rollout = dataclasses.replace(configure(MOE).rollout, tokens_per_dispatch=1)

    def bytes_of_weights(slots):
        position = 2 * MOE.num_layers * MOE.num_kv_heads * MOE.head_dim * 2
        read = cost_model.decode(MOE, rollout, slots, 128, one_chip).memory
        return read - position * 128 * slots  # the cache is one block

    experts = 4 * cost_model.parameters(MOE).experts
    expected = ((1 - 0.75**4) - 0.25) * experts
    assert bytes_of_weights(4) - bytes_of_weights(1) == pytest.approx(expected)


@pytest.mark.parametrize(
    "kind, copied", [("TPU v5 lite", False), ("TPU v5", False), ("TPU v4", True)]
)
def test_experts_that_a_chip_does_not_multiply_as_stored_are_copied(kind, copied):
    """All of them are read and written in bfloat16; the copy is read where chosen, as bfloat16
    experts are.
    """
    one_chip = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    chip = types.SimpleNamespace(device_kind=kind)
    mesh = types.SimpleNamespace(devices=np.array([chip]), shape=one_chip.shape, size=1)
    model = dataclasses.replace(MOE, compute=Compute(bfloat16=True))

    def bytes_of(weights):
        once = dataclasses.replace(
            configure(model).rollout, tokens_per_dispatch=1, precision=Precision(weights)
        )
        return cost_model.decode(model, once, 4, 128, mesh).memory

    w = cost_model.parameters(model)
    saved = w.layers + (-3 if copied else 1 - 0.75**4) * w.experts
    assert bytes_of("bfloat16") - bytes_of("float8_e4m3fn") == pytest.approx(saved, rel=1e-3)


def long(model, **rollout):
    """A configuration whose completions of 3,000 tokens follow prompts of 1,000."""
    config = configure(model, **rollout)
    data = dataclasses.replace(config.data, max_prompt_tokens=1000)
    rollout = dataclasses.replace(config.rollout, max_tokens=3000, devices=0)
    return dataclasses.replace(config, data=data, rollout=rollout)


@pytest.mark.parametrize("cache", ["", "int8"])
def test_decoding_reads_the_blocks_that_hold_tokens(cache):
    """By hand, token by token, for blocks of 1,024 positions; the last ends with the cache. Scales
    take four bytes, and all of them are copied.
    """
    rollout = long(MODEL, precision=Precision(cache=cache)).rollout
    held = range(1000, 4000)  # tokens in the cache when each of the new ones is computed
    read = sum(min(-(-n // 1024) * 1024, 4000) for n in held) / 3000
    assert cost_model.positions_read(MODEL, rollout, 4000, 1) == pytest.approx(read)
    elements, scales = (128 * read, 4 * (read + 2 * 4000)) if cache else (256 * read, 0)
    one_chip = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    once = dataclasses.replace(rollout, tokens_per_dispatch=1)
    one, two = (cost_model.decode(MODEL, once, n, 4000, one_chip).memory for n in (1, 2))
    assert two - one == pytest.approx(2 * MODEL.num_layers * 4 * (elements + scales))


def test_without_the_kernel_decoding_reads_one_window():
    """1,000 to 1,024 tokens in a window of 1,024, up to 2,048 in one of as many, the rest in all
    4,000; the window has room for the 8 tokens of a dispatch.
    """
    narrow = dataclasses.replace(MODEL, head_dim=64)
    rollout = long(narrow, tokens_per_dispatch=8).rollout
    expected = (3 * 1024 + 128 * 2048 + (375 - 131) * 4000) / 375
    assert cost_model.positions_read(narrow, rollout, 4000, 1) == pytest.approx(expected)


def test_the_plan_says_what_decoding_reads():
    said = plan.decode_reads(long(MODEL), MODEL)
    assert said.startswith("a decode step reads the blocks of each slot that hold tokens: 2,")
    assert "of 4,000 cached positions" in said
    narrow = dataclasses.replace(MODEL, head_dim=64)
    assert "a multiple of 128, and this one has 64" in plan.decode_reads(long(narrow), narrow)


def test_the_step_of_a_supervised_stage_is_planned():
    """With the work of an update of as many completions, one to a row; also of a run whose
    rollouts report more and are refilled.
    """
    config = configure(top_logprobs=2)
    data = dataclasses.replace(config.data, max_refills=1)
    algorithm = dataclasses.replace(config.algorithm, surrogate=centering.centred)
    rollout = dataclasses.replace(
        config.rollout, staleness=1, in_flight=True, server="http://127.0.0.1:1"
    )
    config = dataclasses.replace(config, data=data, algorithm=algorithm, rollout=rollout)
    stage = WarmupConfig(path="pairs.jsonl", steps=1, batch_size=8, microbatches=2)
    config = dataclasses.replace(config, warmup=stage)
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:4])
    programs = plan.programs(config, MODEL, jax.devices()[:4])
    stage = next(program for program in programs if program.name == "warm-up step")
    data = dataclasses.replace(data, prompts_per_step=2)  # with four completions each
    rollout = dataclasses.replace(rollout, staleness=0, in_flight=False)
    as_many = dataclasses.replace(config, data=data, rollout=rollout)
    assert stage.work.flops == cost_model.update(MODEL, 4, 128, as_many, mesh, True).flops
    assert stage.calls == 0 and "warmup.microbatches" in stage.settings


def test_four_bits_are_half_a_byte_of_a_chip():
    place = jax.sharding.SingleDeviceSharding(slices.slice_devices("v5e:1x1")[0])
    weights = jax.ShapeDtypeStruct((512, 1024), jnp.uint4, sharding=place)
    compiled = jax.jit(lambda w: w.astype(jnp.int8)).lower(weights).compile()
    assert compiled.memory_analysis().argument_size_in_bytes == sharding.local_bytes(weights)


def test_the_largest_weight_of_8b_is_rounded_to_four_bits_on_one_chip():
    """As a model folder is read onto it: beside the weight and the result there is one layer."""
    place = jax.sharding.SingleDeviceSharding(slices.slice_devices("v5e:1x1")[0])
    weight = jax.ShapeDtypeStruct((36, 4096, 12_288), jnp.float32, sharding=place)
    settings = Lora(rank=1, base="nf4", base_group=64)
    freeze = functools.partial(lora.freeze_weight, (jax.tree_util.DictKey("up_proj"),))
    lowered = jax.jit(functools.partial(freeze, lora=settings)).lower(weight)
    assert lowered.compile().memory_analysis().temp_size_in_bytes < slices.GIB


def test_links_follow_one_convention():
    """The sum over a chip's links, in one direction: six of a v4 or v5p, four of a v5e or v6e."""
    assert {kind: slices.CHIPS[kind].link for kind in ("v4", "v5p", "v5e", "v6e")} == {
        "v4": 6 * 45e9,
        "v5p": 6 * 100e9,
        "v5e": 4 * 50e9,
        "v6e": 4 * 100e9,
    }


def test_a_mesh_that_does_not_fit_is_refused_before_compiling(capsys):
    experiment = str(EXPERIMENTS / "pods" / "dcgrpo_8b_bf16.py")
    assert cli.main(["plan", experiment, "--topology", "v5e:2x2", "--mesh.tensor", "3"]) == 2
    assert "does not make 4, the number of devices" in capsys.readouterr().err


def test_link_bytes_are_gathered_weights_and_tokens_sent_to_experts():
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


@pytest.fixture
def small_plan():
    """Two calls of a program that takes a second each."""
    work = cost_model.Work(459e12, 0, 0)
    program = plan.Program("train step", None, work, 2, 0, "x")
    compiled = plan.Compiled(program, 1, 2, 3, 0.5, "")
    return plan.Plan("v5p:2x2x1", 4, slices.CHIPS["v5p"], 400, (compiled,))


def test_the_record_has_the_figures(small_plan, tmp_path):
    plan.write(small_plan, tmp_path / "plan.json")
    [row] = json.loads((tmp_path / "plan.json").read_text())["programs"]
    assert row["seconds"] == 1 and row["calls"] == 2 and row["peak"] == 3


def test_the_verdict_is_a_roofline_lower_bound(small_plan):
    assert plan.verdict(small_plan)[-1] == (
        "a constrained step of 400 sampled tokens takes at least 2 s (roofline lower bound), at "
        "most 50 tokens/s a device"
    )
