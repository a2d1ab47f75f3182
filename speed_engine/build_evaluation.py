"""What a run generates and measures, made from its configuration.

Evaluation in training and afterwards, generation and comparisons all build through here.
"""

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from speed_engine.build import condition_names, null_conditions, open_data, stored_shape
from speed_engine.config import TrainConfig
from speed_engine.data.format.held_out import Part, in_part, part_fingerprint
from speed_engine.data.format.reader import ShardReader
from speed_engine.data.loading.clean import Cleaning
from speed_engine.data.loading.decoding import BatchReader, read_all
from speed_engine.diffusion.conditions import Conditions
from speed_engine.diffusion.method import Method
from speed_engine.encoders.clip import ClipScore
from speed_engine.encoders.text import TextEncoder
from speed_engine.encoders.vae import decode_latents, load_vae
from speed_engine.evaluation.classifier import classifier_for
from speed_engine.evaluation.evaluator import Evaluator
from speed_engine.evaluation.features import Extractor, inception_features
from speed_engine.evaluation.generate import GenerationSettings
from speed_engine.evaluation.image_set import ImageSet, statistics_path
from speed_engine.runtime import machine
from speed_engine.runtime.checks import UserError
from speed_engine.runtime.files import cache_folder
from speed_engine.runtime.world import ALONE, World


def build_evaluator(config: TrainConfig, process: Method, world: World = ALONE) -> Evaluator:
    """Evaluation against the training and the held-out images, with the configured features.

    Raises:
        UserError: there are too few images for a metric, or what it needs is missing.
    """
    settings = config.evaluation
    training, held_out, clip, texts = None, None, None, ()
    if settings.features != "none":
        training, held_out = real_images(config)
    if "clip" in settings.metrics and settings.clip_model is not None:
        clip = ClipScore(settings.clip_model, machine.torch_device(config.device))
        texts = generation_texts(config)
    return Evaluator(
        table=process.table,
        settings=generation_settings(config),
        training=training,
        extractor=None if training is None else training.extractor,
        metrics=settings.metrics,
        held_out=held_out,
        clip=clip,
        texts=texts,
        conditions=generation_conditions(config),
        null=null_conditions(config),
        image_shape=config.data.image_shape,
        latents=config.data.latents,
        decode=build_decoder(config),
        num_images=settings.num_images,
        seed=config.seed,
        world=world,
    )


def generation_settings(config: TrainConfig) -> GenerationSettings:
    """The configured solver and guidance."""
    return GenerationSettings(
        solver=config.evaluation.solver,
        steps=config.evaluation.solver_steps,
        guidance=config.evaluation.guidance,
        interval=config.evaluation.guidance_interval,
    )


def build_decoder(config: TrainConfig) -> Callable[[Tensor], Tensor] | None:
    """Generated latents to pictures, by the configured VAE; None where there is none.

    Raises:
        UserError: the VAE cannot be loaded, or the data set does not say how latents are scaled.
    """
    if config.data.vae is None:
        return None
    metadata = open_data(config).dataset.metadata
    if "latent_scale" not in metadata:
        raise UserError(
            f"{config.data.source} does not record its latent_scale, which decoding needs; "
            "`speed-engine shards index --metadata` records it."
        )
    vae = load_vae(config.data.vae, machine.torch_device(config.device))
    scale, shift = metadata["latent_scale"], metadata.get("latent_shift", 0.0)
    return partial(decode_latents, vae, scale=scale, shift=shift)


def generation_conditions(config: TrainConfig) -> Conditions:
    """(num_images, ...) each, of the images that an evaluation generates.

    Classes come in turn; texts and smaller images are those of the first samples, with their
    classes: of samples that are held out, where some are, since others could be known by heart.
    """
    names, num_images = condition_names(config), config.evaluation.num_images
    if set(names) <= {"labels"}:
        return {name: torch.arange(num_images) % config.data.num_classes for name in names}
    reader = open_data(config, part="held_out")
    indices = [i % len(reader) for i in range(num_images)]
    stored = BatchReader(reader, stored_shape(config, reader)).read(indices)
    return Cleaning(torch.tensor(config.seed)).batch(stored).conditions


def generation_texts(config: TrainConfig) -> tuple[str, ...]:
    """(num_images,) the texts whose tokens ``generation_conditions`` are.

    Raises:
        UserError: the data have tokens only.
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
        UserError: the model is not conditioned on texts alone, or not those of this encoder.
    """
    names = condition_names(config)
    if names != ("tokens",):
        raise UserError(
            f"this model is conditioned on {', '.join(names) or 'nothing'}; a prompt needs one "
            " conditioned on texts alone (data.members with tokens.npy)."
        )
    if text_encoder is None:
        raise UserError(
            "a prompt needs --text-encoder: the folder or hub name of the CLIP text model that "
            "the data were encoded with."
        )
    encoder = TextEncoder(text_encoder, torch.device("cpu"))
    tokens = torch.from_numpy(encoder(["", *prompts])).float()
    if tuple(tokens.shape[1:]) != tuple(config.data.token_shape):
        raise UserError(
            f"{text_encoder} makes tokens of shape {tuple(tokens.shape[1:])}; the model was "
            f"trained on {config.data.token_shape}, of another encoder."
        )
    turns = torch.arange(config.evaluation.num_images) % len(prompts)
    return {"tokens": tokens[1:][turns]}, {"tokens": tokens[0]}


def real_images(config: TrainConfig) -> tuple[ImageSet, ImageSet | None]:
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
        raise UserError(
            "evaluation.features=classifier needs the labels of the images (member cls); use "
            "inception, or none to generate images only."
        )
    pixels, conditions = read()
    images, labels = torch.from_numpy(pixels), torch.from_numpy(conditions["labels"])
    return classifier_for(images, labels, cache_folder() / "features", reader.fingerprint)
