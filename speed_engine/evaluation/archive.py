"""Pictures, or statistics of them, in an ``.npz`` as ADM's evaluator reads it.

    arr_0      (N, H, W, 3) uint8 pictures
    arr_1      (N,) their classes
    mu, sigma  (D,) and (D, D), mean and covariance of Inception's features, which FID is computed
               from where they are there, as ADM's evaluator does: often of more pictures than arr_0

Other arrays are ignored. Only what is needed is read, and nothing is unpickled.

Letters: N pictures, H x W pixels, D features.
"""

import hashlib
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from speed_engine.evaluation.image_set import Statistics
from speed_engine.runtime.checks import UserError

PICTURES, LABELS = "arr_0", "arr_1"
# A TypeError is of a file that holds one array.
_DAMAGED = (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile, zlib.error)


@dataclass(frozen=True)
class Archive:
    """What an archive holds; its pictures stay on disk until they are asked for.

    Attributes:
        path: of the file.
        shape: (N, H, W, 3) of the pictures; None where there are statistics only.
        labels: (N,) int64, or None.
        statistics: mean and covariance of Inception's features, or None.
        sha256: of the file, 64 hexadecimal digits.
    """

    path: Path
    shape: tuple[int, int, int, int] | None
    labels: Tensor | None = field(repr=False)
    statistics: Statistics | None = field(repr=False)
    sha256: str

    def images(self) -> Tensor:
        """(N, 3, H, W) uint8."""
        with np.load(self.path, allow_pickle=False) as file:
            return torch.from_numpy(file[PICTURES]).permute(0, 3, 1, 2)


def open_archive(path: Path) -> Archive:
    """The archive of a file.

    Raises:
        UserError: it is missing or damaged, or holds neither pictures nor statistics of this form.
    """
    shape, dtype, labels, statistics = None, None, None, None
    try:
        with np.load(path, allow_pickle=False) as file:
            names = file.files
            if PICTURES in names:
                shape, dtype = _head(path)
                labels = file[LABELS] if LABELS in names else None
            if {"mu", "sigma"} <= set(names):
                statistics = {name: file[name] for name in ("mu", "sigma")}
        with path.open("rb") as opened:
            sha256 = hashlib.file_digest(opened, "sha256").hexdigest()
    except FileNotFoundError as error:
        raise UserError(f"evaluation.reference={path} does not exist; correct the path.") from error
    except _DAMAGED as error:
        raise _unusable(path, f"cannot be read ({error})") from error
    if shape is None and statistics is None:
        raise _unusable(path, f"holds {', '.join(names) or 'nothing'}")
    if shape is not None and (dtype != np.uint8 or len(shape) != 4 or shape[3] != 3):
        raise _unusable(path, f"holds {PICTURES} of {dtype} and shape {shape}")
    count = None if shape is None else tuple(shape[:1])
    if labels is not None and (labels.dtype.kind not in "iu" or labels.shape != count):
        raise _unusable(path, f"holds {LABELS} of {labels.dtype} and shape {labels.shape}")
    if statistics is not None and not _are_statistics(**statistics):
        shapes = " and ".join(str(array.shape) for array in statistics.values())
        raise _unusable(path, f"holds mu and sigma of {shapes}, or of numbers that are not finite")
    labels = None if labels is None else torch.from_numpy(labels.astype(np.int64))
    return Archive(path, shape, labels, statistics, sha256)


def _head(path: Path) -> tuple[Any, np.dtype]:
    """Shape and dtype of the pictures, which are not read."""
    with zipfile.ZipFile(path) as archive, archive.open(f"{PICTURES}.npy") as file:
        if np.lib.format.read_magic(file) == (1, 0):
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        else:
            shape, _, dtype = np.lib.format.read_array_header_2_0(file)
    return shape, dtype


def _are_statistics(mu: np.ndarray, sigma: np.ndarray) -> bool:
    fit = mu.ndim == 1 and sigma.shape == 2 * mu.shape
    return bool(fit and np.isfinite(mu).all() and np.isfinite(sigma).all())


def _unusable(path: Path, what: str) -> UserError:
    return UserError(
        f"evaluation.reference={path} {what}; needed: arr_0, (N, H, W, 3) uint8 pictures, with "
        "their N classes in arr_1 if at all, or mu and sigma, their statistics in Inception's "
        "features. `speed-engine sample --out FILE.npz` and ADM's reference batches have this form."
    )
