"""What is measured of generated images: one table, which all other places read.

A metric is a function and its entry in ``METRICS``. From the entry follow what the option
``evaluation.metrics`` takes and its help text, what is checked before training, the records, the
table of ``speed-engine evaluate`` and the curves of comparisons. Importing this module is cheap:
functions import what they compute with.

A function's arguments are what its entry needs, of these:

    images      (N, C, H, W) uint8 pictures that were generated
    generated   their features, an ``ImageSet``
    logits      (N, K) answers of the extractor's classifier to them
    real        features of real images: of those that were trained on and, for the figures whose
                names begin with ``held_out_``, of those that were not; the function is called
                twice. With ``evaluation.reference`` those of the reference alone
    training    features of the images that were trained on
    held_out    features of the images that were not
    labels      (N,) classes that the images were generated for, as the classifier of the features,
                trained on these data, numbers them
    texts       (N,) texts that the images were generated from
    clip        a ``ClipScore``
    validation  the error of the model at fixed timesteps and noise, see validation.py
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

    from speed_engine.encoders.clip import ClipScore
    from speed_engine.evaluation.image_set import ImageSet

HELD_OUT = "held_out_"  # begins the names of figures that compare with held-out images
ENOUGH = 10_000  # images with which FID's bias no longer matters much


@dataclass(frozen=True)
class Figure:
    """One number of a metric, and how it is shown.

    Attributes:
        title: for a person.
        better: which way.
        format: of the number, as Python writes it.
        published: whether published values of it are in Inception's features, so that the title
            must say when they are others.
    """

    title: str
    better: Literal["lower", "higher"]
    format: str = ".4g"
    published: bool = False


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One way to measure images.

    Attributes:
        about: what it is, for the help text.
        figures: what it writes, by the name in records.
        needs: arguments of ``compute``, see the head of this module.
        compute: returns the value of each figure, by its name in ``figures``.
        least: number of features -> images that it needs on both sides.
        why: the reason for that number, after a comma.
        by_statistics: whether mean and covariance of the features of real images suffice.
        bias: real images, N -> the figure of two random sets of N of them, which cannot tell them
            apart; None where few images do not bias the figure.
    """

    about: str
    figures: Mapping[str, Figure]
    needs: tuple[str, ...]
    compute: Callable[..., dict[str, float]]
    least: Callable[[int], int] = lambda features: 1
    why: str = ""
    by_statistics: bool = False
    bias: "Callable[[ImageSet, int], float] | None" = None


def _frechet_distance(generated: "ImageSet", real: "ImageSet") -> dict[str, float]:
    from speed_engine.evaluation.fidelity import frechet_distance

    return {"fid": frechet_distance(generated.statistics, real.statistics)}


def _frechet_distance_of_real(real: "ImageSet", count: int) -> float:
    from speed_engine.evaluation.fidelity import frechet_distance_within

    return frechet_distance_within(real, count)


def _kernel_distance(generated: "ImageSet", real: "ImageSet") -> dict[str, float]:
    from speed_engine.evaluation.fidelity import kernel_distance

    return {"kid": kernel_distance(generated, real)}


def _inception_score(logits: "Tensor") -> dict[str, float]:
    from speed_engine.evaluation.fidelity import inception_score

    return {"isc": inception_score(logits)}


def _precision_and_recall(generated: "ImageSet", real: "ImageSet") -> dict[str, float]:
    from speed_engine.evaluation.fidelity import precision_and_recall

    precision, recall = precision_and_recall(generated, real)
    return {"precision": precision, "recall": recall}


def _class_agreement(generated: "ImageSet", labels: "Tensor") -> dict[str, float]:
    right = generated.logits.argmax(dim=1) == labels
    return {"class_agreement": right.double().mean().item()}


def _copied_share(
    generated: "ImageSet", training: "ImageSet", held_out: "ImageSet"
) -> dict[str, float]:
    nearest, usual = generated.nearest_in(training), held_out.nearest_in(training)
    return {"copied_share": nearest.copied_share(usual)}


def _clip_score(images: "Tensor", texts: tuple[str, ...], clip: "ClipScore") -> dict[str, float]:
    return {"clip_score": clip(images, texts)}


