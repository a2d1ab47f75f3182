"""The objects of a run, made from its configuration.

Training, generation and evaluation all build through here, so that they agree on the model and the
process.
"""

from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from speed_engine import checkpoint, environment
from speed_engine.config import TrainConfig, cache_folder, from_json
from speed_engine.data.clean import Cleaning
from speed_engine.data.conditions import (
    NULL_TOKENS,
    condition_name,
    decode_null_tokens,
    load_null_tokens,
)
from speed_engine.data.latents import decode_latents, load_vae
from speed_engine.data.loader import read_all, read_conditions
from speed_engine.data.reader import ShardReader
from speed_engine.data.remote import Cache, is_url
from speed_engine.data.sources import digits_folder
from speed_engine.data.split import Part, in_part, part_fingerprint
from speed_engine.data.texts import TextEncoder
from speed_engine.diffusion.conditions import (
    ConditionChange,
    ConditionDropout,
    Conditions,
    LowResolutionNoise,
)
from speed_engine.diffusion.hybrid import HybridObjective
from speed_engine.diffusion.masked import MaskedObjective
from speed_engine.diffusion.methods import Method, build_method, method_options
from speed_engine.diffusion.objective import Objective
from speed_engine.diffusion.processes import build_schedule
from speed_engine.distributed import ALONE, World
from speed_engine.evaluation.classifier import classifier_for
from speed_engine.evaluation.clip import ClipScore
from speed_engine.evaluation.evaluator import Evaluator
from speed_engine.evaluation.features import Extractor, inception_features
from speed_engine.evaluation.image_set import ImageSet, statistics_path
from speed_engine.families import Shape, build_network
from speed_engine.models.mdt import MDT
from speed_engine.models.pretrained import require_shapes
from speed_engine.models.super_resolution import SuperResolution

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


def build_objective(
    config: TrainConfig, process: Method, model: nn.Module, store_noise: bool = False
) -> Objective | MaskedObjective:
    """The objective of the configured method for a model, on the CPU.

    Args:
        config: of the run.
        process: its method.
        model: what will be trained.
        store_noise: as in ``Objective``.

    Raises:
        ValueError: a learned variance is asked for where there is none.
    """
    changes: list[ConditionChange] = [
        ConditionDropout(null_conditions(config), config.condition_dropout),
        LowResolutionNoise(config.low_resolution_noise),
    ]
    objective = Objective(process, config.seed, changes, store_noise)
    if config.model.learn_sigma:
        weigh_bound = config.method_options.weigh_bound
        objective = HybridObjective(process, config.seed, changes, weigh_bound, store_noise)
    masked = masked_network(model)
    return objective if masked is None else MaskedObjective(objective, masked.mask_words)


def masked_network(model: nn.Module) -> MDT | None:
    """The part of a model that is trained under a mask, too; None if there is none."""
    network = model.model if isinstance(model, SuperResolution) else model
    return network if isinstance(network, MDT) else None


def build_model(config: TrainConfig, attention: str = "sdpa") -> nn.Module:
    """The configured model, initialised from the run's seed, on the current default device.

    Attention is not taken from the configuration, since what trained a model need not be there
    where it is used.
    """
    data, told = config.data, told_names(config)
    channels, height, width = data.image_shape
    shape = Shape(
        input_size=(height, width),
        channels=channels,
        num_classes=data.num_classes if "labels" in told else None,
        token_dim=data.token_shape[1] if "tokens" in told else None,
        low_channels=data.low_shape[0] if "low_resolution" in told else None,
        attention=attention,
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)
        return build_network(config.model, shape)


def told_names(config: TrainConfig) -> tuple[str, ...]:
    """The conditions that the model is told, as its arguments are named."""
    return tuple(condition_name(member) for member in config.data.members[1:])


def condition_shapes(config: TrainConfig) -> dict[str, tuple[int, ...]]:
    """Shape of one row of each condition."""
    data = config.data
    shapes = {"labels": (), "tokens": data.token_shape, "low_resolution": data.low_shape}
    return {name: shapes[name] for name in told_names(config)}


