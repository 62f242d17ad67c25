"""The configuration of a run: frozen dataclasses that hold every default.

An experiment is a Python file with one `CONFIG = Config(...)`. Functions are passed as functions
(`surrogate=losses.corrections.decoupled(losses.policy.clipped)`), never by name. The command line
overrides scalar fields by dotted name (see `experiment`).
"""

from __future__ import annotations

import dataclasses
import functools
import numbers
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from dcmdp_jax import limits
from dcmdp_jax.models.model_config import Compute, ModelConfig
from dcmdp_jax.tasks import Task

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters (LoRA, arXiv 2106.09685): they alone are trained, and the starting params
    stay frozen.

        W + alpha / rank * (down @ up)

    W is a projection or an expert, down [inputs, rank] starts uniform within +-inputs^-0.5, and
    up [rank, outputs] at 0.
    """

    rank: int = 0  # 0: no adapters, all parameters are trained
    alpha: float = 32.0
    targets: tuple[str, ...] = PROJECTIONS  # those that get adapters, experts included
    folder: str = ""  # adapters to start from, in PEFT's format; empty: new ones
    # Format of the frozen targets, of `models.quantized.FORMATS` (QLoRA, arXiv 2305.14314), and
    # its weights that share a scale, as `Precision.group`. Unless it is float32, the other frozen
    # projections, embedding and head are bfloat16.
    base: str = "float32"
    base_group: int = 0


@dataclass(frozen=True)
class ModelSource:
    """Where the model comes from: a Hugging Face folder, or an architecture with random weights."""

    folder: str = ""
    tokenizer: str = ""  # a folder or file; empty: the model's folder
    architecture: ModelConfig | None = None  # used if no folder is given
    compute: Compute = Compute()
    lora: Lora = Lora()
    # For training something else of your own; set both or neither.
    # (params, key) -> the tree that is trained; the starting params then stay frozen
    trainable: Callable | None = None
    # (trained, frozen) -> the decoder's params, which are scored, sampled from and exported
    policy_params: Callable | None = None

    def __post_init__(self):
        if self.architecture is not None and self.architecture.compute != Compute():
            raise ValueError("model.architecture.compute is not read; set model.compute instead")


@dataclass(frozen=True)
class DataConfig:
    """The problems, and the reward of a completion."""

    # (example, text) -> reward, and `stopped` or `length` by name if it has such parameters (see
    # rewards.score); None: the task's own
    verifier: Callable[..., float] | None = None
    # seconds that the verifier has for a completion, in processes of its own (see rewards.score);
    # 0: it runs in the trainer's process, without a limit
    verifier_timeout: float = 0.0
    verifier_processes: int = 4  # in each process of the run, if there is a time limit
    # Rounds in which prompts whose completions all earn the same are replaced by further prompts
    # (DAPO's dynamic sampling). What is left after the last is trained on, with advantages of 0
    max_refills: int = 0
    path: str = ""  # JSONL or Parquet; empty: `task`
    task: Task | None = None  # generated problems, e.g. `tasks.Chain()`
    eval_path: str = ""  # held-out problems; empty: those of `task`, if problems come from it
    prompts_per_step: int = 16  # B, over all processes
    max_prompt_tokens: int = 512  # longer problems are left out
    shuffle: bool = True
    chat: bool = False  # wrap prompts in the tokenizer's chat template
    enable_thinking: bool = False  # passed to the chat template
    instruction: str = ""  # follows each user message on a line of its own
    special_tokens_in_text: bool = False  # special tokens written in a message are ids, not text

    def reward_function(self) -> Callable[..., float]:
        """Returns `verifier`, or the task's own reward if it is None."""
        return self.task.reward if self.verifier is None else self.verifier


@dataclass(frozen=True)
class MeshConfig:
    """Number of devices along each mesh axis; their product is the number of devices.

    fsdp=0 takes all the devices that the other axes leave.
    """

    data: int = 1
    fsdp: int = 0
    expert: int = 1
    sequence: int = 1
    tensor: int = 1