METRICS = {
    "fid": Metric(
        about="Fréchet distance of the features",
        figures={"fid": Figure("FID", "lower", ".3f", published=True)},
        needs=("generated", "real"),
        compute=_frechet_distance,
        least=lambda features: features + 1,
        why="or the covariance of the features is singular",
        by_statistics=True,
        bias=_frechet_distance_of_real,
    ),
    "kid": Metric(
        about="kernel distance of the features",
        figures={"kid": Figure("KID", "lower", published=True)},
        needs=("generated", "real"),
        compute=_kernel_distance,
        least=lambda features: 2,
        why="for an unbiased estimate",
    ),
    "isc": Metric(
        about="Inception score",
        figures={"isc": Figure("inception score", "higher", published=True)},
        needs=("logits",),
        compute=_inception_score,
        least=lambda features: 10,
        why="one for each of its ten splits",
    ),
    "prc": Metric(
        about="precision and recall",
        figures={
            "precision": Figure("precision", "higher"),
            "recall": Figure("recall", "higher"),
        },
        needs=("generated", "real"),
        compute=_precision_and_recall,
        least=lambda features: 4,
        why="each with three neighbours",
    ),
    "class_agreement": Metric(
        about="share of images that the classifier of evaluation.features=classifier takes for the "
        "class that they were generated for",
        figures={"class_agreement": Figure("class agreement", "higher")},
        needs=("generated", "labels"),
        compute=_class_agreement,
    ),
    "copies": Metric(
        about="share of images as near to a training image as the nearest 5% of held-out images "
        "are; needs data.held_out",
        figures={"copied_share": Figure("copied share", "lower")},
        needs=("generated", "training", "held_out"),
        compute=_copied_share,
    ),
    "loss": Metric(
        about="validation loss: the error at fixed timesteps and noise, of held-out images where "
        "there are some, else of training images",
        figures={"validation_loss": Figure("validation loss", "lower")},
        needs=("validation",),
        compute=lambda validation: {"validation_loss": validation},
    ),
    "clip": Metric(
        about="CLIP score of pictures and their texts; needs evaluation.clip_model",
        figures={"clip_score": Figure("CLIP score", "higher")},
        needs=("images", "texts", "clip"),
        compute=_clip_score,
    ),
}

FIGURES = {name: figure for metric in METRICS.values() for name, figure in metric.figures.items()}

HELP = "Metrics to compute: {}.".format(
    ", ".join(f"{name} ({m.about})" for name, m in METRICS.items())
)


def fields(metric: str, held_out: bool) -> list[str]:
    """Names in records of what a metric measures.

    Args:
        metric: a key of ``METRICS``.
        held_out: whether there are held-out images to compare with, too.
    """
    names = list(METRICS[metric].figures)
    if held_out and "real" in METRICS[metric].needs:
        names += [HELD_OUT + name for name in names]
    return names


def is_figure(field: str) -> bool:
    """Whether a field of a record is a figure of a metric, of either part of the real images."""
    return field.removeprefix(HELD_OUT) in FIGURES


def title(field: str, extractor: str | None) -> str:
    """A field's title, such as ``held-out FID (classifier features)``.

    Args:
        field: of a record; one that no metric writes is its own title.
        extractor: name of the extractor of the features; None if there is none.
    """
    figure = FIGURES.get(field.removeprefix(HELD_OUT))
    if figure is None:
        return field
    words = f"held-out {figure.title}" if field.startswith(HELD_OUT) else figure.title
    of = _other_features(field, extractor)
    return words if of is None else f"{words} ({of} features)"


def curve(field: str, extractor: str | None) -> str:
    """A field's name where nothing beside it names the features: ``fid/classifier_features``.

    With the features of published figures, and without any, it is the field itself.
    """
    of = _other_features(field, extractor)
    return field if of is None else f"{field}/{of}_features"


def _other_features(field: str, extractor: str | None) -> str | None:
    """The features of a figure whose published values have others."""
    from speed_engine.evaluation.features import INCEPTION

    figure = FIGURES.get(field.removeprefix(HELD_OUT))
    if figure is None or not figure.published or extractor is None or extractor == INCEPTION:
        return None
    families = {"speed-classifier-": "classifier", "dinov2-": "DINOv2"}
    return next((of for begin, of in families.items() if extractor.startswith(begin)), extractor)


def written(field: str, value: float | None) -> str:
    """A figure's value in its format; a dash where it isn't known."""
    return "–" if value is None else format(value, FIGURES[field.removeprefix(HELD_OUT)].format)
