"""Bytes of a member to an array: a closed table by extension, nothing that could run code.

    npy                   uint8, float16, float32 or int64, C order; objects (pickles) are refused
    png, jpg, jpeg, webp  8-bit images through Pillow, as (C, H, W) uint8
    cls                   a label as decimal text

Every failure is a ValueError that says what is wrong; the caller adds whose bytes they are.
"""

import io
import math
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.lib.format import read_array_header_1_0, read_array_header_2_0, read_magic
from PIL import Image

MAX_BYTES = 2**28  # of one array
MAX_PIXELS = 2**26  # of one image, checked before it is decompressed
_DTYPES = {np.dtype(name) for name in ("uint8", "float16", "float32", "int64")}
_PILLOW_FORMATS = {"png": "PNG", "jpg": "JPEG", "jpeg": "JPEG", "webp": "WEBP"}
_GREY_MODES = {"1", "L", "LA"}
_COLOUR_MODES = {"P", "RGB", "RGBA", "CMYK", "YCbCr"}


def decode_image(data: bytes, extension: str, channels: int) -> np.ndarray:
    """(C, H, W) uint8 from a picture, any listed dtype and shape from npy.

    Args:
        data: content of the member.
        extension: of the member; only what follows its last dot counts.
        channels: grey pictures are repeated to three channels where 1 is not asked for; colour
            is never reduced to grey.
    """
    kind = extension.rpartition(".")[2]
    if kind == "npy":
        return decode_npy(data)
    if kind in _PILLOW_FORMATS:
        return _decode_picture(data, _PILLOW_FORMATS[kind], channels)
    raise ValueError(f"no decoder for {extension!r}; known: npy, {', '.join(_PILLOW_FORMATS)}.")


def decode_npy(data: bytes) -> np.ndarray:
    """An array that shares the memory of ``data``."""
    start = _npy_header_bytes(data)
    dtype, shape = _parse_npy_header(bytes(data[:start]))
    size = math.prod(shape) * dtype.itemsize
    if min(shape, default=1) < 1 or size != len(data) - start or size > MAX_BYTES:
        raise ValueError(
            f"npy of shape {shape} and {dtype} needs {size} bytes (at most {MAX_BYTES}), got "
            f"{len(data) - start}."
        )
    return np.frombuffer(data, dtype, offset=start).reshape(shape)


def decode_label(data: bytes) -> int:
    """Decimal digits, with or without white space around them."""
    text = bytes(data[:32]).strip() if len(data) <= 32 else b""
    if not text.isdigit() or len(text) > 18:
        raise ValueError(f"label {bytes(data[:32])!r} is not a non-negative integer.")
    return int(text)


def describe_member(data: bytes, extension: str) -> dict[str, Any]:
    """What a member holds, from its first bytes: dtype and shape, or a bound of its labels.

    Returns:
        {"dtype", "shape"} of an array; the same with shape [H, W] of a picture; {"classes": label
        + 1}; or {} of anything else and of what cannot be read.
    """
    kind = extension.rpartition(".")[2]
    try:
        if kind == "npy":
            dtype, shape = _parse_npy_header(bytes(data[: _npy_header_bytes(data)]))
            return {"dtype": str(dtype), "shape": list(shape)}
        if kind == "cls":
            return {"classes": decode_label(data) + 1}
        if kind in _PILLOW_FORMATS:
            with Image.open(io.BytesIO(data), formats=[_PILLOW_FORMATS[kind]]) as image:
                return {"dtype": "uint8", "shape": [image.height, image.width]}
    except Exception:  # the loader, and `shards check`, say what is wrong with it
        return {}
    return {}


def _npy_header_bytes(data: bytes) -> int:
    """Length of magic, version and header; version 1 has two bytes of length, version 2 four."""
    magic = bytes(data[:8])
    width = {b"\x93NUMPY\1\0": 2, b"\x93NUMPY\2\0": 4}.get(magic)
    if width is None:
        raise ValueError(f"not an npy file of version 1 or 2: it begins with {magic!r}.")
    return 8 + width + int.from_bytes(data[8 : 8 + width], "little")


@lru_cache(maxsize=128)  # the samples of a data set share their header; parsing it costs 20 us
def _parse_npy_header(header: bytes) -> tuple[np.dtype, tuple[int, ...]]:
    file = io.BytesIO(header)
    version = read_magic(file)
    read = {(1, 0): read_array_header_1_0, (2, 0): read_array_header_2_0}
    try:
        shape, fortran_order, dtype = read[version](file)
    except Exception as error:  # whatever the bytes provoke in the parser
        raise ValueError(f"unreadable npy header: {error}") from error
    if dtype not in _DTYPES or fortran_order:
        raise ValueError(
            f"npy of {dtype} in {'Fortran' if fortran_order else 'C'} order; needed: "
            f"{', '.join(sorted(map(str, _DTYPES)))} in C order."
        )
    return dtype, shape


def _decode_picture(data: bytes, pillow_format: str, channels: int) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(data), formats=[pillow_format]) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.size} pixels exceed the limit of {MAX_PIXELS}.")
            if image.mode not in _GREY_MODES | _COLOUR_MODES:
                raise ValueError(f"mode {image.mode} is not 8-bit grey or colour.")
            keep_grey = image.mode in _GREY_MODES and channels == 1
            pixels = np.array(image.convert("L" if keep_grey else "RGB"))
    except Exception as error:  # whatever the bytes provoke in Pillow
        raise ValueError(f"unusable {pillow_format} picture: {error}") from error
    return pixels[None] if keep_grey else pixels.transpose(2, 0, 1)