@dataclass(frozen=True)
class Precision:
    """Number formats of the engine, by their names in `models.quantized.FORMATS`.

    An empty string is the trainer's own format.
    """

    weights: str = "float32"  # attention and FFN projections, experts included
    # weights that share a scale; 0: those of an output channel, -1: all of the tensor,
    # n: n consecutive inputs of an output channel
    group: int = 0
    activations: str = ""  # inputs of the projections, one scale per token
    cache: str = ""  # keys and values, one scale per position and head
    embed: str = ""  # one scale per vocabulary entry
    head: str = ""  # as `embed`
    router: str = ""  # not scaled
    norms: str = ""  # not scaled
    experts_per_token: int = 0  # chosen by the engine's router; 0: as many as the trainer's


@dataclass(frozen=True)
class RolloutConfig:
    """The engine that samples."""

    samples: int = 8  # G
    max_tokens: int = 512  # T
    temperature: float = 1.0
    top_k: int = 0  # for this and the next two see records.Sampling
    top_p: float = 1.0
    min_p: float = 0.0
    # texts that end a completion, in addition to the tokenizer's stop tokens
    stop_strings: tuple[str, ...] = ()
    precision: Precision = Precision()
    # k, the likeliest tokens at each place whose log-probs the sampler reports, for a surrogate
    # that takes them (losses.centering.centred); 0: none
    top_logprobs: int = 0
    # the engine samples with the weights of so many constrained steps ago
    staleness: int = 0
    slots: int = 64  # sequences decoded together, over all processes
    tokens_per_dispatch: int = 16  # K
    # 0: train and sample on the same mesh. n > 0: the last n devices only sample (each process
    # gives its share of them). -1: all devices do both, with rollout.mesh as the sampling mesh.
    devices: int = 0
    mesh: MeshConfig = MeshConfig()  # of each process's sampling devices, if `devices` is not 0
    # one engine spanning all processes (they decode in lockstep) instead of one per process; `mesh`
    # then covers all sampling devices
    one_engine: bool = False
    # Something else that samples; neither: rollout.jetstream.sampler, which alone reads slots,
    # tokens_per_dispatch and precision.
    # (config, model, tokenizer, mesh) -> records.Sampler
    sampler: Callable | None = None
    server: str = ""  # http://HOST:PORT of a vLLM, SGLang or llama.cpp server
    # where weights are written for the server, which sees it under the same path; empty: a
    # temporary folder of this machine
    weights_folder: str = ""

    @property
    def own_engine(self) -> bool:
        """True if the library's own engine samples."""
        return self.sampler is None and not self.server


