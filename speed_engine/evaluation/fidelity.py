"""Fidelity: how close generated images are to real ones, measured by torch-fidelity.

    FID         Frechet distance of two Gaussians fitted to the features (Heusel et al. 2017)
                |m_g - m_r|^2 + tr(S_g + S_r - 2 (S_g S_r)^(1/2)); lower is better
    KID         unbiased squared MMD, cubic kernel (Binkowski et al. 2018), mean over subsets; lower
    IS          exp of the mutual information of image and class (Salimans et al. 2016); higher
    precision   share of generated images inside the real manifold (Kynkaanniemi et al. 2019)
    recall      share of real images inside the generated manifold

Letters: N generated images, M reference images, C channels, H height, W width.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset

from speed_engine.evaluation.features import Extractor, import_torch_fidelity, inception_features

KID_SUBSET_SIZE = 1000  # images, where there are as many
BATCH_SIZE = 256  # images through the extractor at once

# torch-fidelity's switch: {field of FidelityResult: key in torch-fidelity's answer}
METRICS = {
    "fid": {"fid": "frechet_inception_distance"},
    "kid": {"kid": "kernel_inception_distance_mean"},
    "isc": {"isc": "inception_score_mean"},
    "prc": {"precision": "precision", "recall": "recall"},
}


@dataclass(frozen=True, kw_only=True)
class FidelityResult:
    """The metrics that were asked for, and what they depend on; None means not asked for."""

    fid: float | None = None
    kid: float | None = None
    isc: float | None = None
    precision: float | None = None  # in [0, 1]
    recall: float | None = None  # in [0, 1]
    extractor: str
    weights_sha256: str  # of the extractor
    feature_dim: int
    num_generated: int
    num_reference: int


def measure(
    generated: Tensor,
    reference: Tensor,
    extractor: Extractor | Literal["inception"],
    metrics: Iterable[str] = ("fid",),
) -> FidelityResult:
    """Compare two sets of images, on the GPU if there is one.

    Deterministic; the global random state is left as it was, and nothing is cached on disk.

    Args:
        generated: (N, C, H, W) uint8.
        reference: (M, C, H, W) uint8.
        extractor: from ``classifier_for`` or ``inception_features``; ``"inception"`` looks for the
            weights where torch.hub keeps them.
        metrics: any of ``METRICS``.

    Raises:
        ValueError: before anything is computed, for images that do not fit each other or the
            extractor, too few images for a metric, an unknown metric, or missing weights.
        ImportError: if torch-fidelity or torchvision cannot be imported.
    """
    if isinstance(extractor, str):
        if extractor != "inception":
            raise ValueError(
                f'extractor={extractor!r}; the only one known by name is "inception", '
                "others are made by classifier_for."
            )
        extractor = inception_features()
    metrics = tuple(metrics)
    _check_metrics(metrics)
    _check_images(generated, reference, extractor)
    check_counts(len(generated), len(reference), extractor, metrics)

    torch_fidelity = import_torch_fidelity()
    extractor.register()
    # DataLoader draws a seed and Inception its first weights from the global generator.
    with torch.random.fork_rng(devices=[]):
        values = torch_fidelity.calculate_metrics(
            input1=_Images(generated, extractor.channels),
            input2=_Images(reference, extractor.channels),
            feature_extractor=extractor.name,
            feature_extractor_weights_path=extractor.weights_path,
            kid_subset_size=min(KID_SUBSET_SIZE, len(generated), len(reference)),
            batch_size=BATCH_SIZE,
            cuda=torch.cuda.is_available(),
            save_cpu_ram=True,  # no worker processes: the images are in memory already
            cache=False,
            verbose=False,
            **dict.fromkeys(metrics, True),
        )
    return FidelityResult(
        **{field: values[key] for m in metrics for field, key in METRICS[m].items()},
        extractor=extractor.name,
        weights_sha256=extractor.weights_sha256,
        feature_dim=extractor.feature_dim,
        num_generated=len(generated),
        num_reference=len(reference),
    )


class _Images(Dataset[Tensor]):
    """Images one by one, (C, H, W) uint8; grey ones repeated where the extractor wants RGB."""

    def __init__(self, images: Tensor, channels: int) -> None:
        self.images = images.cpu().expand(-1, channels, -1, -1)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index]


def _check_metrics(metrics: tuple[str, ...]) -> None:
    if not metrics or not set(metrics) <= METRICS.keys():
        raise ValueError(f"metrics={metrics}; name one or more of {', '.join(METRICS)}.")


def _check_images(generated: Tensor, reference: Tensor, extractor: Extractor) -> None:
    for name, images in {"generated": generated, "reference": reference}.items():
        if images.dtype != torch.uint8 or images.ndim != 4:
            raise ValueError(
                f"{name} images are {tuple(images.shape)} {images.dtype}; need (N, C, H, W) "
                "torch.uint8, 0..255: scale, round and clamp before the conversion."
            )
        if len(images) == 0:
            raise ValueError(f"there are no {name} images, shape {tuple(images.shape)}.")
    if generated.shape[1:] != reference.shape[1:]:
        raise ValueError(
            f"generated images are {tuple(generated.shape[1:])}, reference images "
            f"{tuple(reference.shape[1:])} (C, H, W); they must agree: convert the reference the "
            "way the training data were converted, do not resize the generated ones."
        )
    channels = generated.shape[1]
    if channels != extractor.channels and (channels, extractor.channels) != (1, 3):
        raise ValueError(
            f"images have {channels} channels, {extractor.name} takes {extractor.channels}; "
            "use an extractor trained on images like these."
        )


def check_counts(
    num_generated: int, num_reference: int, extractor: Extractor, metrics: tuple[str, ...]
) -> None:
    """Whether so many images suffice, to be known before they are drawn.

    Raises:
        ValueError: they do not, for one of the metrics.
    """
    needed = {
        "fid": (extractor.feature_dim + 1, "or the covariance of the features is singular"),
        "kid": (2, "for an unbiased estimate"),
        "isc": (10, "one for each of its ten splits"),
        "prc": (4, "each with three neighbours"),
    }
    for metric in metrics:
        least, reason = needed[metric]
        if min(num_generated, num_reference) < least:
            raise ValueError(
                f"{metric} with {extractor.name} ({extractor.feature_dim} features) needs {least} "
                f"images or more on both sides, {reason}; got {num_generated} generated, "
                f"{num_reference} reference. Use more images or another extractor or metric."
            )
