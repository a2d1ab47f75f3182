"""The objects of a run, made from its configuration.

Training, generation and evaluation all build through here, so that they agree on the model and the
process.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from speed_engine.config import TrainConfig
from speed_engine.data.format.held_out import Part
from speed_engine.data.format.reader import ShardReader
from speed_engine.data.format.remote import Cache, is_url
from speed_engine.data.loading.clean import Cleaning
from speed_engine.data.loading.conditions import (
    NULL_TOKENS,
    condition_name,
    decode_null_tokens,
    load_null_tokens,
)
from speed_engine.data.preparing.sources.digits import digits_folder
from speed_engine.diffusion.conditions import (
    ConditionChange,
    ConditionDropout,
    LowResolutionNoise,
)
from speed_engine.diffusion.grammar import read_spelling
from speed_engine.diffusion.method import Method, build_method, options_of
from speed_engine.diffusion.objective import Objective, training_passes
from speed_engine.diffusion.processes import build_schedule
from speed_engine.diffusion.terms import SquaredErrorAndBound
from speed_engine.models.families import Shape, build_network
from speed_engine.runtime.attention_check import AttentionShape, AttentionShapes
from speed_engine.runtime.checks import UserError
from speed_engine.runtime.files import cache_folder


def build_process(config: TrainConfig) -> Method:
    """The configured method on its process.

    Raises:
        UserError: an unknown schedule, method or prediction, or an option out of range.
    """
    spelling = read_spelling(config.method)
    options = dict(spelling.options)
    if "ramp_steps" in options_of(spelling.method):
        options.setdefault("ramp_steps", config.steps)
    schedule = build_schedule(config.schedule, config.num_timesteps)
    return build_method(spelling.method, schedule, config.prediction, seed=config.seed, **options)


def build_objective(
    config: TrainConfig, process: Method, model: nn.Module, store_noise: bool = False
) -> Objective:
    """The objective of the configured method for a model, on the CPU.

    Args:
        config: of the run.
        process: its method.
        model: what will be trained.
        store_noise: as in ``Objective``.

    Raises:
        UserError: a learned variance is asked for where there is none.
    """
    changes: list[ConditionChange] = [
        ConditionDropout(null_conditions(config), config.condition_dropout),
        LowResolutionNoise(config.low_resolution_noise),
    ]
    error = None
    if config.model.learn_sigma:
        error = SquaredErrorAndBound(process)
    return Objective(
        process, config.seed, network=model, changes=changes, error=error, store_noise=store_noise
    )


def build_model(config: TrainConfig, attention: str = "sdpa") -> nn.Module:
    """The configured model, initialised from the run's seed, on the current default device.

    Attention is not taken from the configuration, since what trained a model need not be there
    where it is used.
    """
    data, names = config.data, condition_names(config)
    channels, height, width = data.image_shape
    shape = Shape(
        input_size=(height, width),
        channels=channels,
        num_classes=data.num_classes if "labels" in names else None,
        token_dim=data.token_shape[1] if "tokens" in names else None,
        low_channels=data.low_shape[0] if "low_resolution" in names else None,
        attention=attention,
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)
        return build_network(config.model, shape)


def condition_names(config: TrainConfig) -> tuple[str, ...]:
    """What the model is conditioned on, as its arguments are named."""
    return tuple(condition_name(member) for member in config.data.members[1:])


def condition_shapes(config: TrainConfig) -> dict[str, tuple[int, ...]]:
    """Shape of one row of each condition."""
    data = config.data
    shapes = {"labels": (), "tokens": data.token_shape, "low_resolution": data.low_shape}
    return {name: shapes[name] for name in condition_names(config)}


def training_inputs(model: nn.Module, config: TrainConfig, images: int) -> list[dict[str, Tensor]]:
    """The model's arguments in every forward pass of a step, on the current default device."""
    conditions = {
        name: torch.zeros(images, *shape, dtype=torch.int64 if name == "labels" else torch.float32)
        for name, shape in condition_shapes(config).items()
    }
    inputs = {
        "x": torch.zeros(images, *config.data.image_shape),
        "t": torch.zeros(images),
        **conditions,
    }
    return [
        inputs
        | {name: torch.zeros(images, count, dtype=torch.int64) for name, count in words.items()}
        for words in training_passes(model)
    ]


def attention_shapes(config: TrainConfig) -> set[AttentionShape]:
    """In which the configured model calls PyTorch's attention; nothing is computed."""
    with torch.device("meta"), torch.no_grad(), AttentionShapes() as shapes:
        model = build_model(config)
        for inputs in training_inputs(model, config, 1):
            model(**inputs)
    return shapes.found


def null_conditions(config: TrainConfig) -> dict[str, Tensor]:
    """One row of each condition that can be hidden, as it is when hidden."""
    null: dict[str, Callable[[], Tensor]] = {
        "labels": lambda: torch.tensor(config.data.num_classes),
        "tokens": lambda: torch.from_numpy(_null_tokens(config)),
    }
    return {name: null[name]() for name in condition_names(config) if name in null}


def data_source(config: TrainConfig) -> Path | str:
    """Path or URL of the configured shards; an embedded data set is written to the cache first."""
    if config.data.source == "digits":
        return digits_folder()
    return config.data.source if is_url(config.data.source) else Path(config.data.source)


def open_data(
    config: TrainConfig, members: Sequence[str] | None = None, part: Part | None = "training"
) -> ShardReader:
    """The configured shards, with the configured or other members; of one part, or None for both.

    Raises:
        UserError: they are damaged, or lack a member that the model is conditioned on.
    """
    return ShardReader(
        data_source(config),
        members or config.data.members,
        Cache(cache_folder() / "shards", int(config.data.cache_gb * 1e9)),
        config.data.exclude,
        config.data.held_out,
        part,
    )


def _null_tokens(config: TrainConfig) -> np.ndarray:
    source = data_source(config)
    if isinstance(source, Path):
        return load_null_tokens(source)
    return decode_null_tokens(open_data(config).read_file(NULL_TOKENS), f"{source}/{NULL_TOKENS}")


def stores_posterior(config: TrainConfig, reader: ShardReader) -> bool:
    """Whether the data set holds mean and standard deviation of latents, to draw from."""
    content = reader.dataset.contents.get(config.data.members[0], {})
    shape = content.get("shape") or (None,)
    return config.data.latents and shape[0] == 2 * config.data.image_shape[0]


def stored_shape(config: TrainConfig, reader: ShardReader) -> tuple[int, int, int]:
    """Of an image in the shards."""
    channels, height, width = config.data.image_shape
    return (2 if stores_posterior(config, reader) else 1) * channels, height, width


def build_cleaning(config: TrainConfig, reader: ShardReader, device: torch.device) -> Cleaning:
    """How stored images become clean ones, on the device.

    Raises:
        UserError: latents as a VAE gives them, and nothing says how to scale them.
    """
    metadata = reader.dataset.metadata if config.data.latents else {}
    posterior = stores_posterior(config, reader)
    if posterior and "latent_scale" not in metadata:
        raise UserError(
            f"{config.data.source} holds mean and standard deviation of latents, and its record "
            "does not say by which latent_scale to multiply them; encode it again."
        )
    return Cleaning(
        seed=torch.tensor(config.seed, device=device),
        posterior=posterior,
        scale=float(metadata.get("latent_scale", 1.0)),
        shift=float(metadata.get("latent_shift", 0.0)),
        flip=config.data.flip,
    )
