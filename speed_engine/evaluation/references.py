"""The real images that a model is measured by: compared with generated ones, and denoised."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from speed_engine.data.batch import StoredBatch
from speed_engine.data.config import DataConfig
from speed_engine.data.facts import IMAGES as PICTURE_MEMBERS
from speed_engine.data.format.held_out import Part, in_part, part_fingerprint
from speed_engine.data.format.remote import is_url
from speed_engine.data.loading.decoding import BatchReader, Shape, read_all
from speed_engine.data.loading.order import elsewhere
from speed_engine.data.opening import build_cleaning, contents_of, open_data, stored_shape
from speed_engine.diffusion.fitted import Method
from speed_engine.evaluation.archive import PICTURES, open_archive
from speed_engine.evaluation.classifier import classifier_for, kept_classifier
from speed_engine.evaluation.config import EvaluationConfig
from speed_engine.evaluation.dinov2 import dinov2_features
from speed_engine.evaluation.features import Extractor, import_torch_fidelity, inception_features
from speed_engine.evaluation.image_set import ImageSet, statistics_path
from speed_engine.evaluation.picture_folder import PictureFolder, open_pictures, picture_names
from speed_engine.evaluation.validation import IMAGES, Validation
from speed_engine.runtime.checks import UserError
from speed_engine.runtime.files import cache_folder
from speed_engine.runtime.world import ALONE, World


@dataclass(frozen=True, kw_only=True)
class RealImages:
    """What generated images are compared with, in one feature space.

    Attributes:
        extractor: of the features.
        training: the images that are trained on; None where there is a reference.
        held_out: those of the data set that are not, if any; None where there is a reference.
        reference: real pictures from elsewhere, in place of both, or their statistics.
        reference_sha256: of the content of the reference, 64 hexadecimal digits.
    """

    extractor: Extractor
    training: ImageSet | None = None
    held_out: ImageSet | None = None
    reference: ImageSet | None = None
    reference_sha256: str | None = None


def real_images(
    data: DataConfig, evaluation: EvaluationConfig, shape: Shape, on_gpu: bool = False
) -> RealImages:
    """The configured reference, or the images of the data set where none is configured.

    Args:
        data: configuration of what is trained on.
        evaluation: its features and its reference.
        shape: (C, H, W) of generated pictures.
        on_gpu: whether features are computed on the current GPU.

    Raises:
        UserError: the reference is missing, damaged, or unlike the pictures, or the features need
            what the real images lack.
    """
    if evaluation.reference is None:
        return _of_data_set(data, evaluation, on_gpu)
    if evaluation.reference.endswith(".npz"):
        return _of_archive(evaluation, shape, on_gpu)
    path = Path(evaluation.reference).expanduser()
    if not is_url(evaluation.reference):
        if not path.exists():
            raise UserError(f"evaluation.reference={path} does not exist; correct the path.")
        if path.is_dir() and not any(path.glob("*.tar")) and (names := picture_names(path)):
            return _of_pictures(evaluation, open_pictures(path, names, shape), on_gpu)
    return _of_shards(data, evaluation, shape, on_gpu)


def _of_data_set(data: DataConfig, evaluation: EvaluationConfig, on_gpu: bool) -> RealImages:
    image = data.members[0]
    reader = open_data(data, [m for m in data.members if m in (image, "cls")], part=None)
    share, is_held_out = data.held_out, np.zeros(len(reader), dtype=bool)
    if share:
        is_held_out = in_part(map(reader.key, range(len(reader))), share, "held_out")
    shape, policy = data.image_shape, data.on_bad_sample
    read = cache(lambda: read_all(reader, shape, policy, is_held_out))
    labelled = partial(_labelled, read) if "cls" in reader.keys else None
    extractor = _extractor(
        evaluation, reader.fingerprint, image, len(reader), shape[0], labelled, on_gpu
    )

    def part(name: Part, rows: np.ndarray) -> ImageSet:
        whole = reader.fingerprint
        content = part_fingerprint(whole, share, name) if share else whole
        images = lambda: torch.from_numpy(read()[0][rows] if share else read()[0])
        file = _statistics_file(content, image, shape, extractor)
        return ImageSet(images, int(rows.sum()), extractor, file)

    training, held_out = part("training", ~is_held_out), None
    if data.test_source is not None:
        held_out = _test_images(data, extractor)
    elif share:
        held_out = part("held_out", is_held_out)
    return RealImages(extractor=extractor, training=training, held_out=held_out)


def _of_shards(
    data: DataConfig, evaluation: EvaluationConfig, shape: Shape, on_gpu: bool
) -> RealImages:
    """A reference in shards, of which the first member that holds pictures is taken."""
    source = str(evaluation.reference)
    like = DataConfig(source=source, image_shape=shape, cache_gb=data.cache_gb)
    contents = contents_of(like)
    pictures = [
        name
        for name in PICTURE_MEMBERS
        if name in contents and (not name.endswith("npy") or contents[name]["dtype"] == "uint8")
    ]
    if not pictures:
        raise UserError(
            f"evaluation.reference={source} holds {', '.join(contents)}, none of which are "
            "pictures of 8 bits; name the shards that the latents were made of."
        )
    image = pictures[0]
    recorded: Sequence[int] | None = contents[image].get("shape")
    if recorded is None:
        raise _unlike(source, "pictures of several shapes", shape)
    if not image.endswith("npy"):  # which are read in grey or in colour, as asked for
        recorded = (shape[0], *recorded)
    _check_alike(source, tuple(recorded), shape)
    reader = open_data(like, [image, "cls"] if "cls" in contents else [image])
    read = cache(lambda: read_all(reader, shape, data.on_bad_sample))
    labelled = partial(_labelled, read) if "cls" in contents else None
    extractor = _extractor(
        evaluation, reader.fingerprint, image, len(reader), shape[0], labelled, on_gpu
    )
    file = _statistics_file(reader.fingerprint, image, shape, extractor)
    images = ImageSet(lambda: torch.from_numpy(read()[0]), len(reader), extractor, file)
    return RealImages(extractor=extractor, reference=images, reference_sha256=reader.fingerprint)


def _of_pictures(evaluation: EvaluationConfig, pictures: PictureFolder, on_gpu: bool) -> RealImages:
    """A reference in a plain folder."""
    read, labels = cache(pictures.images), pictures.labels
    labelled = None if labels is None else lambda: (read(), labels)
    count, channels = len(pictures.names), pictures.shape[0]
    extractor = _extractor(evaluation, pictures.sha256, PICTURES, count, channels, labelled, on_gpu)
    file = _statistics_file(pictures.sha256, PICTURES, pictures.shape, extractor)
    images = ImageSet(read, count, extractor, file)
    return RealImages(extractor=extractor, reference=images, reference_sha256=pictures.sha256)


def _of_archive(evaluation: EvaluationConfig, shape: Shape, on_gpu: bool) -> RealImages:
    """A reference in the layout of ADM's evaluator; its statistics are those of Inception."""
    source = str(evaluation.reference)
    archive = open_archive(Path(source).expanduser())
    if archive.shape is not None:
        count, height, width, channels = archive.shape
        _check_alike(source, (channels, height, width), shape)
    elif evaluation.features != "inception":
        raise UserError(
            f"evaluation.reference={source} holds statistics of Inception's features and no "
            f"pictures, which evaluation.features={evaluation.features} needs; set "
            "evaluation.features=inception."
        )
    else:
        count, (channels, height, width) = 0, shape
    labels = archive.labels
    labelled = None if labels is None else lambda: (archive.images(), labels)
    extractor = _extractor(evaluation, archive.sha256, PICTURES, count, channels, labelled, on_gpu)
    known = archive.statistics if evaluation.features == "inception" else None
    if known is not None and len(known["mu"]) != extractor.feature_dim:
        raise UserError(
            f"evaluation.reference={source} holds statistics of {len(known['mu'])} features, "
            f"{extractor.name} has {extractor.feature_dim}; use statistics of Inception's features."
        )
    file = _statistics_file(archive.sha256, PICTURES, (channels, height, width), extractor)
    images = ImageSet(archive.images, count, extractor, file, known=known)
    return RealImages(extractor=extractor, reference=images, reference_sha256=archive.sha256)


