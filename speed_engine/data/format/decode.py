"""Bytes of a member to an array: a closed table by extension, nothing that could run code.

    npy                   uint8, float16, float32 or int64, C order; objects (pickles) are refused
    bf16.npy              bfloat16, of which npy knows nothing: its bit patterns as uint16
    png, jpg, jpeg, webp  8-bit images as (C, H, W) uint8
    cls                   a label as decimal text

JPEGs go through simplejpeg where it is installed: nearly twice as fast as Pillow, of equal pixels,
and straight into the memory of a batch. Pillow decodes everything else, JPEGs among it that libjpeg
warns about, so that the same are refused with and without simplejpeg. Sizes are checked before
anything is decompressed. Every failure is a ValueError that says what is wrong; the caller adds
whose bytes they are.
"""

import io
import logging
import math
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from types import ModuleType
from typing import Any

import numpy as np
from numpy.lib.format import read_array_header_1_0, read_array_header_2_0, read_magic
from PIL import Image, UnidentifiedImageError

from speed_engine.runtime.checks import UserError, shortened

log = logging.getLogger(__name__)

Buffer = bytes | bytearray | memoryview

MAX_BYTES = 2**28  # of one array
MAX_PIXELS = 2**26  # of one image, checked before it is decompressed
_DTYPES = {np.dtype(name): name for name in ("uint8", "float16", "float32", "int64", "uint16")}
# By dtype: bits of what is stored, and those that are all set in infinities and NaN alone. Integers
# are compared several times faster than half-precision floats. uint16 is bfloat16.
_EXPONENTS = {
    np.dtype(np.float16): (np.uint16, 0x7C00),
    np.dtype(np.uint16): (np.uint16, 0x7F80),
    np.dtype(np.float32): (np.uint32, 0x7F800000),
}
_MAX_HEADER = 2**16  # bytes of the header of an npy file
MAX_MEMBER = MAX_BYTES + _MAX_HEADER  # bytes of one member that is read
_PILLOW_FORMATS = {"png": "PNG", "jpg": "JPEG", "jpeg": "JPEG", "webp": "WEBP"}
_JPEG_COLOURS = {"Gray", "YCbCr", "RGB"}  # others, CMYK among them, are Pillow's
_GREY_MODES = {"1", "L", "LA"}
_MODES = _GREY_MODES | {"P", "RGB", "RGBA", "CMYK", "YCbCr"}  # 8 bits a channel
_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_DEPTH = 24  # where a PNG says how many bits a channel has
_ANNOTATIONS = (b"iCCP", b"iTXt", b"tEXt", b"zTXt")  # chunks of a PNG that pixels do not need
_ANNOTATIONS_TOO_LARGE = ("Decompressed data too large", "Too much memory used in text chunks")


class UnfitSample(UserError):
    """A sample is intact, but not what the run, or the rest of its data set, is like."""


def decode_image(
    data: Buffer,
    extension: str,
    channels: int,
    size: tuple[int, ...] | None = None,
) -> np.ndarray:
    """(C, H, W) uint8 from a picture, any listed dtype and shape from npy.

    Args:
        data: content of the member.
        extension: of the member; only what follows its last dot counts.
        channels: grey pictures are repeated to three channels where 1 is not asked for; colour
            is never reduced to grey.
        size: (H, W) that a picture must have; None accepts up to ``MAX_PIXELS``.
    """
    kind = extension.rpartition(".")[2]
    if kind == "npy":
        array = decode_npy(data)
        if (array.dtype == np.uint16) != f".{extension}".endswith(".bf16.npy"):
            raise UserError(f"{array.dtype} in a member {extension!r}; bf16.npy holds uint16.")
        return array
    if kind not in _PILLOW_FORMATS:
        raise UserError(f"no decoder for {extension!r}; known: npy, {', '.join(_PILLOW_FORMATS)}.")
    pillow_format = _PILLOW_FORMATS[kind]
    pixels = _decode_jpeg(data, channels, size) if pillow_format == "JPEG" else None
    if pixels is None:
        pixels = _decode_picture(data, pillow_format, channels, size)
    return pixels.transpose(2, 0, 1)


def decode_pictures(
    members: Sequence[Buffer],
    extension: str,
    channels: int,
    shape: tuple[int, ...],
    allocate: Callable[[int], np.ndarray],
) -> np.ndarray | None:
    """Many pictures at once, each in its place.

    Args:
        members: B of them.
        extension: as in ``decode_image``, as are the channels.
        channels: grey pictures are repeated to three where 1 is not asked for.
        shape: (C, H, W) of every picture.
        allocate: bytes -> memory of that size.

    Returns:
        (B, C, H, W) uint8, in memory (B, H, W, C); None if one has other channels.
    """
    depth, size = shape[0], shape[1:]
    places = allocate(len(members) * math.prod(shape)).reshape(len(members), *size, depth)
    for data, place in zip(members, places, strict=True):
        picture = decode_image(data, extension, channels, size)
        if picture.shape != shape:
            return None
        place[:] = picture.transpose(1, 2, 0)
    return places.transpose(0, 3, 1, 2)


