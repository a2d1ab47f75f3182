"""What a metric says of images that no network made: the lines below which training has to come.

    Gaussian per class   drawn from a normal distribution with mean and covariance of the training
                         images of each class: what first and second moments alone look like
    training images      a random part of them: what a perfect memory looks like

Letters: N images, C channels, H, W pixels.
"""

from dataclasses import replace

import torch
from torch import Tensor

from speed_engine.arena.results import GAUSSIAN, REAL
from speed_engine.build import build_evaluator, build_process
from speed_engine.config import TrainConfig
from speed_engine.data.loading.decoding import read_all
from speed_engine.data.opening import open_data


def measure_references(config: TrainConfig) -> dict[str, dict[str, float]]:
    """Name -> metric: value, with as many images, of the same classes, as a run's evaluations.

    There are none of latents, of which a data set holds no pictures.

    Args:
        config: what the runs of a comparison share; its metrics are measured, without the
            validation loss and the class agreement, which are of models.
    """
    of_models = ("loss", "class_agreement")  # of which the latter asks for images by class
    metrics = tuple(name for name in config.evaluation.metrics if name not in of_models)
    if config.data.latents or not metrics:
        return {}
    config = replace(config, evaluation=replace(config.evaluation, metrics=metrics))
    evaluator = build_evaluator(config, build_process(config))
    pixels, conditions = read_all(
        open_data(config.data), config.data.image_shape, config.data.on_bad_sample
    )
    images = torch.from_numpy(pixels)
    count = evaluator.num_images
    labels, wanted = torch.zeros(len(images)).long(), torch.zeros(count).long()
    if "labels" in conditions:
        labels = torch.from_numpy(conditions["labels"])
        wanted = evaluator.conditions["labels"]
    generator = torch.Generator().manual_seed(config.seed)
    drawn = {
        GAUSSIAN: gaussian_images(images, labels, wanted, generator),
        REAL: images[torch.randint(len(images), (count,), generator=generator)],
    }
    measured = {name: evaluator.measure(made) for name, made in drawn.items()}
    return {name: dict(found.figures) for name, found in measured.items() if found is not None}


def gaussian_images(
    images: Tensor, labels: Tensor, wanted: Tensor, generator: torch.Generator
) -> Tensor:
    """(N, C, H, W) uint8 draws from the normal distribution of each class.

    A draw is the mean and a random combination of the deviations from it, which has their
    covariance, of whatever rank.

    Args:
        images: (M, C, H, W) uint8 to fit.
        labels: (M,) int64 of these.
        wanted: (N,) int64 labels of the draws; one that no image has stands for all of them.
        generator: of the random numbers.
    """
    drawn = torch.empty(len(wanted), *images.shape[1:], dtype=torch.uint8)
    for label in wanted.unique():
        own = images[labels == label]
        rows = (own if len(own) else images).flatten(1).double()
        deviations = rows - rows.mean(0)
        places = (wanted == label).nonzero()[:, 0]
        shares = torch.randn(len(places), len(rows), generator=generator, dtype=torch.float64)
        draws = rows.mean(0) + shares @ deviations / max(len(rows) - 1, 1) ** 0.5
        drawn[places] = draws.round().clamp(0, 255).to(torch.uint8).unflatten(1, images.shape[1:])
    return drawn
