"""A classifier of the real images, whose features compare images far from photographs.

Features are its 64 activations before the last layer, after the ReLU. It is trained once per data
set and kept, with its accuracy on held-out images.

Letters: N images, C channels, H height, W width, K classes.
"""

import copy
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from speed_engine.encoders.hub import sha256_of
from speed_engine.evaluation.features import Extractor, import_torch_fidelity
from speed_engine.runtime.checks import UserError
from speed_engine.runtime.files import write_durably
from speed_engine.runtime.progress import announced

FEATURES_VERSION = 1  # raise it with any change to the network or its training
FEATURE_DIM = 64

LEAST_STEPS = 300
EPOCHS = 8  # at least; 72 % of CIFAR-10 at 16 pixels are then right
BATCH_SIZE = 128  # images per step
LEARNING_RATE = 5e-3  # at its peak; it falls to zero along a cosine
WEIGHT_DECAY = 1e-2
TRUSTED_ACCURACY = 0.8  # below, its features hardly tell classes apart
HOLD_OUT_EVERY = 5  # one image in five, in the order of a seeded permutation
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ClassifierFeatures(Extractor):
    """The features of a classifier trained on the real images."""

    accuracy: float  # on held-out images, in [0, 1]
    network: "Classifier" = field(repr=False, compare=False)

    def register(self) -> None:
        """Make torch-fidelity know ``name``; a second call does nothing."""
        import_torch_fidelity()
        from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY, register_feature_extractor

        if self.name not in FEATURE_EXTRACTORS_REGISTRY:
            register_feature_extractor(self.name, _adapter_class(self.network))

    def describe(self) -> str:
        """For a person."""
        return (
            f"{self.feature_dim} of a classifier of these data, "
            f"right on {self.accuracy:.1%} of held-out images"
        )

    def doubt(self) -> str | None:
        """Features that cannot tell the classes apart cannot tell good images from bad ones."""
        if self.accuracy >= TRUSTED_ACCURACY:
            return None
        return (
            f"the classifier whose features are compared is right on {self.accuracy:.1%} of "
            "held-out images only, so its FID can be low for bad images: look at the images, or "
            "use --evaluation.features inception (`evaluate`: --features inception)."
        )


class Classifier(nn.Module):
    """A CNN for images of any size: two convolutions, a 4 x 4 grid of averages, two layers.

    Batch normalisation before each ReLU keeps all 64 features alive: without it some are zero on
    every image, and the distance is measured in fewer dimensions than it says.
    """

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.to_grid = nn.Sequential(
            nn.Conv2d(channels, 32, 3, padding=1),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(4),
        )
        self.to_features = nn.Sequential(
            nn.Flatten(),
            nn.Linear(64 * 4 * 4, FEATURE_DIM),
            nn.BatchNorm1d(FEATURE_DIM),
            nn.ReLU(),
        )
        self.to_logits = nn.Linear(FEATURE_DIM, num_classes)

    def features(self, images: Tensor) -> Tensor:
        """(N, C, H, W) uint8 or float, range 0..255 -> (N, 64) float32, not negative."""
        return self.to_features(self.to_grid(images.float() / 127.5 - 1))

    def forward(self, images: Tensor) -> Tensor:
        """(N, C, H, W) uint8 or float, range 0..255 -> (N, K) float32 logits."""
        return self.to_logits(self.features(images))


def train_classifier(images: Tensor, labels: Tensor, seed: int = 0) -> tuple[Classifier, float]:
    """Train on four images in five; measure on the fifth, which training never sees.

    Runs on one CPU thread, wherever the inputs are, so that neither the GPU nor the thread count
    changes the result: the same inputs and seed give the same bits on one machine. The global
    random state is neither read nor changed.

    Args:
        images: (N, C, H, W) uint8, real images.
        labels: (N,) integer classes, 0 and up.
        seed: decides the split, the initial weights, the batches and the shifts.

    Returns:
        The trained network in eval mode, and its accuracy on the held-out images, in [0, 1].

    Raises:
        UserError: for inputs of another dtype or shape, or too few images or classes.
    """
    _check_labelled_images(images, labels)
    images, labels = images.cpu(), labels.cpu().long()
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images), generator=generator)
    is_held_out = torch.arange(len(images)) % HOLD_OUT_EVERY == 0
    held_out, training = order[is_held_out], order[~is_held_out]

    with _one_thread(), torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed CUDA as well
        network = Classifier(images.shape[1], int(labels.max()) + 1)
        steps = training_steps(len(images))
        _fit(network, images[training], labels[training], steps, generator)
    with torch.no_grad():
        answers = torch.cat([network(part).argmax(1) for part in images[held_out].split(1024)])
    return network, (answers == labels[held_out]).double().mean().item()


