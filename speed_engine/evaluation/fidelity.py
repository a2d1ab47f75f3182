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
from typing import Any, Literal

import torch
from torch import Tensor

from speed_engine.evaluation.features import Extractor, import_torch_fidelity, inception_features
from speed_engine.evaluation.image_set import ImageSet
from speed_engine.runtime.checks import UserError

KID_SUBSET_SIZE = 1000  # images, where there are as many

# metric: {field of FidelityResult: key in torch-fidelity's answer}
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
        UserError: before anything is computed, for images that do not fit each other or the
            extractor, too few images for a metric, an unknown metric, or missing weights.
        ImportError: if torch-fidelity or torchvision cannot be imported.
    """
    if isinstance(extractor, str):
        if extractor != "inception":
            raise UserError(
                f'extractor={extractor!r}; the only one known by name is "inception", '
                "others are made by classifier_for."
            )
        extractor = inception_features()
    metrics = tuple(metrics)
    _check_metrics(metrics)
    _check_images(generated, reference, extractor)
    check_counts(len(generated), len(reference), extractor, metrics)

    drawn = ImageSet(generated, len(generated), extractor, logits="isc" in metrics)
    real = ImageSet(reference, len(reference), extractor)
    return FidelityResult(
        **compare(drawn, real, metrics),
        extractor=extractor.name,
        weights_sha256=extractor.weights_sha256,
        feature_dim=extractor.feature_dim,
        num_generated=len(generated),
        num_reference=len(reference),
    )


def compare(generated: ImageSet, reference: ImageSet, metrics: Iterable[str]) -> dict[str, float]:
    """What torch-fidelity computes of the features, by the fields of ``FidelityResult``.

    All compare the features of one extractor; precision and recall, too, which torch-fidelity would
    by itself compute from another network's.
    """
    import_torch_fidelity()
    from torch_fidelity.metric_fid import fid_statistics_to_metric
    from torch_fidelity.metric_isc import isc_featuresdict_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    def kid() -> dict[str, float]:
        size = min(KID_SUBSET_SIZE, len(generated), len(reference))
        features = generated.features, reference.features
        return kid_features_to_metric(*features, kid_subset_size=size, verbose=False)

    compute: dict[str, Any] = {
        "fid": lambda: fid_statistics_to_metric(generated.statistics, reference.statistics, False),
        "kid": kid,
        "isc": lambda: isc_featuresdict_to_metric({"isc": generated.logits}, "isc", verbose=False),
        "prc": lambda: prc_features_to_metric(
            generated.features, reference.features, save_cpu_ram=True, verbose=False
        ),
    }
    values = {metric: compute[metric]() for metric in metrics}
    return {field: values[m][key] for m in values for field, key in METRICS[m].items()}


def _check_metrics(metrics: tuple[str, ...]) -> None:
    if not metrics or not set(metrics) <= METRICS.keys():
        raise UserError(f"metrics={metrics}; name one or more of {', '.join(METRICS)}.")


def _check_images(generated: Tensor, reference: Tensor, extractor: Extractor) -> None:
    for name, images in {"generated": generated, "reference": reference}.items():
        if images.dtype != torch.uint8 or images.ndim != 4:
            raise UserError(
                f"{name} images are {tuple(images.shape)} {images.dtype}; need (N, C, H, W) "
                "torch.uint8, 0..255: scale, round and clamp before the conversion."
            )
        if len(images) == 0:
            raise UserError(f"there are no {name} images, shape {tuple(images.shape)}.")
    if generated.shape[1:] != reference.shape[1:]:
        raise UserError(
            f"generated images are {tuple(generated.shape[1:])}, reference images "
            f"{tuple(reference.shape[1:])} (C, H, W); they must agree: convert the reference the "
            "way the training data were converted, do not resize the generated ones."
        )
    check_channels(generated.shape[1], extractor)


def check_channels(channels: int, extractor: Extractor) -> None:
    """Whether the extractor takes such images.

    Raises:
        UserError: it does not.
    """
    if channels != extractor.channels and (channels, extractor.channels) != (1, 3):
        raise UserError(
            f"images have {channels} channels, {extractor.name} takes {extractor.channels}; "
            "use an extractor trained on images like these."
        )


def check_counts(
    num_generated: int, num_reference: int, extractor: Extractor, metrics: tuple[str, ...]
) -> None:
    """Whether so many images suffice, to be known before they are drawn.

    Raises:
        UserError: they do not, for one of the metrics.
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
            raise UserError(
                f"{metric} with {extractor.name} ({extractor.feature_dim} features) needs {least} "
                f"images or more on both sides, {reason}; got {num_generated} generated, "
                f"{num_reference} reference. Use more images or another extractor or metric."
            )
