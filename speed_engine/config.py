"""Configuration of one run: frozen dataclasses, checked when they are made, stored as JSON.

Every field is an option of ``speed-engine train`` and says its unit. ``build.py`` makes the objects
of a run from it.
"""

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from pydantic import Discriminator

from speed_engine.data.config import DataConfig
from speed_engine.diffusion.grammar import canonical, read_spelling
from speed_engine.evaluation.config import EvaluationConfig
from speed_engine.evaluation.metrics import METRICS
from speed_engine.models.config import DiTConfig, ModelConfig
from speed_engine.runtime import strict
from speed_engine.runtime.checks import (
    MOST_TIMESTEPS,
    UserError,
    check,
    check_between,
    check_counts,
    check_seed,
    shortened,
    unknown,
)
from speed_engine.training.config import OptimizerConfig


def _methods(default: str) -> str:
    """What the help of --method says after its own text."""
    # Not at the top: it needs torch, which only this part of the help does.
    from speed_engine.diffusion.methods import METHODS

    return f"(default: {default}) Methods: {', '.join(METHODS)}."


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that determines a run."""

    method: Annotated[str, tyro.conf.arg(help_behavior_hint=_methods)] = "speed_paper"
    """The timestep distribution and the loss weighting, METHOD[+OPTION=VALUE ...], such as
    speed_paper+k=3; an option that is left out has the method's own default. `speed-engine methods`
    explains the methods and their options."""
    steps: int = 3000
    """Number of optimizer steps of the whole run."""
    batch_size: int = 128
    """Number of images in one optimizer step, on all processes together."""
    seed: int = 0
    """Seed of every random choice. Runs with equal seeds are equal, bit for bit on a CPU; on a GPU
    that needs --deterministic."""
    schedule: str = "linear"
    """Noise process: linear, quadratic, cosine or scaled_linear (noise schedules of DDPM), vp, ve,
    edm, fdm, flow or shifted_flow."""
    num_timesteps: int = 1000
    """Number of timesteps of the process. A process in continuous time uses it as the resolution of
    timestep distributions and loss weights."""
    prediction: str | None = None
    """What the model predicts: epsilon, x0, v, velocity, F or negative_F. The default is what the
    baseline of the process predicts."""
    condition_dropout: float = 0.1
    """Probability, in [0, 1], that a label or text is hidden from the model in training, which
    makes classifier-free guidance possible."""
    low_resolution_noise: float = 0.5
    """Super-resolution: the largest noise level, in [0, 1], that is added to the low-resolution
    image in training; levels are uniformly distributed."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto takes a GPU if there is one."""
    compile: Literal["auto", "on", "graphs", "blocks", "off"] = "auto"
    """How torch.compile is used: on compiles the whole model, blocks compiles block by block, which
    takes as long for many blocks as for one, and graphs also replays CUDA graphs, for small models
    on one GPU, and takes all images of a step at once. auto compiles where that was measured to
    pay: on one GPU graphs, where the host would hold the GPU up, else blocks."""
    attention: Literal["auto", "sdpa", "xformers"] = "auto"
    """What computes a DiT's attention: sdpa is PyTorch's, xformers needs the library xFormers; auto
    is sdpa."""
    kernels: Literal["auto", "on", "off"] = "auto"
    """Whether operators run by the Triton kernels: auto tests each kernel on the GPU first and uses
    the PyTorch reference where one fails, on stops the run if one fails, and off uses the
    references only."""
    deterministic: bool = False
    """On a GPU, use deterministic algorithms only, so that equal runs have equal bits, as they have
    on a CPU; some algorithms are slower."""
    init_from: Path | None = None
    """Weights to start from: the folder of another run, whose EMA is taken, a checkpoint file of
    facebookresearch/DiT, a folder of diffusers, or what `speed-engine export` wrote. The default is
    random weights."""
    log_every: int = 50
    """Number of optimizer steps between two records of the loss; only then does the host wait for
    the device."""
    logger: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ("tensorboard",)
    """What shows the records and pictures beside metrics.jsonl: tensorboard, wandb (Weights &
    Biases) or mlflow, one or several, or none."""
    checkpoint_every: int = 500
    """Number of optimizer steps between two checkpoints; one more follows the last step."""
    keep_checkpoints: int = 3
    """Number of newest checkpoints that are kept."""
    keep_every: int | None = None
    """Older checkpoints are kept, too, if their step is a multiple of this number. The default
    keeps none."""
    microbatch_size: int | None = None
    """Number of images that one process passes through the model at a time; the gradients of a step
    are summed over them. By default all of its images at once or, where a GPU's memory would not be
    enough by an estimate, a half, a quarter and so on of them."""
    parallel: Literal["auto", "ddp", "fsdp", "hsdp"] = "auto"
    """How several processes hold the parameters: all of them in each process (ddp), a share in each
    (fsdp), or a share in each process of a node (hsdp). auto is ddp on CPUs, fsdp on one node of
    GPUs and hsdp on several."""
    reshard: bool = True
    """With fsdp and hsdp, free gathered parameters after the forward pass and gather them again for
    the backward pass, which saves memory."""
    offload: bool = False
    """With fsdp and hsdp, keep parameters and optimizer state in the host's memory."""
    on_nonfinite: int = 3
    """A step whose loss or gradient is not finite is skipped; this many of them in a row stop the
    run."""
    hang_timeout: float = 900.0
    """Number of seconds without a step after which a run of several processes stops and names the
    process that hangs."""
    model: Annotated[ModelConfig, Discriminator("family")] = field(default_factory=DiTConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self) -> None:
        object.__setattr__(self, "method", canonical(self.method))
        counts = ("steps", "log_every", "checkpoint_every", "keep_checkpoints", "keep_every")
        check_counts("", self, *counts, "microbatch_size", "on_nonfinite")
        check_between("batch_size", self.batch_size, 1, 10**6)
        timeout = self.hang_timeout
        check("hang_timeout", timeout, 0 < timeout <= 1e9, "must be positive, at most 10^9 seconds")
        check_between("num_timesteps", self.num_timesteps, 2, MOST_TIMESTEPS)
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
        check_seed(self.seed)
        check(
            "evaluation.solver_steps",
            self.evaluation.solver_steps,
            self.evaluation.solver_steps <= self.num_timesteps,
            f"must be at most num_timesteps={self.num_timesteps}",
        )
        parts = self.microbatch_size or self.batch_size
        check(
            "compile",
            self.compile,
            self.compile != "graphs" or parts >= self.batch_size,
            f"a replay overwrites the gradients of the {parts} images before; choose blocks, or a "
            f"microbatch_size of all {self.batch_size} images",
        )
        self._check_pictures()
        self._check_metrics()
        once = len(set(self.logger)) == len(self.logger)
        check("logger", " ".join(self.logger), once, "name each logger once")
        check(
            "attention",
            self.attention,
            not self.deterministic or self.attention != "xformers",
            "has no deterministic backward pass that is known; choose sdpa",
        )
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

    def _check_pictures(self) -> None:
        """Latents are compared as pictures, with pictures."""
        features = self.evaluation.features
        if not self.data.latents or features == "none":
            return
        for option, value, what in (
            ("data.vae", self.data.vae, "which decodes what is generated"),
            ("evaluation.reference", self.evaluation.reference, "the real pictures"),
        ):
            need = f"latents are compared as pictures: set {option}, {what}, or choose none"
            check("evaluation.features", features, value is not None, need)

    def _check_metrics(self) -> None:
        data, named = self.data, " ".join(self.evaluation.metrics)
        there = {
            "held_out": data.holds_out,
            "labels": "cls" in data.members or self.evaluation.features != "classifier",
            "texts": any(member.startswith("tokens") for member in data.members),
            "images": not data.latents or data.vae is not None,
            "training": self.evaluation.reference is None,
        }
        remedy = {
            "held_out": "images that were never trained on; set data.held_out, such as to 0.1, or "
            "data.test_source",
            "labels": "a model that is conditioned on classes (cls among data.members)",
            "texts": "a model that is conditioned on texts (tokens.npy among data.members)",
            "images": "pictures; set data.vae to decode latents",
            "training": "the pictures that are trained on; leave evaluation.reference out",
        }
        for metric in self.evaluation.metrics:
            for need in sorted(METRICS[metric].needs, reverse=True):
                met = there.get(need, True)
                check("evaluation.metrics", named, met, f"{metric} needs {remedy.get(need)}")