def decode_npy(data: Buffer) -> np.ndarray:
    """An array of finite numbers that shares the memory of ``data``.

    Raises:
        UserError: not such a file, one whose header claims another size than it has, or numbers
            among which are NaN or infinities.
    """
    start = _npy_header_bytes(data)
    dtype, shape = _parse_npy_header(bytes(data[:start]))
    size = math.prod(shape) * dtype.itemsize
    if size != len(data) - start or size > MAX_BYTES:
        raise UserError(
            f"npy of shape {shape} and {dtype} needs {size} bytes (at most {MAX_BYTES}), got "
            f"{len(data) - start}."
        )
    array = np.frombuffer(data, dtype, offset=start).reshape(shape)
    if not all_finite(array):
        bits, exponent = _EXPONENTS[dtype]
        bad = int(((array.view(bits) & exponent) == exponent).sum())
        raise UserError(
            f"{bad:,} of {array.size:,} values are NaN or infinite; write the sample again, or "
            f"leave it out (data.exclude)."
        )
    return array


def all_finite(array: np.ndarray) -> bool:
    """Whether no number is NaN or infinite, of a dtype that npy members have."""
    if array.dtype not in _EXPONENTS:
        return True
    bits, exponent = _EXPONENTS[array.dtype]
    return int((array.view(bits) & bits(exponent)).max(initial=0)) < exponent


def decode_npy_rows(rows: np.ndarray) -> np.ndarray | None:
    """Many npy files of equal headers at once, without a copy.

    Args:
        rows: (B, size) uint8, one file each.

    Returns:
        (B, *shape) that shares the memory of ``rows``; None if the headers differ, or a number is
        NaN or infinite.
    """
    first = decode_npy(memoryview(rows[0]))
    start = rows.shape[1] - first.nbytes
    if (rows[:, :start] != rows[0, :start]).any():
        return None
    arrays = rows[:, start:].view(first.dtype)
    return arrays.reshape(len(rows), *first.shape) if all_finite(arrays) else None


def decode_label(data: Buffer) -> int:
    """Decimal digits, with or without white space around them."""
    text = bytes(data[:32]).strip() if len(data) <= 32 else b""
    if not text.isdigit() or len(text) > 18:
        raise UserError(f"label {bytes(data[:32])!r} is not a non-negative integer.")
    return int(text)


def describe_member(data: Buffer, extension: str) -> dict[str, Any]:
    """What a member holds, from its first bytes: dtype and shape, or a bound of its labels.

    Returns:
        {"dtype", "shape"} of an array; the same with shape [H, W] of a picture; {"classes": label
        + 1}; or {} of anything else and of what cannot be read.
    """
    kind = extension.rpartition(".")[2]
    try:
        if kind == "npy":
            dtype, shape = _parse_npy_header(bytes(data[: _npy_header_bytes(data)]))
            return {"dtype": _DTYPES[dtype], "shape": list(shape)}
        if kind == "cls":
            return {"classes": decode_label(data) + 1}
        if kind in _PILLOW_FORMATS:
            with Image.open(io.BytesIO(data), formats=[_PILLOW_FORMATS[kind]]) as image:
                return {"dtype": "uint8", "shape": [image.height, image.width]}
    except Exception:  # the loader, and `shards check`, say what is wrong with it
        return {}
    return {}


def decode_labels(memory: np.ndarray, offset: np.ndarray, size: np.ndarray) -> np.ndarray | None:
    """Many labels at once.

    Args:
        memory: (B, L) uint8, one row each.
        offset: (B,) of the label in its row.
        size: (B,) bytes of it.

    Returns:
        (B,) int64; None if one of them is anything but one to 18 digits.
    """
    if not 1 <= size.min() <= size.max() <= 18:
        return None
    labels, rows = np.zeros(len(memory), dtype=np.int64), np.arange(len(memory))
    for place in range(int(size.max())):
        inside = place < size
        digits = memory[rows, np.where(inside, offset + place, 0)].astype(np.int64) - ord("0")
        if ((digits < 0) | (digits > 9))[inside].any():
            return None
        labels = np.where(inside, 10 * labels + digits, labels)
    return labels


def _npy_header_bytes(data: Buffer) -> int:
    """Of magic, version and header; version 1 has two bytes of length, version 2 four."""
    magic = bytes(data[:8])
    width = {b"\x93NUMPY\1\0": 2, b"\x93NUMPY\2\0": 4}.get(magic)
    if width is None:
        raise UserError(f"not an npy file of version 1 or 2: it begins with {magic!r}.")
    length = 8 + width + int.from_bytes(data[8 : 8 + width], "little")
    if length > min(len(data), _MAX_HEADER):
        raise UserError(
            f"its npy header claims {length} bytes; the member has {len(data)}, and a header "
            f"{_MAX_HEADER} at most."
        )
    return length