@dataclass(frozen=True)
class AlgorithmConfig:
    """From rewards to a gradient, and from the gradient to an update."""

    # (reward [N], group [N], *, num_groups) -> [N]; given `mask` [N, T] if it has such a parameter,
    # and then it may return [N, T]
    advantage: Callable
    # (logp, old_logp, rollout_logp, advantage, mask) -> loss [N, T], denominator mask [N, T]
    surrogate: Callable
    reduce: Callable  # (loss, mask) -> scalar, linear in the loss
    # (reward [N], length [N], truncated [N], group [N], *, num_groups) -> the reward [N] that
    # advantages are made of, such as one with losses.advantages.overlong_penalty; None: as it is
    reward_shaping: Callable | None = None
    # (mask [N, T], reward [N], truncated [N], group [N], *, num_groups) -> the tokens of `mask`
    # that are trained and measured, such as losses.advantages.overlong_mask(mask, truncated)
    mask: Callable | None = None
    # (logp, ref_logp, mask) or (logp, old_logp, ref_logp, mask) -> [N, T], reduced over the mask
    # and added to the loss: any of losses.kl. None: no reference policy
    reference_penalty: Callable | None = None
    reference_coefficient: float = 1.0  # times the penalty
    # the penalty's sum over a completion is taken from its shaped reward before the advantage,
    # without a gradient, and is not added to the loss
    reference_in_reward: bool = False
    reference_folder: str = ""  # the reference's weights; empty: those that the run starts with
    # (what is trained of the reference, of the policy, steps taken) -> that of the reference after
    # a step: reference.ema(0.99), reference.reset_every(100). None: the reference stays as it is
    reference_update: Callable | None = None
    # times the mean entropy of the policy, taken from the loss; with entropy_target where it starts
    entropy_coefficient: float = 0.0
    # nats per token: the coefficient rises by entropy_lr times what the entropy lacks, and falls
    # where it is above; 0: the coefficient is constant
    entropy_target: float = 0.0
    entropy_lr: float = 0.01
    entropy_coefficient_max: float = 0.1
    # (old_logp, rollout_logp, advantage, mask) -> bool [], of a batch that the weights after a step
    # sampled, such as losses.step_size.accept: False undoes that step's updates, the optimizer's
    # state included, and the batch makes none. None: they all stay
    accept: Callable | None = None
    # (AlgorithmConfig) -> optax.GradientTransformation; None: optimizers.adamw
    optimizer: Callable | None = None
    minibatches: int = 1  # M optimizer updates per rollout batch and epoch
    microbatches: int = 1  # A gradients accumulated per update
    epochs: int = 1
    row_length: int = 0  # S of the packed rows; 0: max_prompt_tokens + max_tokens
    # the trainer routes each token to the experts that the engine chose (arXiv 2510.11370)
    replay_routing: bool = False
    learning_rate: float = 1e-6
    lr_warmup_steps: int = 0
    # (updates made) -> factor of the learning rate: any optax schedule, such as
    # optax.cosine_decay_schedule(1.0, 1000). None: 1
    schedule: Callable | None = None
    # (logp, rollout_logp, mask, steps taken) -> scalar that multiplies the step's updates, so that
    # the learning rate follows what the batch shows; logp at the weights before the step. None: 1
    update_scale: Callable | None = None
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.0
    grad_clip: float = 1.0  # largest global norm of the gradient; 0: no clipping
    max_skipped: int = 3  # stop the run after so many steps in a row without an update; 0: never
    offload: bool = False  # keep the optimizer's moments in host memory between updates
    # the trainer's forward pass has the weights in the formats of rollout.precision too, with a
    # straight-through gradient: delta is round-off
    quantize_aware: bool = False


@dataclass(frozen=True)
class Calibrated:
    """The run measures the tolerance itself, at its starting weights.

    See `constraint.calibrate_tolerance`.
    """

    slack: float = 0.2  # tolerance = measured floor * (1 + slack)
    batches: int = 4  # rollout batches of the measurement


@dataclass(frozen=True)
class ConstraintConfig:
    """The constraint of max E[reward] s.t. E[delta] <= tolerance, and its multiplier."""

    # (advantage, old_logp, rollout_logp, multiplier, tolerance, mask) -> [N, T]; None: the
    # advantages stay as they are
    shaping: Callable | None
    dual: Callable  # (dual_lr, multiplier_init, multiplier_max) -> constraint.Controller
    # c; with `Calibrated(slack=0.2)` the run measures it before its first step
    tolerance: float | Calibrated
    dual_lr: float = 1.0
    multiplier_init: float = 0.1
    multiplier_max: float = 1.0
    # (logp, rollout_logp, mask, multiplier) -> [N, T], added to the loss; its denominator counts
    # rejected tokens too; None: no penalty
    penalty: Callable | None = None


@dataclass(frozen=True)
class WarmupConfig:
    """Supervised learning before reinforcement learning: of the completions of a file, or of the
    task's own solutions.
    """

    path: str = ""  # JSONL or Parquet of pairs or chat messages; empty: solutions of `data.task`
    steps: int = 0  # 0: no warm-up
    batch_size: int = 128  # pairs of a step, over all processes
    microbatches: int = 1  # gradients accumulated per step, if `path` is set
    learning_rate: float = 1e-5


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation on held-out problems, by the engine as it is and by an exact one.

    With `rollout.sampler` or `rollout.server` set, by that sampler alone.
    """

    every: int = 20  # steps; 0: never
    prompts: int = 512
    temperature: float = 1.0


@dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written, and how many stay."""

    every: int = 50  # steps; 0: only at the end and on interruption
    keep: int = 2  # the newest ones