def classifier_for(
    images: Tensor, labels: Tensor, folder: Path | str, fingerprint: str
) -> ClassifierFeatures:
    """The classifier of one data set: read from ``folder``, else trained and put there.

    Args:
        images: (N, C, H, W) uint8, the real images.
        labels: (N,) integer classes, 0 and up.
        folder: made if it does not exist.
        fingerprint: names the data set and what is read of it; letters, digits, ``.``, ``_`` and
            ``-``.

    Raises:
        UserError: for bad inputs (see ``train_classifier``) or a damaged or foreign cache file.
    """
    _check_labelled_images(images, labels)
    path = _kept_at(folder, fingerprint, len(images))
    if path.exists():
        return _load(path, images.shape[1], int(labels.max()) + 1)
    seed = 0
    with announced("training a classifier of these images, whose features FID compares; once"):
        network, accuracy = train_classifier(images, labels, seed)
    _save(path, network, accuracy, seed)
    return _as_features(network, accuracy)


def kept_classifier(
    count: int, channels: int, folder: Path | str, fingerprint: str
) -> ClassifierFeatures | None:
    """The classifier of a data set, which need not be read for it; None if there is none yet.

    Args:
        count: of the images.
        channels: of an image.
        folder: as in ``classifier_for``.
        fingerprint: as in ``classifier_for``.

    Raises:
        UserError: for a damaged or foreign cache file.
    """
    path = _kept_at(folder, fingerprint, count)
    return _load(path, channels) if path.exists() else None


def _kept_at(folder: Path | str, fingerprint: str, images: int) -> Path:
    if not re.fullmatch(r"[\w.-]+", fingerprint, re.ASCII):
        raise UserError(
            f"fingerprint={fingerprint!r} becomes part of a file name; "
            "use letters, digits, '.', '_' and '-' only."
        )
    steps = training_steps(images)
    longer = "" if steps == LEAST_STEPS else f"-{steps}"
    return Path(folder) / f"classifier-v{FEATURES_VERSION}{longer}-{fingerprint}.safetensors"


# Training.


def training_steps(images: int) -> int:
    """Of a data set of so many images, of which four in five are trained on."""
    share = (HOLD_OUT_EVERY - 1) / HOLD_OUT_EVERY
    return max(LEAST_STEPS, round(EPOCHS * share * images / BATCH_SIZE))


def _check_labelled_images(images: Tensor, labels: Tensor) -> None:
    if images.dtype != torch.uint8 or images.ndim != 4:
        raise UserError(
            f"images are {tuple(images.shape)} {images.dtype}; "
            "need (N, C, H, W) torch.uint8, 0..255."
        )
    if labels.shape != images.shape[:1] or labels.is_floating_point() or labels.is_complex():
        raise UserError(
            f"labels are {tuple(labels.shape)} {labels.dtype}; "
            f"need one integer class for each of the {len(images)} images."
        )
    if len(images) < HOLD_OUT_EVERY or labels.min() < 0 or labels.unique().numel() < 2:
        raise UserError(
            f"{len(images)} images, first classes {labels.unique().tolist()[:10]}; a classifier "
            f"needs {HOLD_OUT_EVERY} images or more, and two classes or more, numbered from 0."
        )


