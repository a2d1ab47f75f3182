"""Configuration of one run: frozen dataclasses, checked when they are made, stored as JSON.

Every field is an option of ``speed-engine train`` and says its unit. Configuration stops at
``train.py``: classes below it take plain arguments.
"""

import dataclasses
import json
import math
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro

from speed_engine.evaluation.metrics import HELP as METRICS_HELP
from speed_engine.evaluation.metrics import METRICS
from speed_engine.models.config import MODEL_CONFIGS, DiTConfig, ModelConfig
from speed_engine.runtime.checks import UserError, check


@dataclass(frozen=True, kw_only=True)
class MethodOptions:
    """Arguments of the method; unset ones keep the method's own default."""

    stratified: bool | None = None
    """Draw a batch's timesteps evenly spread instead of independently, from the same law."""
    normalised: bool | None = None
    """Scale the weights so that their mean under the law is 1."""
    weight_on: Literal["definition", "prediction"] = "definition"
    """Convert weights from the target they are defined on, or apply them to the prediction."""
    weigh_bound: bool = False
    """With a learned variance: weigh its bound, too."""
    k: float | None = None
    """SpeeD: how many times more often timesteps up to tau are drawn; at least 1 (paper: 5)."""
    r: float | None = None
    """SpeeD: signal suppression where the convergence area begins; above 1 (138.6: tau = 700)."""
    tau: float | None = None
    """SpeeD: that border as a timestep, counted from 1; overrides r."""
    lam: float | None = None
    """SpeeD: lambda of change-aware weighting, in [0.5, 1] (paper: 0.6)."""
    gamma: float | None = None
    """P2: exponent (1); Min-SNR: the cap (5)."""
    p2_k: float | None = None
    """P2: added to the signal-to-noise ratio (1)."""
    mean: float | None = None
    """Of log sigma (EDM: -1.2), of the logit of t (logit_normal: 0), of t / T (clts: 0.3)."""
    std: float | None = None
    """Of the same (1.2, 1, 0.2)."""
    scale: float | None = None
    """mode: how much more of the middle, in [-1, 1.75] (1.29)."""
    shift: float | None = None
    """shifted: factor of the noise-to-signal odds (3)."""
    ramp_steps: int | None = None
    """clts: steps until the law is the Gaussian alone; by default the whole run."""
    clusters: int | None = None
    """ant_uw, task_curriculum: intervals of timesteps (5, 20)."""
    patience: int | None = None
    """task_curriculum: steps without gain before the next stage (200)."""
    floor: float | None = None
    """adaptive: share of draws that stays uniform (0.1)."""

    def given(self) -> dict[str, float]:
        """The method's own arguments that were set."""
        shared = ("stratified", "normalised", "weight_on", "weigh_bound")
        return {
            name: value
            for name, value in vars(self).items()
            if value is not None and name not in shared
        }


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where images come from."""

    source: str = "digits"
    """An embedded data set (digits), the path of a folder of shards (.tar), or its URL (https,
    http, s3, gs)."""
    members: tuple[str, ...] = ("npy", "cls")
    """Extensions of a sample's image (npy, png, jpg, jpeg, webp), then of what the model is told of
    it: cls, tokens.npy, low.npy (low.png, ...)."""
    image_shape: tuple[int, int, int] = (1, 8, 8)
    """Channels, height, width of what the model draws."""
    latents: bool = False
    """Images are latents of an autoencoder: unbounded, and no pictures without its decoder."""
    vae: str | None = None
    """That autoencoder, a diffusers AutoencoderKL (folder or hub name), to decode what is drawn."""
    num_classes: int = 10
    """Labels are 0 .. num_classes - 1."""
    token_shape: tuple[int, int] = (77, 768)
    """Tokens of a text and their width."""
    low_shape: tuple[int, int, int] = (3, 64, 64)
    """Channels, height, width of the low-resolution image."""
    workers: int = 0
    """Processes that read ahead; 0 reads in the training process."""
    window: int = 8
    """Shards that are shuffled together; more mixes better, fewer reads more sequentially."""
    mode: Literal["exact", "stream"] = "exact"
    """The order that any number of ranks resumes exactly, or webdataset's streaming, which is not
    exact and reads shards from end to end."""
    flip: bool = False
    """Mirror one image in two, left to right; of latents an approximation."""
    resident: Literal["auto", "on", "off"] = "auto"
    """Keep the whole data set in the device's memory; auto does so on a GPU where it fits well, and
    on a CPU if it is small. The run is the same either way."""
    on_bad_sample: Literal["skip", "stop"] = "skip"
    """A damaged sample is replaced by another and counted, or ends the run."""
    held_out: float = 0.0
    """Share of the samples, in [0, 0.9], chosen by a hash of their keys, that is never trained on:
    evaluation measures against both parts."""
    exclude: Path | None = None
    """Repair list of `speed-engine shards check`: what it names is left out."""
    cache_gb: float = 100.0
    """Disk space for shards that come from a URL, in 10^9 bytes."""

    def __post_init__(self) -> None:
        decodable = self.vae is None or self.latents
        check("data.vae", str(self.vae), decodable, "is for data.latents True only")
        check("data.cache_gb", self.cache_gb, self.cache_gb > 0, "must be positive")
        check("data.held_out", self.held_out, 0 <= self.held_out <= 0.9, "is a share in [0, 0.9]")
        if self.resident == "on" and self.mode == "stream":
            raise UserError(
                "data.resident=on keeps the exact order, which data.mode=stream gives up; "
                "leave one of them at its default."
            )
        check("data.workers", self.workers, self.workers >= 0, "must be 0 or more")
        check("data.window", self.window, self.window >= 1, "must be at least 1 shard")
        check("data.num_classes", self.num_classes, self.num_classes >= 1, "must be at least 1")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """What updates the parameters, and the averages of them (EMA)."""

    name: str = "adamw"
    """The optimizer: adamw."""
    learning_rate: float = 1e-3
    """Step size after warm-up."""
    warmup_steps: int = 100
    """Optimizer steps over which the step size rises linearly."""
    beta1: float = 0.9
    """Decay of the first moment, in [0, 1)."""
    momentum_decay: Literal["none", "demon", "geometric"] | None = None
    """How beta1 falls over the run; demon compensates the rate; by default as the method does."""
    beta2: float = 0.999
    """Decay of the second moment, in [0, 1)."""
    weight_decay: float = 0.0
    """Decoupled decay per step, in units of the learning rate."""
    grad_clip: float = 1.0
    """Largest gradient norm; inf never clips."""
    update: Literal["auto", "separate", "one_sweep"] = "auto"
    """Clip, optimizer and averages one after the other, or AdamW with both in one sweep over
    memory."""
    ema_decay: float = 0.999
    """Share of the average kept per step, in [0, 1); warms up as (1 + step) / (10 + step)."""
    averages: tuple[str, ...] = ()
    """Further averages, kept in checkpoints beside that one: ema=DECAY, of another decay, and
    power=GAMMA, whose decay is (1 - 1 / step)**(GAMMA + 1) (EDM2). --average generates from one."""

    def __post_init__(self) -> None:
        lr = self.learning_rate
        check("optimizer.learning_rate", lr, lr > 0, "must be positive")
        known = ("auto", "separate", "one_sweep")
        continued = (
            f"choose from {', '.join(known)}; a run of one_sweep_bf16, which is no more, continues "
            "with one_sweep in its config.json"
        )
        check("optimizer.update", self.update, self.update in known, continued)
        once = len(set(self.averages)) == len(self.averages)
        check("optimizer.averages", self.averages, once, "name each average once")
        check("optimizer.warmup_steps", self.warmup_steps, self.warmup_steps >= 0, "must be >= 0")
        check("optimizer.weight_decay", self.weight_decay, self.weight_decay >= 0, "must be >= 0")
        check("optimizer.grad_clip", self.grad_clip, self.grad_clip > 0, "must be positive")
        for name in ("beta1", "beta2", "ema_decay"):
            value = getattr(self, name)
            check(f"optimizer.{name}", value, 0 <= value < 1, "must lie in [0, 1)")


SolverName = Literal["ddim", "euler", "heun", "dpmpp_2m", "ddpm", "ddpm_large"]


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Images generated by the averaged model, and how far they are from the data."""

    every: int = 500
    """Optimizer steps between evaluations; one more follows the last step."""
    num_images: int = 2000
    """Images generated each time, classes in turn."""
    solver: SolverName = "ddim"
    """How images are generated; euler is ddim; ddpm takes what variance a model learned, if any."""
    solver_steps: int = 25
    """Model evaluations per image, at most the number of timesteps."""
    guidance: float = 1.0
    """Classifier-free guidance scale; 1 is none."""
    guidance_interval: tuple[float, float] | None = None
    """Noise levels sigma / alpha between which guidance acts; by default at all."""
    features: Literal["classifier", "inception", "none"] = "classifier"
    """What FID compares: a classifier trained on these data, the standard Inception network, or
    nothing: images are generated only."""
    inception_weights: Path | None = None
    """Its weights file; by default torch hub's cache is searched."""
    metrics: Annotated[tuple[str, ...], tyro.conf.arg(help=METRICS_HELP)] = ("fid", "kid")
    clip_model: str | None = None
    """Of the metric clip: a CLIPModel with its processor, a folder or a name on the hub."""

    def __post_init__(self) -> None:
        named = " ".join(self.metrics)
        sound = bool(self.metrics) and METRICS.keys() >= set(self.metrics)
        check("evaluation.metrics", named, sound, f"name one or more of {', '.join(METRICS)}")
        for metric in self.metrics:
            has_model = "clip" not in METRICS[metric].needs or self.clip_model is not None
            check("evaluation.metrics", named, has_model, f"{metric} needs evaluation.clip_model")
        for name in ("every", "num_images", "solver_steps"):
            value = getattr(self, name)
            check(f"evaluation.{name}", value, value >= 1, "must be at least 1")
        check("evaluation.guidance", self.guidance, self.guidance >= 0, "must be >= 0")
        low, high = self.guidance_interval or (0.0, math.inf)
        rises = "needs two noise levels sigma / alpha, 0 or more, the lower one first"
        check("evaluation.guidance_interval", self.guidance_interval, 0 <= low < high, rises)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that determines a run."""

    method: str = "speed_paper"
    """How timesteps are drawn and losses weighted: uniform, speed_paper, speed_official, p2,
    min_snr, lognormal_edm, logit_normal, clts, clts_mdlrc, ant_uw, task_curriculum, speed_plus,
    edm, mode, shifted, adaptive, learned_uncertainty."""
    steps: int = 3000
    """Optimizer steps of the whole run."""
    batch_size: int = 128
    """Images per optimizer step, all ranks together."""
    seed: int = 0
    """Root of every random choice; runs with equal seeds are equal."""
    schedule: str = "linear"
    """Noise process: linear, quadratic, cosine, scaled_linear, vp, ve, edm, fdm, flow,
    shifted_flow."""
    num_timesteps: int = 1000
    """Timesteps of the process; in continuous time, the resolution of laws and weights."""
    prediction: str | None = None
    """What the model predicts: epsilon, x0, v, velocity, F; by default as the baseline does."""
    condition_dropout: float = 0.1
    """Share of labels or texts hidden in training, so that guidance is possible; in [0, 1]."""
    low_resolution_noise: float = 0.5
    """Strongest noise, in [0, 1], put on the low-resolution image in training; levels are even."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto takes a GPU if there is one."""
    compile: Literal["auto", "on", "blocks", "off"] = "auto"
    """torch.compile the model, or its blocks one by one, whose compilation takes as long for many
    as for one; auto compiles where that was measured to pay."""
    attention: Literal["auto", "sdpa", "xformers"] = "auto"
    """What computes a DiT's attention: PyTorch, or xFormers where its operators load; auto is
    PyTorch."""
    init_from: Path | None = None
    """Weights to start from: a file of facebookresearch/DiT, a folder of diffusers, an export."""
    log_every: int = 50
    """Optimizer steps between records; the only points where the device is waited for."""
    checkpoint_every: int = 500
    """Optimizer steps between checkpoints; one more follows the last step."""
    keep_checkpoints: int = 3
    """Checkpoints kept, newest first."""
    keep_every: int | None = None
    """Of the older ones, those at multiples of this step are kept for good; by default none."""
    microbatch_size: int | None = None
    """Images per forward and process; gradients of a step are summed over them. By default all."""
    parallel: Literal["auto", "ddp", "fsdp", "hsdp"] = "auto"
    """How several processes (torchrun) hold the parameters: each all of them (ddp), a share (fsdp),
    or a share within each node (hsdp)."""
    reshard: bool = True
    """fsdp, hsdp: drop gathered parameters between forward and backward, and gather them again."""
    offload: bool = False
    """fsdp, hsdp: keep parameters and optimizer state in the host's memory."""
    on_nonfinite: int = 3
    """A step whose loss or gradient is not finite is skipped; this many in a row stop the run."""
    hang_timeout: float = 900.0
    """Seconds without a step after which several processes stop and name the one that hangs."""
    method_options: Annotated[MethodOptions, tyro.conf.arg(name="")] = field(
        default_factory=MethodOptions
    )
    model: ModelConfig = field(default_factory=DiTConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self) -> None:
        counts = ("steps", "batch_size", "log_every", "checkpoint_every", "keep_checkpoints",
                  "keep_every", "microbatch_size", "on_nonfinite")  # fmt: skip
        for name in counts:
            value = getattr(self, name)
            check(name, value, value is None or value >= 1, "must be at least 1")
        check("hang_timeout", self.hang_timeout, self.hang_timeout > 0, "must be positive")
        check("num_timesteps", self.num_timesteps, self.num_timesteps >= 2, "must be at least 2")
        check(
            "condition_dropout",
            self.condition_dropout,
            0 <= self.condition_dropout <= 1,
            "is a share in [0, 1]",
        )
        check(
            "low_resolution_noise",
            self.low_resolution_noise,
            0 <= self.low_resolution_noise <= 1,
            "is a level in [0, 1]",
        )
        check("seed", self.seed, -(2**63) <= self.seed < 2**63, "must fit a signed 64-bit integer")
        check(
            "evaluation.solver_steps",
            self.evaluation.solver_steps,
            self.evaluation.solver_steps <= self.num_timesteps,
            f"must be at most num_timesteps={self.num_timesteps}",
        )
        check(
            "evaluation.features",
            self.evaluation.features,
            not self.data.latents or self.evaluation.features == "none",
            "latents are no pictures that could be compared; choose none",
        )
        self._check_metrics()
        check(
            "evaluation.guidance",
            self.evaluation.guidance,
            self.evaluation.guidance == 1 or self.condition_dropout > 0,
            "guidance needs a model that was trained with condition_dropout above 0",
        )

    def with_evaluation(self, **options: object) -> "TrainConfig":
        """The same with other options of the evaluation, checked; those that are None stay."""
        given: dict[str, Any] = {name: v for name, v in options.items() if v is not None}
        return dataclasses.replace(self, evaluation=dataclasses.replace(self.evaluation, **given))

    def _check_metrics(self) -> None:
        data, named = self.data, " ".join(self.evaluation.metrics)
        there = {
            "held_out": data.held_out > 0,
            "texts": any(member.startswith("tokens") for member in data.members),
            "images": not data.latents or data.vae is not None,
        }
        remedy = {
            "held_out": "images that were never trained on; set data.held_out, such as to 0.1",
            "texts": "a model that is conditioned on texts (tokens.npy among data.members)",
            "images": "pictures; set data.vae to decode latents",
        }
        for metric in self.evaluation.metrics:
            for need in sorted(METRICS[metric].needs, reverse=True):
                met = there.get(need, True)
                check("evaluation.metrics", named, met, f"{metric} needs {remedy.get(need)}")


