import hashlib
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from speed_engine.data.format.decode import decode_image
from speed_engine.data.preparing import pictures
from speed_engine.data.preparing.pictures import centre_crop, encode_picture, open_picture, shrink
from speed_engine.runtime.checks import UserError


def pattern(height: int, width: int) -> Image.Image:
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([x * y, 3 * x + 5 * y, x ^ y], axis=-1) % 256
    return Image.fromarray(pixels.astype(np.uint8))


def content(picture: Image.Image, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    picture.save(file, kind)
    return file.getvalue()


def test_the_crop_is_that_of_guided_diffusion():
    # Digest of what center_crop_arr of guided-diffusion (81916c0) returns for this picture.
    cropped = np.asarray(centre_crop(pattern(211, 317), 48))
    assert hashlib.sha256(cropped.tobytes()).hexdigest() == (
        "fd996b8d51e132bf857c6122fecb83b6b34c48c3658c4b004332297306d48508"
    )


def test_a_picture_of_the_size_is_not_touched():
    picture = pattern(32, 32)
    assert np.array_equal(np.asarray(centre_crop(picture, 32)), np.asarray(picture))


def test_the_crop_is_of_the_middle():
    picture = pattern(32, 47)
    expected = np.asarray(picture)[:, 7:39]
    assert np.array_equal(np.asarray(centre_crop(picture, 32)), expected)


@pytest.mark.parametrize(
    "height, width, size", [(5, 400, 16), (31, 32, 32), (64, 64, 1), (97, 33, 33)]
)
def test_every_shape_gives_a_square(height, width, size):
    assert centre_crop(pattern(height, width), size).size == (size, size)


def test_shrinking_is_the_mean_over_boxes():
    picture = pattern(32, 32)
    means = np.asarray(picture).astype(float).reshape(8, 4, 8, 4, 3).mean((1, 3))
    assert (
        np.abs(np.asarray(shrink(picture, 8)) - means).max() <= 1
    )  # Pillow rounds rows, then columns


@pytest.mark.parametrize("kind", ["png", "npy"])
@pytest.mark.parametrize("channels", [1, 3])
def test_png_and_npy_give_the_pixels_back(kind, channels):
    picture = open_picture(content(pattern(9, 7)), channels)
    data = encode_picture(picture, kind, 95)
    expected = np.atleast_3d(np.asarray(picture)).transpose(2, 0, 1)
    assert np.array_equal(decode_image(data, kind, channels), expected)


@pytest.mark.parametrize("kind", ["jpg", "webp"])
def test_quality_decides_the_size_of_lossy_pictures(kind):
    low, high = (encode_picture(pattern(64, 64), kind, quality) for quality in (30, 95))
    assert len(low) < len(high)
    assert decode_image(high, kind, 3).shape == (3, 64, 64)


def test_a_picture_is_known_by_its_content_and_damage_is_an_error():
    assert open_picture(content(pattern(4, 4), "JPEG"), 3).mode == "RGB"
    for data in (b"", b"GIF89a", content(pattern(40, 40))[:-40]):
        with pytest.raises(ValueError, match="unusable picture"):
            open_picture(data, 3)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_nothing_but_pixels_is_stored(kind):
    file = io.BytesIO()
    transparency = {"transparency": (0, 0, 0)} if kind == "PNG" else {}
    pattern(4, 4).save(file, kind, icc_profile=b"profile", comment=b"secret", **transparency)
    picture = open_picture(file.getvalue(), 3)
    for kind in ("png", "jpg", "webp"):
        stored = encode_picture(centre_crop(picture, 4), kind, 95)
        assert b"profile" not in stored and b"secret" not in stored and b"tRNS" not in stored
        assert Image.open(io.BytesIO(stored)).mode == "RGB"


def turned(orientation: int, exif: bytes | None = None) -> bytes:
    """A JPEG of 8 x 4 pixels, left half black, with an orientation in its EXIF data."""
    picture = Image.new("RGB", (8, 4), "white")
    picture.paste("black", (0, 0, 4, 4))
    tags = Image.Exif()
    tags[0x0112] = orientation
    file = io.BytesIO()
    picture.save(file, "JPEG", exif=tags.tobytes() if exif is None else exif, quality=100)
    return file.getvalue()


def test_a_picture_stands_upright_as_its_camera_noted():
    """6: what was saved must be turned by 90 degrees clockwise, so the left comes to the top."""
    plain, upright = (np.asarray(open_picture(turned(way), 1)) for way in (1, 6))
    assert plain.shape == (4, 8) and plain[:, :3].max() < 50 and plain[:, 5:].min() > 200
    assert upright.shape == (8, 4) and upright[:3].max() < 50 and upright[5:].min() > 200


def test_malformed_exif_data_do_not_spoil_a_picture():
    junk = b"Exif\0\0 no such data"
    one, other = (np.asarray(open_picture(data, 3)) for data in (turned(1, junk), turned(1)))
    assert np.array_equal(one, other)


def test_a_long_thin_picture_is_refused_before_it_is_enlarged(monkeypatch):
    monkeypatch.setattr(Image.Image, "resize", lambda *_, **__: pytest.fail("resized"))
    with pytest.raises(UserError, match=r"\(200000, 1\) pixels, resized .* more than 67108864"):
        centre_crop(Image.new("L", (200_000, 1)), 64)


def test_sixteen_bits_are_refused_rather_than_clipped():
    deep = Image.fromarray(np.full((4, 4), 40_000, np.uint16))
    with pytest.raises(ValueError, match="not 8-bit"):
        open_picture(content(deep), 1)


def test_pixels_are_counted_before_they_are_unpacked(monkeypatch):
    monkeypatch.setattr(pictures, "MAX_PIXELS", 100)
    monkeypatch.setattr(Image.Image, "convert", lambda *_: pytest.fail("unpacked"))
    with pytest.raises(ValueError, match="exceed the limit"):
        open_picture(content(pattern(11, 10)), 3)


def png(depth: int, extra: bytes = b"") -> bytes:
    """4 x 4 pixels of colour, each row behind its filter."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)

    row = b"\0" + bytes(range(12 * depth // 8))
    header = struct.pack(">IIBBBBB", 4, 4, depth, 2, 0, 0, 0)
    kept = chunk(b"iCCP", b"big\0\0" + zlib.compress(extra)) if extra else b""
    pixels = chunk(b"IDAT", zlib.compress(4 * row)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + kept + pixels


def test_colours_of_sixteen_bits_are_refused_as_greys_are():
    for read in (lambda data: open_picture(data, 3), lambda data: decode_image(data, "png", 3)):
        assert read(png(8)) is not None
        with pytest.raises(UserError, match="16 bits a channel, is not 8-bit"):
            read(png(16))


def test_a_large_colour_profile_does_not_spoil_a_picture():
    plain, profiled = (np.asarray(open_picture(png(8, extra), 3)) for extra in (b"", bytes(2**23)))
    assert np.array_equal(plain, profiled)
    assert decode_image(png(8, bytes(2**23)), "png", 3).shape == (3, 4, 4)


def test_what_is_no_picture_is_named_by_its_first_bytes():
    with pytest.raises(UserError, match=r"no BMP or JPEG.* begins with b'GIF89a'") as error:
        open_picture(b"GIF89a", 3)
    assert "0x" not in str(error.value)