def null_conditions(config: TrainConfig) -> dict[str, Tensor]:
    """One row of each condition that can be hidden, as it is when hidden."""
    null: dict[str, Callable[[], Tensor]] = {
        "labels": lambda: torch.tensor(config.data.num_classes),
        "tokens": lambda: torch.from_numpy(_null_tokens(config)),
    }
    return {name: null[name]() for name in told_names(config) if name in null}


def drawn_conditions(config: TrainConfig) -> Conditions:
    """(num_images, ...) each, of the images that an evaluation draws.

    Classes come in turn; texts and smaller images are those of the first samples, with their
    classes: of samples that are held out, where some are, since others could be known by heart.
    """
    told, num_images = told_names(config), config.evaluation.num_images
    if set(told) <= {"labels"}:
        return {name: torch.arange(num_images) % config.data.num_classes for name in told}
    reader = open_data(config, part="held_out")
    indices = [i % len(reader) for i in range(num_images)]
    conditions = read_conditions(reader, stored_shape(config, reader), indices)
    tensors = {name: torch.from_numpy(value) for name, value in conditions.items()}
    return {name: v.float() if v.is_floating_point() else v for name, v in tensors.items()}


def drawn_texts(config: TrainConfig) -> tuple[str, ...]:
    """(num_images,) the texts whose tokens ``drawn_conditions`` are.

    Raises:
        ValueError: the data have tokens only.
    """
    reader = open_data(config, ["txt"], part="held_out")
    numbers = [i % len(reader) for i in range(config.evaluation.num_images)]
    texts = {n: reader.read(n)["txt"].decode().partition("\n")[0] for n in set(numbers)}
    return tuple(texts[n] for n in numbers)


def prompted(
    config: TrainConfig, prompts: Sequence[str], text_encoder: str | None
) -> tuple[Conditions, dict[str, Tensor]]:
    """(num_images, ...) of prompts in turn, and what hides them.

    Raises:
        ValueError: the model is not told texts alone, or not those of this encoder.
    """
    if told_names(config) != ("tokens",):
        raise ValueError(
            f"this model is told {', '.join(told_names(config)) or 'nothing'}; a prompt needs one "
            "that is told texts alone (data.members with tokens.npy)."
        )
    if text_encoder is None:
        raise ValueError(
            "a prompt needs --text-encoder: the folder or hub name of the CLIP text model that "
            "the data were encoded with."
        )
    encoder = TextEncoder(text_encoder, torch.device("cpu"))
    tokens = torch.from_numpy(encoder(["", *prompts])).float()
    if tuple(tokens.shape[1:]) != tuple(config.data.token_shape):
        raise ValueError(
            f"{text_encoder} makes tokens of shape {tuple(tokens.shape[1:])}; the model was "
            f"trained on {config.data.token_shape}, of another encoder."
        )
    turns = torch.arange(config.evaluation.num_images) % len(prompts)
    return {"tokens": tokens[1:][turns]}, {"tokens": tokens[0]}


def data_source(config: TrainConfig) -> Path | str:
    """Path or URL of the configured shards; an embedded data set is written to the cache first."""
    if config.data.source == "digits":
        return digits_folder(cache_folder())
    return config.data.source if is_url(config.data.source) else Path(config.data.source)


