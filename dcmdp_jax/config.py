"""The configuration of a run: frozen dataclasses that hold every default.

An experiment is a Python file with one `CONFIG = Config(...)`. Functions are passed as functions
(`surrogate=losses.corrections.decoupled(losses.policy.clipped)`), never by name. The command line
overrides scalar fields by dotted name (see `experiment`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field

from dcmdp_jax import config_checks, limits
from dcmdp_jax.models.model_config import PROJECTIONS, Compute, ModelConfig
from dcmdp_jax.tasks import Task
from dcmdp_jax.tokens import segments


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
    max_prompt_tokens: int = 512  # longer problems of `path` are left out, others refused
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
    # with staleness 1 and a server: the batch that is sampled while an update runs goes on with the
    # updated weights as soon as there are any, so that a completion can have tokens of both
    in_flight: bool = False
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
    # Minibatches are drawn of whole groups, where they hold a multiple of one, and the completions
    # of a group that stand in one row have their prompt in common, which is computed once. The
    # latter only if a row holds a longest prompt with two longest completions (max_prompt_tokens +
    # 2 * max_tokens + 1 tokens), and at most 32,768 tokens (see Config.shares_prompts)
    share_prompts: bool = True
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
        config_checks.check(self)

    @property
    def row_length(self) -> int:
        """S of the packed rows."""
        return self.algorithm.row_length or self.data.max_prompt_tokens + self.rollout.max_tokens

    @property
    def longest_sharing(self) -> int:
        """How many longest completions could share a longest prompt in a row of a microbatch."""
        algorithm = self.algorithm
        rollout = self.rollout
        completions = self.data.prompts_per_step * rollout.samples
        in_microbatch = completions // (algorithm.minibatches * algorithm.microbatches)
        in_row = segments.branches_in_row(
            self.data.max_prompt_tokens, rollout.max_tokens, self.row_length
        )
        return min(in_row, in_microbatch, rollout.samples)

    @property
    def shares_prompts(self) -> bool:
        """True if completions that stand in one row share their prompt.

        Not where a row holds one longest completion: few would share, and a row that shares nothing
        takes a TPU 9 products of blocks of attention instead of 7.
        """
        fits = self.row_length <= limits.MAX_SHARED_ROW
        return self.algorithm.share_prompts and fits and self.longest_sharing > 1


def with_tolerance(config: Config, tolerance: float) -> Config:
    """Returns the same configuration with another tolerance."""
    return dataclasses.replace(
        config, constraint=dataclasses.replace(config.constraint, tolerance=tolerance)
    )