@contextmanager
def _one_thread() -> Iterator[None]:
    """Sums in one order whatever the thread count; where cores are shared, also the faster way."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _fit(
    network: Classifier, images: Tensor, labels: Tensor, steps: int, generator: torch.Generator
) -> None:
    """Leaves the network in eval mode."""
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, steps)
    for _ in range(steps):
        ids = torch.randint(len(images), (BATCH_SIZE,), generator=generator)
        shifted = _shifted(images[ids].float(), generator)
        loss = F.cross_entropy(network(shifted), labels[ids])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    network.eval()


def _shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """(N, C, H, W) -> same, each image moved by up to 1/16 of its side; edges are repeated."""
    count, channels, height, width = images.shape
    reach = max(1, min(height, width) // 16)
    padded = F.pad(images, (reach,) * 4, mode="replicate")
    y, x = torch.randint(2 * reach + 1, (2, count, 1), generator=generator)
    rows, columns = y + torch.arange(height), x + torch.arange(width)
    image, channel = torch.arange(count), torch.arange(channels)
    return padded[
        image[:, None, None, None],
        channel[:, None, None],
        rows[:, None, :, None],
        columns[:, None, None, :],
    ]


# Cache: the weights and what is known about them in one file, so that they cannot come apart.


def _as_features(network: Classifier, accuracy: float) -> ClassifierFeatures:
    digest = sha256_of(network.state_dict())
    return ClassifierFeatures(
        name=f"speed-classifier-v{FEATURES_VERSION}-{digest[:16]}",
        weights_sha256=digest,
        feature_dim=FEATURE_DIM,
        channels=next(network.parameters()).shape[1],
        accuracy=accuracy,
        network=network,
    )


def _save(path: Path, network: Classifier, accuracy: float, seed: int) -> None:
    """What cannot be kept is trained again."""
    facts = {
        "accuracy": repr(accuracy),
        "seed": str(seed),
        "torch": torch.__version__,
        "weights_sha256": sha256_of(network.state_dict()),
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_durably(path, save(network.state_dict(), metadata=facts), shared=True)
    except OSError as error:
        log.warning("%s could not be kept: %s", path, error)


def _load(path: Path, channels: int, num_classes: int | None = None) -> ClassifierFeatures:
    """Of as many classes as it was trained on, where it isn't known how many there are."""
    of_classes = "" if num_classes is None else f", {num_classes} classes"
    try:
        with safe_open(path, framework="pt") as file:
            facts = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}
        classes = len(weights["to_logits.weight"]) if num_classes is None else num_classes
        network = Classifier(channels, classes).eval()
        network.load_state_dict(weights)
        features = _as_features(network, accuracy=float(facts["accuracy"]))
        if features.weights_sha256 != facts["weights_sha256"]:
            raise UserError("the weights are not those it was written with")
    except (SafetensorError, RuntimeError, KeyError, ValueError) as error:
        raise UserError(
            f"{path} is not the classifier of this data set ({channels} channels{of_classes}) "
            f"or is damaged: {error}. Delete the file; the classifier is trained again."
        ) from error
    return features


# torch-fidelity.


def _adapter_class(network: Classifier) -> type:
    """A torch-fidelity extractor class around ``network``.

    Its base class exists only once torch-fidelity, and so torchvision, has been imported.
    """
    from torch_fidelity.feature_extractor_base import FeatureExtractorBase

    class ClassifierAdapter(FeatureExtractorBase):
        """(N, C, H, W) uint8 -> the requested ones of features (N, 64) and logits (N, K)."""

        def __init__(self, name: str, features_list: list[str], **_settings: object) -> None:
            super().__init__(name, features_list)
            self.network = copy.deepcopy(network)  # torch-fidelity moves it to its own device

        def forward(self, images: Tensor) -> tuple[Tensor, ...]:
            features = self.network.features(images)
            layers = {"features": features, "logits": self.network.to_logits(features)}
            # float64: torch-fidelity averages in the dtype of the features
            return tuple(layers[name].double() for name in self.features_list)

        @staticmethod
        def get_provided_features_list() -> tuple[str, ...]:
            return "features", "logits"

        @staticmethod
        def get_default_feature_layer_for_metric(metric: str) -> Literal["features", "logits"]:
            return "logits" if metric == "isc" else "features"

        @staticmethod
        def can_be_compiled() -> bool:
            return False

    return ClassifierAdapter
