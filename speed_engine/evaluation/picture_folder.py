"""Real pictures in a plain folder, at any depth, to compare generated ones with.

The folders in it are classes, in the order of their names, where all pictures are in one of them.

Letters: N pictures, C channels, H x W pixels.
"""

import hashlib
import io
import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from speed_engine.data.preparing.pictures import open_file
from speed_engine.data.preparing.source import is_sample
from speed_engine.data.preparing.sources.image_folder import files_below
from speed_engine.runtime.checks import UserError, shortened

Shape = tuple[int, int, int]


@dataclass(frozen=True)
class PictureFolder:
    """The pictures of a folder; their pixels stay on disk until they are asked for.

    Attributes:
        folder: that they are in.
        names: of the N files, from the folder on.
        shape: (C, H, W) of a picture.
        sha256: of the names and the contents of the files, 64 hexadecimal digits.
    """

    folder: Path
    names: tuple[str, ...] = field(repr=False)
    shape: Shape
    sha256: str

    @property
    def labels(self) -> Tensor | None:
        """(N,) int64 classes; None where there are none."""
        parents = [Path(name).parts[:-1][:1] for name in self.names]
        if not all(parents):
            return None
        return torch.from_numpy(np.unique([top for (top,) in parents], return_inverse=True)[1])

    def images(self) -> Tensor:
        """(N, C, H, W) uint8, upright as their EXIF data say.

        Raises:
            UserError: a picture is damaged, or lies on its side in a shape that is not square.
        """
        channels, height, width = self.shape
        images = np.empty((len(self.names), height, width, channels), np.uint8)
        for row, name in zip(images, self.names, strict=True):
            try:
                pixels = np.atleast_3d(np.asarray(open_file(self.folder / name, channels)))
            except (UserError, OSError) as error:
                raise _unusable(self.folder, name, error) from error
            if pixels.shape != row.shape:
                raise _of_other_sizes(self.folder, {name: pixels.shape[:2]}, self.shape)
            row[:] = pixels
        return torch.from_numpy(images).permute(0, 3, 1, 2)


def picture_names(folder: Path) -> tuple[str, ...]:
    """Files at any depth that are taken for pictures, but for hidden ones, in one order."""
    below = (os.path.relpath(path, folder) for path in files_below(folder))
    return tuple(sorted(name for name in below if is_sample(name)))


def open_pictures(folder: Path, names: tuple[str, ...], shape: Shape) -> PictureFolder:
    """Those pictures of a folder, whose files are read, but not decoded.

    Args:
        folder: that they are in.
        names: of the files, of ``picture_names``.
        shape: (C, H, W) that they must have; grey and coloured pictures become what C says.

    Raises:
        UserError: one has another size, or has no header that can be read.
    """
    digest = hashlib.sha256()
    others: dict[str, tuple[int, int]] = {}
    for name in names:
        try:
            content = (folder / name).read_bytes()
            with Image.open(io.BytesIO(content)) as picture:
                size = picture.height, picture.width
        except Exception as error:  # whatever the bytes provoke in Pillow
            raise _unusable(folder, name, error) from error
        if sorted(size) != sorted(shape[1:]):  # EXIF data may turn it
            others[name] = size
        digest.update(f"{name}\0{len(content)}\0".encode(errors="surrogateescape") + content)
    if others:
        raise _of_other_sizes(folder, others, shape)
    return PictureFolder(folder, names, shape, digest.hexdigest())


def _unusable(folder: Path, name: str, error: Exception) -> UserError:
    return UserError(
        f"evaluation.reference={folder}: {name} cannot be used: {error}. Take it out of the folder "
        "or put a sound picture in its place."
    )


def _of_other_sizes(folder: Path, others: dict[str, tuple[int, int]], shape: Shape) -> UserError:
    _, height, width = shape
    name, size = next(iter(others.items()))
    how = "name pictures of this size"
    if height == width:
        shards = f"shards/{folder.resolve().name}"
        how = (
            f"`speed-engine shards make {folder} {shards} --size {width}` makes shards of them, "
            f"cropped to it: name {shards} instead"
        )
    count = f"{len(others):,} picture" + ("s" if len(others) > 1 else "")
    return UserError(
        f"evaluation.reference={folder} holds {count} of another height and width than "
        f"{(height, width)}, which this run generates, such as {shortened(name)} of {size}; {how}."
    )