def open_data(
    config: TrainConfig, members: Sequence[str] | None = None, part: Part | None = "training"
) -> ShardReader:
    """The configured shards, with the configured or other members; of one part, or None for both.

    Raises:
        ValueError: they are damaged, or lack a member that the model is to be told.
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
        ValueError: latents as a VAE gives them, and nothing says how to scale them.
    """
    metadata = reader.dataset.metadata if config.data.latents else {}
    posterior = stores_posterior(config, reader)
    if posterior and "latent_scale" not in metadata:
        raise ValueError(
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


def build_evaluator(config: TrainConfig, process: Method, world: World = ALONE) -> Evaluator:
    """Evaluation against the training and the held-out images, with the configured features.

    Raises:
        ValueError: there are too few images for a metric, or what it needs is missing.
    """
    settings = config.evaluation
    reference, held_out, clip, texts = None, None, None, ()
    if settings.features != "none":
        reference, held_out = references(config)
    if "clip" in settings.metrics and settings.clip_model is not None:
        clip = ClipScore(settings.clip_model, environment.torch_device(config))
        texts = drawn_texts(config)
    return Evaluator(
        schedule=process.schedule,
        table=process.table,
        reference=reference,
        extractor=None if reference is None else reference.extractor,
        metrics=settings.metrics,
        held_out=held_out,
        clip=clip,
        texts=texts,
        conditions=drawn_conditions(config),
        null=null_conditions(config),
        image_shape=config.data.image_shape,
        latents=config.data.latents,
        decode=build_decoder(config),
        num_images=settings.num_images,
        solver_steps=settings.solver_steps,
        solver=settings.solver,
        guidance=settings.guidance,
        guidance_interval=settings.guidance_interval,
        seed=config.seed,
        world=world,
    )


def build_decoder(config: TrainConfig) -> Callable[[Tensor], Tensor] | None:
    """Drawn latents to pictures, by the configured VAE; None where there is none.

    Raises:
        ValueError: the VAE cannot be loaded, or the data set does not say how latents are scaled.
    """
    if config.data.vae is None:
        return None
    metadata = open_data(config).dataset.metadata
    if "latent_scale" not in metadata:
        raise ValueError(
            f"{config.data.source} does not record its latent_scale, which decoding needs; "
            "`speed-engine shards index --metadata` records it."
        )
    vae = load_vae(config.data.vae, environment.torch_device(config))
    scale, shift = metadata["latent_scale"], metadata.get("latent_shift", 0.0)
    return partial(decode_latents, vae, scale=scale, shift=shift)


def references(config: TrainConfig) -> tuple[ImageSet, ImageSet | None]:
    """The images that are trained on, and those that are held out, if any, in one feature space."""
    image = config.data.members[0]
    reader = open_data(config, [m for m in config.data.members if m in (image, "cls")], part=None)
    share, is_held_out = config.data.held_out, np.zeros(len(reader), dtype=bool)
    if share:
        is_held_out = in_part(map(reader.key, range(len(reader))), share, "held_out")
    shape, policy = config.data.image_shape, config.data.on_bad_sample
    read = cache(lambda: read_all(reader, shape, policy, is_held_out))
    extractor = _extractor(config, reader, read)

    def part(name: Part, rows: np.ndarray) -> ImageSet:
        data = part_fingerprint(reader.fingerprint, share, name) if share else reader.fingerprint
        folder = cache_folder() / "statistics"
        file = statistics_path(folder, data, image, shape, extractor)
        images = lambda: torch.from_numpy(read()[0][rows] if share else read()[0])
        return ImageSet(images, int(rows.sum()), extractor, file)

    training = part("training", ~is_held_out)
    return training, part("held_out", is_held_out) if share else None


def _extractor(config: TrainConfig, reader: ShardReader, read: Callable[[], Any]) -> Extractor:
    """Of the features that images are compared by; ``read`` gives all images and conditions."""
    if config.evaluation.features == "inception":
        return inception_features(config.evaluation.inception_weights)
    if "cls" not in reader.keys:
        raise ValueError(
            "evaluation.features=classifier needs the labels of the images (member cls); use "
            "inception, or none to draw images only."
        )
    pixels, conditions = read()
    images, labels = torch.from_numpy(pixels), torch.from_numpy(conditions["labels"])
    return classifier_for(images, labels, cache_folder() / "features", reader.fingerprint)


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
    return load_average_of(newest_checkpoint(run), config, device)


def load_average_of(path: Path, config: TrainConfig, device: torch.device) -> tuple[nn.Module, int]:
    """The same from one checkpoint, which must be complete.

    Raises:
        ValueError: it belongs to another model.
    """
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
    require_shapes(ours, {name: tuple(v.shape) for name, v in tensors.items()}, source)
    model.load_state_dict(tensors)