_INFINITY = re.compile(r"^( *(?:\"\w+\": )?)Infinity(?=,?$)", re.MULTILINE)  # outside of texts


def to_json(config: TrainConfig) -> str:
    """The resolved configuration, every field, readable by ``from_json``; infinity is 1e999.

    JSON has no infinity, but numbers of any size: readers take this one for infinite.

    Raises:
        UserError: a path or a name in it is no Unicode text.
    """
    text = json.dumps(dataclasses.asdict(config), indent=2, default=str, ensure_ascii=False) + "\n"
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"a path or name in the configuration is not UTF-8 ({error}); rename it."
        ) from error
    return _INFINITY.sub(r"\g<1>1e999", text)


def flat(config: TrainConfig) -> dict[str, Any]:
    """Every value as JSON has it, by its dotted name, such as ``optimizer.beta1``."""
    values: dict[str, Any] = json.loads(to_json(config))
    sections = {name: of for name, of in values.items() if isinstance(of, dict)}
    plain = {name: value for name, value in values.items() if name not in sections}
    return plain | {f"{name}.{f}": v for name, of in sections.items() for f, v in of.items()}


def from_json(text: str | bytes) -> TrainConfig:
    """Inverse of ``to_json``; a field that is missing has its default, as the file may be older.

    Raises:
        UserError: not a JSON object in UTF-8, an unknown field, a value of another type than the
            field's or out of its range, or a method, process or prediction that does not exist.
    """
    return _checked(parsed(text))


