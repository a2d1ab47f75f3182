"""A set of images as metrics see it: features, their mean and covariance, each computed once.

Mean and covariance of real images are kept on disk, so that a large set need not be read again for
the Frechet distance. A file is named by all that it depends on, and never unpickled.

Letters: N images, D features, K classes, C channels, H height, W width.
"""

import hashlib
import io
import json
import logging
import zipfile
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from speed_engine.evaluation.copies import Nearest, nearest
from speed_engine.evaluation.features import Extractor, import_torch_fidelity
from speed_engine.runtime.checks import UserError
from speed_engine.runtime.files import write_durably
from speed_engine.runtime.precision import exact_float32

BATCH_SIZE = 256  # images through the extractor at once
Statistics = dict[str, np.ndarray]  # mu (D,), sigma (D, D), as torch-fidelity has them
log = logging.getLogger(__name__)


class ImageSet:
    """Images, and what an extractor makes of them.

    Args:
        images: (N, C, H, W) uint8, or what reads them; called when first needed.
        count: N; 0 where ``known`` is all there is.
        extractor: of the features.
        statistics_file: where mean and covariance are kept, see ``statistics_path``; None keeps
            nothing.
        logits: whether IS will be asked for, whose layer then is extracted in the same pass.
        known: mean and covariance, where they came with the images or in their place.
    """

    def __init__(
        self,
        images: Callable[[], Tensor] | Tensor,
        count: int,
        extractor: Extractor,
        statistics_file: Path | None = None,
        logits: bool = False,
        known: Statistics | None = None,
    ) -> None:
        self._read, self._count, self.extractor = images, count, extractor
        self._known = known
        self._file, self._metrics = statistics_file, ["fid", "isc"] if logits else ["fid"]
        self._nearest: dict[ImageSet, Nearest] = {}

    def __len__(self) -> int:
        return self._count

    @cached_property
    def images(self) -> Tensor:
        """(N, C, H, W) uint8."""
        return self._read if isinstance(self._read, Tensor) else self._read()

    @property
    def came_with_statistics(self) -> bool:
        """Whether mean and covariance are known from elsewhere, whatever the number of images."""
        return self._known is not None

    @property
    def has_features(self) -> bool:
        """Whether the features are known, so that they cost nothing."""
        return "_layers" in vars(self)

    @property
    def features(self) -> Tensor:
        """(N, D) of the layer that FID compares, on the CPU."""
        return self._layers[0]

    @property
    def logits(self) -> Tensor:
        """(N, K) of the layer that IS reads, on the CPU."""
        return self._layers[1]

    @cached_property
    def statistics(self) -> Statistics:
        """Mean and covariance of the features."""
        if self._known is not None:
            return self._known
        dim = self.extractor.feature_dim
        if self._file is not None and (known := _load_statistics(self._file, dim)) is not None:
            return known
        statistics = statistics_of(self.features)
        if self._file is not None:
            _save_statistics(self._file, statistics)
        return statistics

    def nearest_in(self, training: "ImageSet") -> Nearest:
        """To each image the nearest training image; computed once."""
        if training not in self._nearest:
            self._nearest[training] = nearest(self.features, training.features)
        return self._nearest[training]

    @cached_property
    def _layers(self) -> list[Tensor]:
        return extract(self.images, self.extractor, self._metrics)


def statistics_of(features: Tensor) -> Statistics:
    """(N, D) -> their mean and covariance."""
    import_torch_fidelity()
    from torch_fidelity.metric_fid import fid_features_to_statistics

    return fid_features_to_statistics(features)


def extract(images: Tensor, extractor: Extractor, metrics: Sequence[str]) -> list[Tensor]:
    """The layers that metrics read by default, each (N, ...) on the CPU.

    Computed where the extractor says, in float32, ``BATCH_SIZE`` images at a time; the global
    random state is left as it was.
    """
    import_torch_fidelity()
    extractor.register()
    from torch_fidelity.utils import (
        create_feature_extractor,
        get_featuresdict_from_dataset,
        resolve_feature_layer_for_metric,
    )

    layers = [
        resolve_feature_layer_for_metric(metric, feature_extractor=extractor.name)
        for metric in metrics
    ]
    # DataLoader draws a seed and Inception its first weights from the global generator.
    with torch.random.fork_rng(devices=[]), exact_float32():
        network = create_feature_extractor(
            extractor.name,
            list(dict.fromkeys(layers)),
            cuda=extractor.on_gpu,
            feature_extractor_weights_path=extractor.weights_path,
            verbose=False,
        )
        found = get_featuresdict_from_dataset(
            _Images(images, extractor.channels),
            network,
            BATCH_SIZE,
            extractor.on_gpu,
            save_cpu_ram=True,  # no worker processes: the images are in memory already
            verbose=False,
        )
    return [found[layer] for layer in layers]


class _Images(Dataset[Tensor]):
    """Images one by one, (C, H, W) uint8; grey ones repeated where the extractor wants RGB."""

    def __init__(self, images: Tensor, channels: int) -> None:
        self.images = images.cpu().expand(-1, channels, -1, -1)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index]


def statistics_path(
    folder: Path, data: str, member: str, image_shape: Sequence[int], extractor: Extractor
) -> Path:
    """Where the statistics of real images are kept.

    Args:
        folder: made if it does not exist.
        data: fingerprint of the data set and of the part of it.
        member: which member of a sample is the image.
        image_shape: (C, H, W).
        extractor: of the features.
    """
    identity = [data, member, *image_shape, extractor.name, extractor.weights_sha256]
    digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
    return folder / f"statistics-{digest[:40]}.npz"


def _load_statistics(path: Path, dim: int) -> Statistics | None:
    """None if there are none, or none that can be used."""
    try:
        with np.load(path, allow_pickle=False) as file:  # the zip's checksums are compared
            found = {name: file[name] for name in ("mu", "sigma")}
        if found["mu"].shape != (dim,) or found["sigma"].shape != (dim, dim):
            raise UserError(f"it holds {[array.shape for array in found.values()]}")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        log.warning("%s is damaged (%s) and is made again.", path, error)
        return None
    return found


def _save_statistics(path: Path, statistics: Statistics) -> None:
    """What cannot be kept is computed again."""
    content = io.BytesIO()
    np.savez(content, mu=statistics["mu"], sigma=statistics["sigma"])
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_durably(path, content.getvalue(), shared=True)
    except OSError as error:
        log.warning("%s could not be kept: %s", path, error)