def to_json(config: TrainConfig) -> str:
    """The resolved configuration, every field, readable by ``from_json``."""
    return json.dumps(dataclasses.asdict(config), indent=2, default=str) + "\n"


def from_json(text: str) -> TrainConfig:
    """Inverse of ``to_json``.

    Raises:
        UserError: not JSON, an unknown or missing field, or a value out of range.
    """
    return _build(TrainConfig, json.loads(text), "config")


T = TypeVar("T")


def _build(cls: type[T], values: dict[str, Any], where: str) -> T:
    hints = typing.get_type_hints(cls)
    if unknown := sorted(set(values) - set(hints)):
        raise UserError(f"{where} has unknown fields {unknown}; was it written by another version?")
    return cls(
        **{name: _convert(hints[name], value, f"{where}.{name}") for name, value in values.items()}
    )


def _convert(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type, hint), value, where)
    if typing.get_origin(hint) is tuple:
        return tuple(value)
    if hint == ModelConfig:  # a file without the family was written when there was one only
        family = value.get("family", DiTConfig.family)
        if family not in MODEL_CONFIGS:
            known = ", ".join(MODEL_CONFIGS)
            raise UserError(f"{where}.family={family!r} is unknown; choose from {known}.")
        return _build(MODEL_CONFIGS[family], value, where)
    if isinstance(hint, types.UnionType):
        return None if value is None else _convert(typing.get_args(hint)[0], value, where)
    return Path(value) if hint is Path else value