def with_values(config: TrainConfig, values: Mapping[str, Any]) -> TrainConfig:
    """A configuration with other values, read as strictly as those of a file.

    Args:
        config: what has the other values; it stays as it is.
        values: by name, as in ``config.json``; a section is a mapping of its own values or the
            whole dataclass. A model of another family starts from that family's defaults.

    Raises:
        UserError: as ``from_json``.
    """
    merged: dict[str, Any] = json.loads(to_json(config))
    for name, value in values.items():
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            value = dataclasses.asdict(value)
        before = merged.get(name)
        if isinstance(value, Mapping) and isinstance(before, dict):
            same = value.get("family", before.get("family")) == before.get("family")
            value = {**(before if same else {}), **value}
        merged[name] = value
    # Through JSON, which makes lists of tuples and texts of paths.
    return _checked(json.loads(json.dumps(merged, default=_plain)))


def _plain(value: Any) -> Any:
    """A number of NumPy or PyTorch is a number; anything else is its text."""
    # Not by isinstance: neither library is imported for that.
    is_number = getattr(value, "shape", None) == () and hasattr(value, "item")
    return value.item() if is_number else str(value)


def _checked(values: dict[str, Any]) -> TrainConfig:
    try:
        config = strict.read(TrainConfig, _of_this_version(values))
    except RecursionError:
        raise _too_deep() from None
    _check_known(config)
    return config


def _too_deep() -> UserError:
    return UserError(
        "the configuration is nested too deeply; a section holds values and lists only."
    )


