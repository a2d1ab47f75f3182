"""Pictures as they are prepared for shards: opened safely, cropped as ADM does, encoded.

Letters: C channels, H, W of an array; pictures of Pillow have (width, height).
"""

import contextlib
import hashlib
import io
import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from speed_engine.data.format import decode
from speed_engine.data.format.decode import MAX_PIXELS
from speed_engine.runtime.checks import UserError

MAX_FILE_BYTES = 2**28  # of one picture's file
FORMATS = ("png", "jpg", "webp", "npy")
EXTENSIONS = (
    ".bmp",
    ".jfif",
    ".jpe",
    ".jpeg",
    ".jpg",
    ".png",
    ".webp",
)  # of files that are taken for pictures
_PILLOW_FORMATS = ("BMP", "JPEG", "PNG", "WEBP")  # by content: ImageNet has PNGs named .JPEG


def is_picture(path: str) -> bool:
    """Whether a file is taken for a picture, by its extension."""
    return path.lower().endswith(EXTENSIONS)


def file_size(path: str) -> int:
    """Bytes of a file; -1 of what cannot be reached, such as a link to nothing."""
    try:
        return os.stat(path).st_size
    except OSError:
        return -1


def open_file(path: Path, channels: int) -> Image.Image:
    """The picture of a file, of a size that a picture can have; else as ``open_picture``.

    Raises:
        UserError: unusable.
        OSError: unreadable.
    """
    size = path.stat().st_size
    if size > MAX_FILE_BYTES:
        raise UserError(f"{size} bytes; at most {MAX_FILE_BYTES} are accepted.")
    return open_picture(path.read_bytes(), channels)


def file_digest(path: Path) -> bytes:
    """Of the content of a file, to notice that it was changed; empty of one that is unreadable."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, hashlib.blake2b).digest()
    except OSError:
        return b""


def open_picture(data: bytes, channels: int) -> Image.Image:
    """An 8-bit picture, grey for one channel, RGB for three, upright as its EXIF data say.

    Transparency is dropped, as ADM does, and what else the file says beside its pixels.

    Raises:
        UserError: not a picture of a known kind, damaged, of more than 8 bits, or too large.
    """
    image = decode.open_picture(data, _PILLOW_FORMATS, _check_size)
    with contextlib.suppress(Exception):  # malformed EXIF data: nothing is known
        ImageOps.exif_transpose(image, in_place=True)
    picture = image.convert("L" if channels == 1 else "RGB")
    picture.info.clear()  # Pillow would save profiles and comments again
    return picture


def _check_size(height: int, width: int) -> None:
    if width * height > MAX_PIXELS:
        raise UserError(f"{(width, height)} pixels exceed the limit of {MAX_PIXELS}.")


def centre_crop(picture: Image.Image, size: int) -> Image.Image:
    """The central square as size x size pixels, as ADM prepares ImageNet.

    Halved by boxes while the shorter side is at least twice the size, resized by bicubic
    interpolation, then cropped (Dhariwal and Nichol 2021, guided-diffusion's
    ``image_datasets.center_crop_arr``).

    Raises:
        UserError: so long and thin that, resized, it would be larger than any picture may be.
    """
    longer, shorter = max(picture.size), min(picture.size)
    if longer * size * size > MAX_PIXELS * shorter:
        raise UserError(
            f"{picture.size} pixels, resized to a shorter side of {size}, would be more than "
            f"{MAX_PIXELS}; leave it out or crop it before."
        )
    while min(picture.size) >= 2 * size:
        width, height = picture.size
        picture = picture.resize((width // 2, height // 2), Image.Resampling.BOX)
    scale = size / min(picture.size)
    width, height = (round(side * scale) for side in picture.size)
    picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return picture.crop((left, top, left + size, top + size))


def shrink(picture: Image.Image, size: int) -> Image.Image:
    """Square pictures to size x size by means over boxes, ADM's low-resolution condition."""
    return picture.resize((size, size), Image.Resampling.BOX)


def encode_picture(picture: Image.Image, kind: str, quality: int) -> bytes:
    """The content of a member.

    Args:
        picture: of mode L or RGB.
        kind: one of FORMATS; npy is (C, H, W) uint8.
        quality: of jpg and webp, 1 to 100.
    """
    if kind == "npy":
        pixels = np.atleast_3d(np.asarray(picture)).transpose(2, 0, 1)
        return npy_bytes(np.ascontiguousarray(pixels))
    file = io.BytesIO()
    if kind == "png":
        picture.save(file, "PNG")
    elif kind == "jpg":
        picture.save(file, "JPEG", quality=quality)
    else:
        picture.save(file, "WEBP", quality=quality)
    return file.getvalue()


def npy_bytes(array: np.ndarray) -> bytes:
    """The content of an npy file."""
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()