def _check_alike(source: str, found: tuple[int, ...], shape: Shape) -> None:
    """Whether real pictures are like generated ones, but for grey ones repeated to three colours.

    Raises:
        UserError: they have another size or other channels.
    """
    if found[1:] != shape[1:] or (found[0] != shape[0] and (found[0], shape[0]) != (3, 1)):
        raise _unlike(source, f"pictures of shape {found}", shape)


def _unlike(source: str, what: str, shape: Shape) -> UserError:
    return UserError(
        f"evaluation.reference={source} holds {what}, and this run generates pictures of "
        f"(channels, height, width) {shape}; name real pictures of this shape, such as what "
        f"`speed-engine shards make --size {shape[2]}` makes."
    )


def _test_images(data: DataConfig, extractor: Extractor) -> ImageSet:
    """Of another data set than that which is trained on."""
    image, shape = data.members[0], data.image_shape
    reader = open_data(data, [image], part="held_out")
    file = _statistics_file(reader.fingerprint, image, shape, extractor)
    images = lambda: torch.from_numpy(read_all(reader, shape, data.on_bad_sample)[0])
    return ImageSet(images, len(reader), extractor, file)


def validation_of(
    data: DataConfig,
    process: Method,
    seed: int,
    device: torch.device,
    world: World = ALONE,
    images: int = IMAGES,
) -> Validation:
    """With images of the held-out part, or of the training part where nothing is held out.

    Args:
        data: the configured data set; images are taken at equal distances over all of it.
        process: on which the model is trained.
        seed: root of the noise, and of the draws from posteriors of latents.
        device: of the model.
        world: the processes.
        images: at most so many.

    Raises:
        UserError: a sample is damaged and the policy is to stop.
    """
    reader = open_data(data, part="held_out" if data.holds_out else "training")
    numbers = np.linspace(0, len(reader), min(images, len(reader)), endpoint=False).astype(int)

    def substitute(place: int, attempt: int) -> int:
        return elsewhere(int(numbers[place]), attempt, len(reader))

    batches = BatchReader(reader, stored_shape(data, reader), on_bad_sample=data.on_bad_sample)
    stored = batches.read(numbers, substitute)
    stored = StoredBatch(stored.images, stored.conditions, stored.ids).to(device)
    cleaning = build_cleaning(data, reader, seed, device)._replace(flip=False)
    return Validation(process, cleaning.batch(stored), seed, world)