@lru_cache(maxsize=128)  # the samples of a data set share their header; parsing it costs 20 us
def _parse_npy_header(header: bytes) -> tuple[np.dtype, tuple[int, ...]]:
    file = io.BytesIO(header)
    version = read_magic(file)
    read = {(1, 0): read_array_header_1_0, (2, 0): read_array_header_2_0}
    try:
        shape, fortran_order, dtype = read[version](file)
    except Exception as error:  # whatever the bytes provoke in the parser
        raise UserError(f"unreadable npy header: {shortened(error)}") from error
    if not all(type(side) is int and 1 <= side < 2**63 for side in shape):
        raise UserError(
            f"npy header {shortened(header[10:].decode('latin-1'))}: every side of a shape is a "
            f"whole number from 1 to {2**63 - 1:,}."
        )
    if dtype not in _DTYPES or fortran_order:
        raise UserError(
            f"npy of {dtype} in {'Fortran' if fortran_order else 'C'} order; needed: "
            f"{', '.join(sorted(map(str, _DTYPES)))} in C order."
        )
    return dtype, shape


def _decode_jpeg(data: Buffer, channels: int, size: tuple[int, ...] | None) -> np.ndarray | None:
    """(H, W, C) uint8; None of what is not plainly a sound JPEG, which Pillow then judges."""
    library = jpeg_library()
    if library is None:
        return None
    try:
        height, width, colours, _ = library.decode_jpeg_header(data)
    except (ValueError, KeyError):  # KeyError: of colours that it has no name for
        return None
    if colours not in _JPEG_COLOURS:
        return None
    _check_size(height, width, size)
    try:
        return library.decode_jpeg(data, "GRAY" if channels == 1 and colours == "Gray" else "RGB")
    except ValueError:  # libjpeg's warnings among them
        return None


@cache
def jpeg_library() -> ModuleType | None:
    """simplejpeg; None, after one warning, where it is not installed and Pillow decodes."""
    try:
        import simplejpeg
    except ImportError as error:
        log.warning("JPEGs are decoded by Pillow, at half the speed of simplejpeg (%s).", error)
        return None
    return simplejpeg


def _check_size(height: int, width: int, size: tuple[int, ...] | None) -> None:
    if size is not None and (height, width) != size:
        raise UnfitSample(
            f"the picture is {height} x {width}; expected {size[0]} x {size[1]}. Correct "
            f"image_shape or the data."
        )
    if not 0 < height * width <= MAX_PIXELS:
        raise UserError(f"{height} x {width} pixels; at least 1 and at most {MAX_PIXELS}.")


def _decode_picture(
    data: Buffer, pillow_format: str, channels: int, size: tuple[int, ...] | None
) -> np.ndarray:
    """(H, W, C) uint8."""
    image = open_picture(data, [pillow_format], lambda h, w: _check_size(h, w, size))
    keep_grey = image.mode in _GREY_MODES and channels == 1
    pixels = np.array(image.convert("L" if keep_grey else "RGB"))
    return pixels.reshape(*pixels.shape[:2], -1)


def open_picture(
    data: Buffer, formats: Sequence[str], check_size: Callable[[int, int], object]
) -> Image.Image:
    """A picture of 8 bits a channel, decompressed, by Pillow.

    Args:
        data: content of the file.
        formats: names that Pillow has for them; the content decides which it is.
        check_size: called with height and width before anything is decompressed, to refuse them.

    Raises:
        UserError: none of these formats, damaged, of more than 8 bits, or of a size refused.
    """
    kind = f"{formats[0]} " if len(formats) == 1 else ""
    try:
        try:
            return _loaded(data, formats, check_size)
        except ValueError as error:
            if not str(error).startswith(_ANNOTATIONS_TOO_LARGE):
                raise
            return _loaded(_without_annotations(bytes(data)), formats, check_size)
    except UnfitSample:
        raise
    except UnidentifiedImageError as error:  # its text names an object in memory
        raise UserError(
            f"unusable {kind}picture: it has no {' or '.join(formats)} header that can be read; it "
            f"begins with {bytes(data[:8])!r}."
        ) from error
    except Exception as error:  # whatever the bytes provoke in Pillow
        raise UserError(f"unusable {kind}picture: {error}") from error


def _loaded(
    data: Buffer, formats: Sequence[str], check_size: Callable[[int, int], object]
) -> Image.Image:
    with Image.open(io.BytesIO(data), formats=[*formats]) as image:
        check_size(image.height, image.width)
        # Of colours with 16 bits Pillow would silently keep the upper 8.
        is_deep = image.format == "PNG" and data[_PNG_DEPTH] > 8
        if image.mode not in _MODES or is_deep:
            what = f"mode {image.mode}" + (
                f", {data[_PNG_DEPTH]} bits a channel," if is_deep else ""
            )
            raise UserError(f"{what} is not 8-bit grey or colour; convert the picture before.")
        image.load()
        return image


def _without_annotations(png: bytes) -> bytes:
    """A PNG without colour profile and texts, whose size Pillow bounds rather than leave them out.

    ``length, type, content, checksum`` is a chunk, of 12 bytes and its content.
    """
    chunks, at = [_PNG], len(_PNG)
    while at + 12 <= len(png):
        end = at + 12 + int.from_bytes(png[at : at + 4], "big")
        if png[at + 4 : at + 8] not in _ANNOTATIONS:
            chunks.append(png[at:end])
        at = end
    return b"".join(chunks)