@dataclass(frozen=True)
class Config:
    """A run. Raises ValueError on values that no run can have."""

    name: str  # of the run's folder, runs/NAME
    model: ModelSource
    data: DataConfig
    rollout: RolloutConfig
    algorithm: AlgorithmConfig
    constraint: ConstraintConfig
    steps: int  # constrained steps
    seed: int = 0
    warmup: WarmupConfig = field(default_factory=WarmupConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    tensorboard: bool = False
    wandb: bool = False

    def __post_init__(self):
        _validate(self)

    @property
    def row_length(self) -> int:
        """S of the packed rows."""
        return self.algorithm.row_length or self.data.max_prompt_tokens + self.rollout.max_tokens


# Smallest and largest value of a number. Numbers that are not listed have a rule of their own in
# `_validate`, in ModelConfig or in the task.
_RANGES: dict[str, tuple[float, float]] = {
    "steps": (1, 2**30 - 1),  # the state counts them in int32
    "seed": (0, 2**32 - 1),
    "data.verifier_timeout": (0, 1e6),
    "data.verifier_processes": (1, 2**10),
    "data.max_refills": (0, 2**10 - 1),
    "model.lora.rank": (0, 2**16),
    "model.lora.alpha": (1e-6, limits.MAX_FLOAT),
    "model.lora.base_group": (-1, 2**24),
    "data.prompts_per_step": (1, 2**20),
    "data.max_prompt_tokens": (1, 2**24),
    "rollout.samples": (1, 2**20),
    "rollout.max_tokens": (1, 2**24),
    "rollout.slots": (1, 2**16),
    "rollout.tokens_per_dispatch": (1, 2**12),
    "rollout.temperature": (1e-6, 1e6),
    "rollout.top_k": (0, limits.MAX_INT),
    "rollout.top_logprobs": (0, 1024),
    "rollout.precision.group": (-1, 2**24),
    "rollout.precision.experts_per_token": (0, 2**16),
    "rollout.staleness": (0, 16),  # each is a copy of the parameters
    "algorithm.minibatches": (1, 2**20),
    "algorithm.microbatches": (1, 2**20),
    "algorithm.epochs": (1, 2**20),
    "algorithm.row_length": (0, 2**24),
    "algorithm.reference_coefficient": (0, limits.MAX_FLOAT),
    "algorithm.entropy_coefficient": (0, limits.MAX_FLOAT),
    "algorithm.entropy_target": (0, limits.MAX_FLOAT),
    "algorithm.entropy_lr": (0, limits.MAX_FLOAT),
    "algorithm.entropy_coefficient_max": (0, limits.MAX_FLOAT),
    "algorithm.learning_rate": (0, limits.MAX_FLOAT),
    "algorithm.lr_warmup_steps": (0, 2**30),
    "algorithm.weight_decay": (0, limits.MAX_FLOAT),
    "algorithm.grad_clip": (0, limits.MAX_FLOAT),
    "algorithm.max_skipped": (0, limits.MAX_INT),
    "warmup.steps": (0, 2**30),
    "warmup.batch_size": (1, 2**20),
    "warmup.microbatches": (1, 2**20),
    "warmup.learning_rate": (0, limits.MAX_FLOAT),
    "eval.every": (0, 2**30),
    "eval.prompts": (0, 2**16),
    "eval.temperature": (1e-6, 1e6),
    "checkpoint.every": (0, 2**30),
    "checkpoint.keep": (1, 2**20),
    **{
        f"{mesh}.{axis}": (0 if axis == "fsdp" else 1, 2**20)
        for mesh in ("mesh", "rollout.mesh")
        for axis in ("data", "fsdp", "expert", "sequence", "tensor")
    },
}


def _check_numbers(config: Config) -> None:
    """Checks the type and the range of every number of a configuration."""
    for name, kind in scalar_fields(config).items():
        value = functools.reduce(getattr, name.split("."), config)
        if kind is int and not isinstance(value, numbers.Integral):
            raise ValueError(f"{name}={value!r} must be an integer")
        largest = limits.MAX_INT if kind is int else limits.MAX_FLOAT
        if kind in (int, float) and not isinstance(value, Calibrated):
            limits.check_number(name, value, *_RANGES.get(name, (-largest, largest)))


def _validate(config: Config) -> None:
    """Raises ValueError on what is wrong whatever the files, devices and model are."""
    data = config.data
    rollout = config.rollout
    algorithm = config.algorithm
    if not config.name:
        raise ValueError("name is empty; it names the run's folder")
    _check_numbers(config)
    for name, value in (("beta1", algorithm.beta1), ("beta2", algorithm.beta2)):
        if not 0 <= value < 1:
            raise ValueError(f"algorithm.{name}={value} must lie in [0, 1)")
    _check_regularisers(algorithm)
    if algorithm.reference_folder and (config.model.trainable or config.model.lora.rank):
        raise ValueError(
            "algorithm.reference_folder holds all parameters, and model.trainable or model.lora "
            "trains others, of which a reference is kept; leave one of the two out"
        )
    completions = data.prompts_per_step * rollout.samples
    parts = algorithm.minibatches * algorithm.microbatches
    if completions % parts:
        raise ValueError(
            f"data.prompts_per_step * rollout.samples = {completions} completions do not divide "
            f"into algorithm.minibatches * algorithm.microbatches = {parts} parts"
        )
    if data.max_refills and rollout.samples < 2:
        raise ValueError(
            "data.max_refills replaces prompts whose completions all earn the same, and "
            "rollout.samples=1 leaves no other; sample more, or leave it out"
        )
    row = data.max_prompt_tokens + rollout.max_tokens
    if algorithm.row_length and algorithm.row_length < row:
        raise ValueError(
            f"algorithm.row_length={algorithm.row_length} is shorter than one prompt and "
            f"completion (data.max_prompt_tokens + rollout.max_tokens = {row})"
        )
    if rollout.devices < -1:
        raise ValueError(
            f"rollout.devices={rollout.devices} must be a number of devices, or -1 for all"
        )
    if not all(rollout.stop_strings):
        raise ValueError(
            "rollout.stop_strings holds an empty text, which would end every completion; leave it "
            "out"
        )
    if rollout.sampler is not None and rollout.server:
        raise ValueError(
            f"rollout.sampler and rollout.server={rollout.server!r} are both set, and one samples; "
            "leave one of the two out"
        )
    if rollout.weights_folder and not rollout.server:
        raise ValueError(
            "rollout.weights_folder is for rollout.server, which is not set; set it, or leave "
            "rollout.weights_folder out"
        )
    if not rollout.devices and rollout.mesh != MeshConfig():
        raise ValueError(
            "rollout.mesh needs rollout.devices, the devices that it lays out; set "
            "rollout.devices, or leave rollout.mesh out"
        )
    if not 0 < rollout.top_p <= 1 or not 0 <= rollout.min_p < 1:
        raise ValueError(
            f"rollout.top_p={rollout.top_p} must lie in (0, 1] and rollout.min_p={rollout.min_p} "
            "in [0, 1)"
        )
    if (config.model.trainable is None) != (config.model.policy_params is None):
        raise ValueError(
            "model.trainable makes what is trained, and model.policy_params the decoder's "
            "parameters from it; set both or neither"
        )
    _check_lora(config.model)
    _check_quantize_aware(config)
    dual = config.constraint
    measured = dual.tolerance if isinstance(dual.tolerance, Calibrated) else None
    if measured and (measured.slack < 0 or measured.batches < 2):
        raise ValueError(
            f"constraint.tolerance={measured} needs slack >= 0 and batches >= 2, for its standard "
            "error"
        )
    if (
        not measured
        and dual.tolerance < 0
        or dual.dual_lr < 0
        or not 0 <= dual.multiplier_init <= dual.multiplier_max
    ):
        raise ValueError(
            "constraint needs tolerance >= 0, dual_lr >= 0 and "
            "0 <= multiplier_init <= multiplier_max"
        )
    warmup = config.warmup
    if warmup.path and not warmup.steps:
        raise ValueError(
            "warmup.path names a file, and warmup.steps=0 learns nothing of it; set warmup.steps"
        )
    if warmup.microbatches > 1 and not warmup.path:
        raise ValueError(
            "warmup.microbatches divides the pairs of warmup.path, which names no file; set it, or "
            "leave warmup.microbatches out"
        )
    if warmup.batch_size % warmup.microbatches:
        raise ValueError(
            f"warmup.batch_size={warmup.batch_size} does not divide into "
            f"warmup.microbatches={warmup.microbatches} parts"
        )
    if config.eval.every and config.eval.prompts < 1:
        raise ValueError(
            f"eval.prompts={config.eval.prompts} must be at least 1; set eval.every=0 to leave "
            "evaluation out"
        )
    if data.verifier is None and data.task is None:
        raise ValueError(
            "data.verifier is not set; set a function (example, text) -> reward, such as "
            "rewards.math_answer"
        )
    if not (data.path or data.task):
        raise ValueError(
            "data.path names no file and the experiment has no data.task; give --data.path FILE"
        )


def _check_regularisers(algorithm: AlgorithmConfig) -> None:
    """Raises ValueError on options of a reference policy or an entropy bonus that are not read."""
    options = {
        "reference_coefficient": algorithm.reference_coefficient != 1.0,
        "reference_in_reward": algorithm.reference_in_reward,
        "reference_folder": algorithm.reference_folder,
        "reference_update": algorithm.reference_update,
    }
    given = [name for name, is_set in options.items() if is_set]
    if given and algorithm.reference_penalty is None:
        raise ValueError(
            f"algorithm.{given[0]} needs algorithm.reference_penalty, such as losses.kl.k3; set "
            f"it, or leave algorithm.{given[0]} out"
        )
    start = algorithm.entropy_coefficient
    if algorithm.entropy_target and start > algorithm.entropy_coefficient_max:
        raise ValueError(
            f"algorithm.entropy_coefficient={start}, where the coefficient starts, is more than "
            f"algorithm.entropy_coefficient_max={algorithm.entropy_coefficient_max}"
        )


def _check_lora(model: ModelSource) -> None:
    lora = model.lora
    if not lora.rank:
        if lora.folder:
            raise ValueError(
                f"model.lora.folder={lora.folder} holds adapters, and model.lora.rank=0 trains "
                "none; set model.lora.rank to their r"
            )
        return
    if model.trainable is not None:
        raise ValueError(
            f"model.lora.rank={lora.rank} and model.trainable both say what is trained; leave one "
            "of the two out"
        )
    unknown = [name for name in lora.targets if name not in PROJECTIONS]
    if unknown or not lora.targets:
        raise ValueError(
            f"model.lora.targets={lora.targets} must be some of {', '.join(PROJECTIONS)}"
        )


def _check_quantize_aware(config: Config) -> None:
    if not config.algorithm.quantize_aware:
        return
    rollout = config.rollout
    if not rollout.own_engine:
        name = "rollout.server" if rollout.server else "rollout.sampler"
        raise ValueError(
            "algorithm.quantize_aware rounds as the library's own engine does, by "
            f"rollout.precision, which {name} does not read; leave one of the two out"
        )
    for name in ("activations", "cache", "experts_per_token"):
        value = getattr(rollout.precision, name)
        if value:
            raise ValueError(
                "algorithm.quantize_aware gives the trainer the engine's weights alone, and "
                f"rollout.precision.{name}={value} is not of weights; leave one of the two out"
            )


def scalar_fields(config: Any, prefix: str = "") -> dict[str, type]:
    """Returns the dotted names of the fields that the command line may set, with their types."""
    hints = typing.get_type_hints(type(config))
    types = {}
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        name = prefix + item.name
        if dataclasses.is_dataclass(value):
            types |= scalar_fields(value, name + ".")
        if hints[item.name] in (int, float, bool, str):
            types[name] = hints[item.name]
        elif hints[item.name] == float | Calibrated:
            types[name] = float
    return types


def with_tolerance(config: Config, tolerance: float) -> Config:
    """Returns the same configuration with another tolerance."""
    return dataclasses.replace(
        config, constraint=dataclasses.replace(config.constraint, tolerance=tolerance)
    )