def _statistics_file(content: str, member: str, shape: Sequence[int], extractor: Extractor) -> Path:
    return statistics_path(cache_folder() / "statistics", content, member, shape, extractor)


def _labelled(read: Callable[[], Any]) -> tuple[torch.Tensor, torch.Tensor]:
    pixels, conditions = read()
    return torch.from_numpy(pixels), torch.from_numpy(conditions["labels"])


def _extractor(
    evaluation: EvaluationConfig,
    content: str,
    member: str,
    count: int,
    channels: int,
    labelled: Callable[[], tuple[torch.Tensor, torch.Tensor]] | None,
    on_gpu: bool,
) -> Extractor:
    """Of the features that images are compared by.

    Args:
        evaluation: which features.
        content: fingerprint of the real images.
        member: which member of a sample is the image.
        count: how many there are.
        channels: of an image.
        labelled: reads them and their classes; None where they have none.
        on_gpu: whether they are computed on the current GPU.

    Raises:
        UserError: the features need what is not there; torch-fidelity, which compares them, cannot
            be imported.
    """
    import_torch_fidelity()  # here, since what is wrong with it must not end a run that trains
    if evaluation.features == "inception":
        return replace(inception_features(evaluation.inception_weights), on_gpu=on_gpu)
    if evaluation.features == "dinov2":
        return replace(dinov2_features(evaluation.dinov2_weights), on_gpu=on_gpu)
    if labelled is None:
        raise UserError(
            "evaluation.features=classifier needs the labels of the images (member cls, arr_1 of "
            "an .npz, or a sub-folder per class); use inception or dinov2, or none to generate "
            "images only."
        )
    folder, name = cache_folder() / "features", f"{content}-{member}-{channels}"
    kept = kept_classifier(count, channels, folder, name)
    return replace(kept or classifier_for(*labelled(), folder, name), on_gpu=on_gpu)
