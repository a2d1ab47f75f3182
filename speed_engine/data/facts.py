"""What the record of a data set says of it, beside what a configuration says.

A run that does not fit its data is refused before its first step, and what a person left open is
taken from the record.
"""

from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from speed_engine.data.config import DataConfig
from speed_engine.data.format.decode import decode_image
from speed_engine.data.format.reader import ShardReader
from speed_engine.data.format.record import RECORD, Dataset, dataset_from_json, read_record
from speed_engine.data.format.remote import is_url
from speed_engine.runtime.checks import UserError

IMAGES = ("npy", "bf16.npy", "png", "jpg", "jpeg", "webp")
_LABEL, _TOKENS = "cls", "tokens.npy"
_LOOKED_AT = 8  # pictures, to learn whether they have colours


def refuse_unlike(data: DataConfig, dataset: Dataset) -> None:
    """Compare a configuration with the record of its data set; what is not recorded passes.

    Raises:
        UserError: classes, shape or channels are others, or latents are taken for pictures or
            pictures for latents; names option, value, and what is recorded.
    """
    image = data.members[0]
    facts: dict[str, Any] = dataset.contents.get(image, {})
    dtype = facts.get("dtype")
    recorded_shape: list[int] | None = facts.get("shape")
    shape = tuple(recorded_shape or [])
    where = f"{data.source} holds {image} of {dtype or 'several dtypes'} and shape {shape or '?'}"
    is_array = f".{image}".endswith(".npy")
    channels, height, width = data.image_shape
    if not data.latents and (channels not in (1, 3) or (is_array and _is_latent(dtype, shape))):
        raise UserError(
            f"{where}, and data.image_shape={data.image_shape}: pictures have 1 or 3 channels; if "
            f"these are latents, add --data.latents --evaluation.features none."
        )
    if data.latents and dtype == "uint8":
        raise UserError(
            f"{where}: these are pictures, not latents; leave --data.latents out, or make latents "
            f"of them with `speed-engine shards encode`."
        )
    parts = (1, 2) if data.latents else (1,)  # of a posterior: mean and standard deviation
    fitting: list[tuple[int, ...]] = [(part * channels, height, width) for part in parts]
    if shape and (shape if is_array else (channels, *shape)) not in fitting:
        wanted = " or ".join(str(of if is_array else (height, width)) for of in fitting)
        halves = ""
        if data.latents and len(shape) == 3 and shape[0] % 2 == 0:
            halves = (
                f" --data.image-shape {' '.join(map(str, shape))} trains on latents as they are "
                f"stored; with {shape[0] // 2} channels they are mean and standard deviation."
            )
        raise UserError(
            f"{where}; data.image_shape={data.image_shape} needs {wanted}. Correct "
            f"--data.image-shape or the data.{halves}"
        )
    classes = dataset.contents.get(_LABEL, {}).get("classes")
    if _LABEL in data.members and classes is not None and classes > data.num_classes:
        raise UserError(
            f"{data.source} has labels up to {classes - 1}, {classes} classes; "
            f"data.num_classes={data.num_classes} is too few: give --data.num-classes {classes}."
        )


def classes_with_samples(data: DataConfig, dataset: Dataset | None) -> list[int]:
    """The classes that images are generated of: those that the record says have samples.

    All are where the data set is not at hand.
    """
    facts = {} if dataset is None else dataset.contents.get(_LABEL, {})
    present: list[int] | None = facts.get("present")
    if present is None:  # all, as far as is known
        present = [*range(facts.get("classes") or data.num_classes)]
    return [c for c in present if c < data.num_classes] or [*range(data.num_classes)]


def recorded(source: str) -> Dataset | None:
    """The record of a local data set; None where there is none to be read.

    Raises:
        ShardError: it is damaged.
    """
    if source == "digits" or is_url(source):
        return None
    record = Path(source).expanduser() / RECORD
    return dataset_from_json(read_record(record), str(record)) if record.is_file() else None


def with_recorded_facts(data: DataConfig, dataset: Dataset) -> DataConfig:
    """A configuration that fits a data set, as far as its record says what is there.

    Members, shape, number of classes, and whether the images are latents come from the record. It
    does not say how many channels pictures have, so some of them are read. Nor does it say of
    latents that ``encode`` did not write whether half of their channels are a standard deviation,
    which the shape that is configured must tell.

    Args:
        data: its source is the data set; its members say what to prefer.
        dataset: the record.
    """
    contents = dataset.contents
    image = next((name for name in (data.members[0], *IMAGES) if name in contents), None)
    if image is None:
        return data
    others = [name for name in (_LABEL, _TOKENS) if name in contents][:1]
    conditions = [name for name in data.members[1:] if name in contents] or others
    found: dict[str, Any] = {"members": (image, *conditions)}
    shape = contents[image].get("shape")
    is_array = f".{image}".endswith(".npy")
    if shape and is_array and len(shape) == 3:
        found["latents"] = "latent_scale" in dataset.metadata
        if not found["latents"] or shape[0] % 2:
            found["image_shape"] = shape
        elif "vae" in dataset.metadata:
            found["image_shape"] = (shape[0] // 2, *shape[1:])
    elif shape and not is_array:
        found["image_shape"] = (_channels(data.source, dataset, image), *shape)
    if classes := contents.get(_LABEL, {}).get("classes"):
        found["num_classes"] = max(classes, len(dataset.metadata.get("classes", ())))
    if tokens := contents.get(_TOKENS, {}).get("shape"):
        found["token_shape"] = tuple(tokens)
    return replace(data, **found)


def has_several_classes(data: DataConfig, dataset: Dataset) -> bool:
    """Whether the record says so of the labels that a configuration reads."""
    labelled = _LABEL in data.members and _LABEL in dataset.contents
    return labelled and len(classes_with_samples(data, dataset)) > 1


def _channels(source: str, dataset: Dataset, image: str) -> int:
    """1 if the pictures looked at are grey, else 3; also where none can be read."""
    chosen = _spread(len(dataset.shards))
    others = [n for n in range(len(dataset.shards)) if n not in chosen]
    depths: list[int] = []
    for shard in [*chosen, *others]:
        # What is damaged is passed over: opening and training say it, by their policy.
        with suppress(UserError, OSError):
            path = Path(source).expanduser() / dataset.shards[shard].name
            reader = ShardReader(path, [image])
            for n in _spread(len(reader))[: -(-_LOOKED_AT // len(chosen))]:
                with suppress(UserError):
                    depths.append(len(decode_image(reader.read(n)[image], image, channels=1)))
        if len(depths) >= _LOOKED_AT:
            break
    return max(depths, default=3)


def _spread(count: int) -> list[int]:
    """Some of so many numbers, evenly."""
    numbers = np.linspace(0, count, _LOOKED_AT, endpoint=False).astype(int)
    return np.unique(numbers)[:count].tolist()


def _is_latent(dtype: str | None, shape: tuple[int, ...]) -> bool:
    """Arrays of numbers that are no pixels: of other channels than pictures have."""
    return dtype not in (None, "uint8") and len(shape) == 3 and shape[0] not in (1, 3)