def parsed(text: str | bytes) -> dict[str, Any]:
    """The values of a file, unchecked.

    Raises:
        UserError: not a JSON object in UTF-8, or one that has a name twice.
    """
    try:
        text = text if isinstance(text, str) else text.decode()
        values = json.loads(text, object_pairs_hook=_object)
    except UserError:
        raise
    except RecursionError:
        raise _too_deep() from None
    except ValueError as error:  # of UTF-8, of JSON, or a number of thousands of digits
        raise UserError(f"a configuration is JSON in UTF-8, and this is not: {error}.") from error
    if not isinstance(values, dict):
        raise UserError(f"a configuration is a JSON object, not {shortened(json.dumps(values))}.")
    return values


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON; Python's own reader takes the last of equal names."""
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{shortened(twice)} is there twice in one object; leave one of them out.")
    return values


def _of_this_version(values: dict[str, Any]) -> dict[str, Any]:
    """What version 0.1 wrote, as it is written now.

    It had one field for every option that some method has, in ``method_options``. Before it had
    families of models, a file did not name one.
    """
    values = dict(values)
    if isinstance(model := values.get("model"), dict):
        values["model"] = {"family": DiTConfig.family} | model
    if isinstance(of := values.get("optimizer"), dict) and of.get("update") == "one_sweep_bf16":
        raise UserError(
            "optimizer.update=one_sweep_bf16: choose from auto, separate, one_sweep; a run of "
            "one_sweep_bf16, which is no more, continues with one_sweep in its config.json."
        )
    if "method_options" not in values:
        return values
    kind = bool | int | float | Literal["definition", "prediction"] | None
    options = strict.read(dict[str, kind], values.pop("method_options"), "method_options")
    from speed_engine.diffusion.method import options_of  # needs torch
    from speed_engine.diffusion.methods import METHODS

    known = {name: None for method in METHODS for name in options_of(method)}
    unset = known | {"weight_on": "definition", "weigh_bound": False}
    for name in options:
        if name not in known:
            raise unknown("option of method_options", name, known)
    given = {
        name: value
        for name, value in options.items()
        if (type(value), value) != (type(unset[name]), unset[name])
    }
    method = strict.read(str, values.get("method", TrainConfig.method), "method")
    spelling = read_spelling(method)
    values["method"] = str(dataclasses.replace(spelling, options={**spelling.options, **given}))
    return values


def check_whole(config: TrainConfig) -> None:
    """Refuse names that there are not, and what the rest of the configuration cannot have.

    That is not done where configurations are made, since each layer of one is made, and the next
    may put it right.

    Raises:
        UserError: of the method or its options, the solver, the process, the prediction, the
            optimizer or an average; the variance cannot be learned; or a rate has no effect.
    """
    _check_known(config)
    config.optimizer.check_effect()
    if getattr(config.model, "learn_sigma", False):
        from speed_engine.diffusion.learned_variance import check_learned_variance
        from speed_engine.diffusion.processes import build_schedule

        schedule = build_schedule(config.schedule, config.num_timesteps)
        check_learned_variance(schedule, config.prediction or schedule.prediction)


def _check_known(config: TrainConfig) -> None:
    # Not at the top: they need torch, which the command line starts without.
    from speed_engine.diffusion.method import check_options
    from speed_engine.diffusion.prediction import PREDICTIONS
    from speed_engine.diffusion.processes import SCHEDULES
    from speed_engine.diffusion.solvers import check_solver
    from speed_engine.training.ema import decay_of
    from speed_engine.training.optimizers import OPTIMIZERS

    check_options(read_spelling(config.method))
    check_solver(config.evaluation.solver)
    if config.schedule not in SCHEDULES:
        raise unknown("schedule", config.schedule, SCHEDULES)
    if config.prediction is not None and config.prediction not in PREDICTIONS:
        raise unknown("prediction", config.prediction, PREDICTIONS)
    if config.optimizer.name not in OPTIMIZERS:
        raise unknown("optimizer.name", config.optimizer.name, OPTIMIZERS)
    for average in config.optimizer.averages:
        decay_of(average)
