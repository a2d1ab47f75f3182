"""How a configuration generates: solver and guidance, and the classes, texts or smaller images."""

import logging
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from speed_engine.data.batch import StoredBatch
from speed_engine.data.config import DataConfig
from speed_engine.data.facts import classes_with_samples, recorded
from speed_engine.data.format.record import Dataset
from speed_engine.data.loading.clean import Cleaning
from speed_engine.data.loading.decoding import BatchReader
from speed_engine.data.loading.order import elsewhere
from speed_engine.data.opening import condition_names, open_data, stored_shape
from speed_engine.diffusion.conditions import Conditions
from speed_engine.encoders.text import TextEncoder
from speed_engine.evaluation.config import EvaluationConfig
from speed_engine.evaluation.generate import GenerationSettings
from speed_engine.runtime.checks import UserError, unknown
from speed_engine.runtime.memory import check_memory

log = logging.getLogger(__name__)


def generation_settings(evaluation: EvaluationConfig) -> GenerationSettings:
    """The configured solver and guidance."""
    return GenerationSettings(
        solver=evaluation.solver,
        steps=evaluation.solver_steps,
        guidance=evaluation.guidance,
        interval=evaluation.guidance_interval,
        channels=evaluation.guidance_channels,
    )


def generation_conditions(data: DataConfig, num_images: int, seed: int) -> Conditions:
    """(num_images, ...) each, of the images that an evaluation generates.

    Classes that have samples come in turn; texts and smaller images are those of the first samples,
    with their classes: of samples that are held out, where some are, since others could be known by
    heart. Where one is damaged and ``data.on_bad_sample`` is skip, another takes its place.

    Raises:
        UserError: their numbers alone are more than this machine's memory, or a sample is damaged
            and the policy is to stop.
    """
    check_memory(f"the numbers of {num_images:,} images", 8 * num_images, "ask for fewer")
    names = condition_names(data)
    if set(names) <= {"labels"}:
        if not names:
            return {}
        classes = torch.tensor(classes_with_samples(data, known_dataset(data)))
        return {"labels": classes[torch.arange(num_images) % len(classes)]}
    stored, _ = _first_samples(data, num_images)
    conditions = Cleaning(torch.tensor(seed)).batch(stored).conditions
    turns = torch.arange(num_images) % len(stored.ids)
    return {name: rows[turns] for name, rows in conditions.items()}


def _first_samples(data: DataConfig, num_images: int) -> tuple[StoredBatch, np.ndarray]:
    """At most so many, and (B,) their numbers, or those of their substitutes."""
    reader = open_data(data, part="held_out")
    count = min(num_images, len(reader))
    numbers = np.arange(count)

    def substitute(place: int, attempt: int) -> int:
        numbers[place] = elsewhere(place, attempt, len(reader))
        return int(numbers[place])

    batches = BatchReader(reader, stored_shape(data, reader), on_bad_sample=data.on_bad_sample)
    return batches.read(range(count), substitute), numbers


def class_names(data: DataConfig) -> list[str]:
    """Of the classes, in the order of their numbers; none where the data set has no names."""
    try:
        dataset = recorded(data.source)
    except OSError:
        return []
    return dataset.metadata.get("classes", []) if dataset is not None else []


def of_classes(data: DataConfig, num_images: int, classes: Sequence[str]) -> Conditions:
    """(num_images,) labels of these classes in turn.

    Args:
        data: of the run.
        num_images: to generate.
        classes: each by its name or its number.

    Raises:
        UserError: the model is not conditioned on classes alone, or has no such class.
    """
    if condition_names(data) != ("labels",):
        raise UserError(
            f"this model is conditioned on {', '.join(condition_names(data)) or 'nothing'}; "
            "--class needs one conditioned on classes alone (data.members with cls)."
        )
    names, numbers = class_names(data), [*map(str, range(data.num_classes))]
    labels = []
    for one in classes:
        if one not in names and one not in numbers:
            raise unknown("class", one, [*names, *numbers][:100])
        labels.append(names.index(one) if one in names else int(one))
    return {"labels": torch.tensor(labels)[torch.arange(num_images) % len(labels)]}


def known_dataset(data: DataConfig) -> Dataset | None:
    """What is known of the data set; None, after a warning, where it is not at hand."""
    try:
        return recorded(data.source) or open_data(data, part=None).dataset
    except OSError as error:
        log.warning("images of all data.num_classes are generated, with samples or not: %s", error)
        return None


def generation_texts(data: DataConfig, num_images: int) -> tuple[str, ...]:
    """(num_images,) the texts whose tokens ``generation_conditions`` are.

    Raises:
        UserError: the data have tokens only, or a text is damaged.
    """
    reader = open_data(data, ["txt"], part="held_out")
    _, numbers = _first_samples(data, num_images)
    texts = [reader.read(n)["txt"].decode().partition("\n")[0] for n in numbers.tolist()]
    return tuple(texts[i % len(texts)] for i in range(num_images))


def prompted(
    data: DataConfig, num_images: int, prompts: Sequence[str], text_encoder: str | None
) -> tuple[Conditions, dict[str, Tensor]]:
    """(num_images, ...) of prompts in turn, and what hides them.

    Raises:
        UserError: the model is not conditioned on texts alone, or not those of this encoder.
    """
    if condition_names(data) != ("tokens",):
        raise UserError(
            f"this model is conditioned on {', '.join(condition_names(data)) or 'nothing'}; a "
            "prompt needs one conditioned on texts alone (data.members with tokens.npy)."
        )
    if text_encoder is None:
        raise UserError(
            "a prompt needs --text-encoder: the folder or hub name of the CLIP text model that "
            "the data were encoded with."
        )
    encoder = TextEncoder(text_encoder, torch.device("cpu"))
    tokens = torch.from_numpy(encoder(["", *prompts])).float()
    if tuple(tokens.shape[1:]) != tuple(data.token_shape):
        raise UserError(
            f"{text_encoder} makes tokens of shape {tuple(tokens.shape[1:])}; the model was "
            f"trained on {data.token_shape}, of another encoder."
        )
    turns = torch.arange(num_images) % len(prompts)
    return {"tokens": tokens[1:][turns]}, {"tokens": tokens[0]}
