"""The objects of a run, made from its configuration.

Training, generation and evaluation all build through here, so that they agree on the model and the
process.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from speed_engine import checkpoint
from speed_engine.config import TrainConfig, cache_folder, from_json
from speed_engine.data.loader import read_all
from speed_engine.data.shards import ShardReader
from speed_engine.data.sources import digits_folder
from speed_engine.diffusion.hybrid import HybridObjective
from speed_engine.diffusion.methods import Method, build_method, method_options
from speed_engine.diffusion.objective import Objective
from speed_engine.diffusion.processes import build_schedule
from speed_engine.distributed import ALONE, World
from speed_engine.evaluation.classifier import classifier_for
from speed_engine.evaluation.evaluator import Evaluator
from speed_engine.evaluation.features import Extractor, inception_features
from speed_engine.models.dit import DiT

CONFIG_FILE = "config.json"
CHECKPOINTS = "checkpoints"


def build_process(config: TrainConfig) -> Method:
    """The configured method on its process.

    Raises:
        ValueError: an unknown schedule, method or prediction, or an option out of range.
    """
    options = config.method_options.given()
    if "ramp_steps" in method_options(config.method):
        options.setdefault("ramp_steps", config.steps)
    return build_method(
        config.method,
        build_schedule(config.schedule, config.num_timesteps),
        config.prediction,
        stratified=config.method_options.stratified,
        normalised=config.method_options.normalised,
        weight_on=config.method_options.weight_on,
        seed=config.seed,
        **options,
    )


def build_objective(config: TrainConfig, process: Method) -> Objective:
    """The objective of the configured method, on the CPU.

    Raises:
        ValueError: a learned variance is asked for where there is none.
    """
    null_label, dropout = config.data.num_classes, config.label_dropout
    if config.model.learn_sigma:
        return HybridObjective(
            process, config.seed, null_label, dropout, config.method_options.weigh_bound
        )
    return Objective(process, config.seed, null_label, dropout)


def build_model(config: TrainConfig) -> nn.Module:
    """The configured model, initialised from the run's seed, on the CPU."""
    channels, height, width = config.data.image_shape
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)
        return DiT(
            input_size=(height, width),
            channels=channels,
            patch_size=config.model.patch_size,
            dim=config.model.dim,
            depth=config.model.depth,
            num_heads=config.model.num_heads,
            num_classes=config.data.num_classes,
            mlp_ratio=config.model.mlp_ratio,
            learn_sigma=config.model.learn_sigma,
        )


def open_data(config: TrainConfig) -> ShardReader:
    """The configured shards; an embedded data set is written to the cache first."""
    digits = config.data.source == "digits"
    folder = digits_folder(cache_folder()) if digits else Path(config.data.source)
    return ShardReader(folder, config.data.members)


def build_evaluator(
    config: TrainConfig, process: Method, reader: ShardReader, world: World = ALONE
) -> Evaluator:
    """Evaluation against the training images, with the configured features."""
    images, labels = (torch.from_numpy(a) for a in read_all(reader, config.data.image_shape))
    settings = config.evaluation
    return Evaluator(
        schedule=process.schedule,
        table=process.table,
        reference=images,
        extractor=_extractor(config, images, labels, reader.fingerprint),
        num_classes=config.data.num_classes,
        num_images=settings.num_images,
        solver_steps=settings.solver_steps,
        guidance=settings.guidance,
        seed=config.seed,
        world=world,
    )


def _extractor(config: TrainConfig, images: Tensor, labels: Tensor, fingerprint: str) -> Extractor:
    if config.evaluation.features == "inception":
        return inception_features(config.evaluation.inception_weights)
    return classifier_for(images, labels, cache_folder() / "features", fingerprint)


def read_config(run: Path) -> TrainConfig:
    """The resolved configuration of a run.

    Raises:
        ValueError: the folder is not a run.
    """
    path = run / CONFIG_FILE
    if not path.is_file():
        raise ValueError(f"{run} is not a run folder: it has no {CONFIG_FILE}.")
    return from_json(path.read_text())


def load_average(run: Path, config: TrainConfig, device: torch.device) -> tuple[nn.Module, int]:
    """(averaged model, its step) from a run's newest complete checkpoint.

    Raises:
        ValueError: there is no checkpoint, or it belongs to another model.
    """
    path = newest_checkpoint(run)
    model = build_model(config)
    load_parameters(model, checkpoint.load_group(path, "ema"), path)
    step = checkpoint.read_state(path)["step"]
    return model.to(device).eval().requires_grad_(False), step


def newest_checkpoint(run: Path) -> Path:
    """Of a run.

    Raises:
        ValueError: there is none.
    """
    try:
        return checkpoint.newest(run / CHECKPOINTS)
    except FileNotFoundError as error:
        raise ValueError(str(error)) from error


def load_parameters(model: nn.Module, tensors: dict[str, Tensor], source: Path) -> None:
    """Strict load.

    Raises:
        ValueError: names or shapes differ; lists them.
    """
    ours = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    theirs = {name: tuple(value.shape) for name, value in tensors.items()}
    checkpoint.require_equal(source, theirs, ours)
    model.load_state_dict(tensors)
