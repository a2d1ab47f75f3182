import io
import os
import pickle
import random
import re
import sys
from functools import partial

import numpy as np
import pytest
from PIL import Image

from speed_engine.data.format import decode
from speed_engine.data.format.decode import (
    MAX_PIXELS,
    decode_image,
    decode_label,
    decode_npy,
    decode_npy_rows,
    decode_pictures,
    describe_member,
)
from speed_engine.runtime.checks import UserError
from speed_engine.runtime.machine import choose_jpeg_decoder


def npy(array, **options):
    file = io.BytesIO()
    np.lib.format.write_array(file, array, **options)
    return file.getvalue()


def picture(mode="RGB", size=(5, 3), kind="png", **options):
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, kind, **options)
    return file.getvalue(), pixels.transpose(2, 0, 1)


@pytest.mark.parametrize("dtype", ["uint8", "float16", "float32", "int64"])
@pytest.mark.parametrize("version", [(1, 0), (2, 0)])
def test_npy_gives_back_the_array(dtype, version):
    array = np.arange(24).reshape(2, 3, 4).astype(dtype)
    decoded = decode_npy(npy(array, version=version))
    assert decoded.dtype == array.dtype and np.array_equal(decoded, array)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros(3, dtype="float64"),
        np.zeros(3, dtype=">f4"),
        np.zeros(3, dtype="U2"),
        np.zeros(3, dtype=[("a", "u1")]),
        np.zeros((2, 3), dtype="uint8", order="F"),
        np.zeros((0, 3), dtype="uint8"),
    ],
    ids=str,
)
def test_other_arrays_are_refused(array):
    with pytest.raises(ValueError):
        decode_npy(npy(array))


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_pickle_inside_npy_is_never_run(tmp_path):
    bomb = str(tmp_path / "executed")
    data = npy(np.array([Bomb(bomb)], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="npy of object"):
        decode_image(data, "npy", 1)
    assert not os.path.exists(bomb)
    pickle.loads(pickle.dumps(Bomb(bomb)))
    assert os.path.exists(bomb)  # the bomb was live


def test_damaged_bytes_give_a_value_error_or_an_array():
    rng = random.Random(0)
    sources = [(npy(np.zeros((1, 4, 4), np.uint8)), "npy")]
    sources += [(picture(kind=kind)[0], kind) for kind in ("png", "jpeg", "webp")]
    for data, kind in sources:
        for _ in range(300):
            damaged = bytearray(data)
            for _ in range(rng.randint(1, 4)):
                damaged[rng.randrange(min(len(data), 150))] = rng.randrange(256)
            damaged = damaged[: rng.choice([len(data), rng.randrange(len(data))])]
            try:
                assert isinstance(decode_image(bytes(damaged), kind, 3), np.ndarray)
            except ValueError:
                pass


@pytest.mark.parametrize("kind, options", [("png", {}), ("webp", {"lossless": True})])
def test_lossless_pictures_keep_their_pixels(kind, options):
    data, pixels = picture(kind=kind, **options)
    assert np.array_equal(decode_image(data, kind, 3), pixels)


@pytest.mark.parametrize(
    "mode, channels, shape",
    [("RGB", 3, 3), ("RGB", 1, 3), ("L", 1, 1), ("L", 3, 3), ("P", 3, 3), ("RGBA", 3, 3)],
)
def test_grey_becomes_colour_where_asked_but_colour_never_grey(mode, channels, shape):
    assert decode_image(picture(mode)[0], "seg.png", channels).shape == (shape, 3, 5)


def test_sixteen_bit_pictures_are_refused_rather_than_clipped():
    file = io.BytesIO()
    Image.fromarray(np.full((2, 2), 40000, dtype=np.uint16)).save(file, "png")
    with pytest.raises(ValueError, match="mode I;16"):
        decode_image(file.getvalue(), "png", 1)


def test_a_picture_must_be_what_its_extension_says():
    with pytest.raises(ValueError, match="unusable JPEG"):
        decode_image(picture(kind="png")[0], "jpg", 3)


def test_a_decompression_bomb_is_refused_unread():
    side = int(MAX_PIXELS**0.5) + 1
    file = io.BytesIO()
    Image.new("1", (side, side)).save(file, "png")
    with pytest.raises(ValueError, match="pixels; at least 1 and at most"):
        decode_image(file.getvalue(), "png", 1)


@pytest.mark.parametrize("extension", ["pkl", "pyd", "pth", "npz", "gz", "txt", ""])
def test_the_table_of_extensions_is_closed(extension):
    with pytest.raises(ValueError, match="no decoder"):
        decode_image(b"", extension, 3)


def test_labels_are_decimal_text():
    assert [decode_label(text) for text in (b"0", b" 12\n", b"007")] == [0, 12, 7]


@pytest.mark.parametrize("text", [b"", b"cat", b"-1", b"1_0", b"1.0", b"9" * 19, b"\xd9\xa3"])
def test_other_labels_are_refused(text):
    with pytest.raises(ValueError, match="not a non-negative integer"):
        decode_label(text)


def jpeg(mode="RGB", **options):
    return picture(mode, (40, 24), "jpeg", **options)[0]


@pytest.mark.parametrize(
    "mode, channels", [("RGB", 3), ("RGB", 1), ("L", 1), ("L", 3), ("CMYK", 3)]
)
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}], ids=str)
def test_jpegs_are_the_same_without_simplejpeg(monkeypatch, mode, channels, options):
    data = jpeg(mode, **options)
    with_simplejpeg = decode_image(data, "jpg", channels)
    monkeypatch.setattr("speed_engine.data.format.decode.jpeg_library", lambda: None)
    assert np.array_equal(with_simplejpeg, decode_image(data, "jpg", channels))


def test_doctor_says_which_library_decodes_jpegs():
    assert (decode.jpeg_library() is None) == (choose_jpeg_decoder().value == "Pillow")


def test_a_missing_simplejpeg_is_said_once_and_pillow_decodes(monkeypatch, caplog):
    decode.jpeg_library.cache_clear()
    monkeypatch.setitem(sys.modules, "simplejpeg", None)  # importing it raises ImportError
    try:
        for _ in range(3):
            assert decode_image(jpeg(), "jpg", 3).shape == (3, 24, 40)
    finally:
        decode.jpeg_library.cache_clear()
    assert len(caplog.messages) == 1 and "simplejpeg" in caplog.messages[0]


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_a_picture_of_another_size_is_refused_unread(kind):
    data, _ = picture(size=(40, 24), kind=kind)
    assert decode_image(data, kind, 3, (24, 40)).shape == (3, 24, 40)
    with pytest.raises(ValueError, match="the picture is 24 x 40; expected 40 x 24"):
        decode_image(data, kind, 3, (40, 24))


def test_a_jpeg_that_claims_gigapixels_is_refused_unread():
    data = bytearray(jpeg())
    frame = data.index(b"\xff\xc0")
    for side in (b"\x80\0", b"\xff\xff"):
        data[frame + 5 : frame + 9] = side * 2
        with pytest.raises(ValueError, match="pixels"):
            decode_image(bytes(data), "jpg", 3)


def test_an_array_that_claims_more_than_its_bytes_is_refused():
    data = npy(np.zeros((8, 8), np.uint8))
    for claim in (b"(10**9, 8)", b"(88888888, 8), ", b"(-8, -8), ", b"(8, 9), "):
        with pytest.raises(ValueError, match="npy"):
            decode_npy(data.replace(b"(8, 8), ", claim.ljust(8))[: len(data) + 40])


def test_bfloat16_travels_as_its_bits():
    bits = np.array([[0x3F80, 0xC000]], dtype=np.uint16)
    assert np.array_equal(decode_image(npy(bits), "latent.bf16.npy", 1), bits)
    assert np.array_equal(decode_image(npy(bits), "bf16.npy", 1), bits)
    with pytest.raises(ValueError, match="uint16 in a member 'npy'; bf16.npy holds uint16"):
        decode_image(npy(bits), "npy", 1)
    with pytest.raises(ValueError, match="float16 in a member 'bf16.npy'"):
        decode_image(npy(np.zeros((1, 2), np.float16)), "bf16.npy", 1)


def test_members_are_described_by_their_first_bytes():
    assert describe_member(npy(np.zeros((4, 2), np.float16)), "npy") == {
        "dtype": "float16",
        "shape": [4, 2],
    }
    assert describe_member(jpeg(), "jpg") == {"dtype": "uint8", "shape": [24, 40]}
    assert describe_member(b"7", "cls") == {"classes": 8}
    for data, extension in ((b"junk", "npy"), (b"junk", "png"), (b"cat", "cls"), (b"{}", "json")):
        assert describe_member(data, extension) == {}


def decode_together(*arguments):
    return decode_pictures(*arguments, allocate=partial(np.empty, dtype=np.uint8))


@pytest.mark.parametrize("kind", ["png", "jpeg"])
def test_pictures_of_a_batch_are_those_decoded_one_by_one(kind):
    members = [jpeg(), jpeg("L"), jpeg("CMYK"), jpeg(progressive=True)]
    if kind == "png":
        members = [picture(mode, (40, 24))[0] for mode in ("RGB", "L", "P", "RGBA")]
    together = decode_together(members, kind, 3, (3, 24, 40))
    assert together is not None
    assert np.array_equal(together, [decode_image(data, kind, 3) for data in members])
    assert decode_together(members, kind, 1, (1, 24, 40)) is None  # colour is never made grey
    grey = [members[1], picture("L", (40, 24), kind)[0]]
    together = decode_together(grey, kind, 1, (1, 24, 40))
    assert together is not None
    assert np.array_equal(together, [decode_image(data, kind, 1) for data in grey])
    assert decode_together(grey, kind, 1, (3, 24, 40)) is None  # nor grey colour
    with pytest.raises(ValueError, match="expected 40 x 24"):
        decode_together(members, kind, 3, (3, 40, 24))


@pytest.mark.parametrize("size", [(40, 12), (24, 40), (40, 25)], ids=str)
def test_a_picture_of_another_size_in_a_batch_is_refused(size):
    """Also a smaller one, which would fill a part of its place."""
    other = picture("RGB", size, "jpeg")[0]
    with pytest.raises(ValueError, match="expected 24 x 40"):
        decode_together([jpeg(), other], "jpg", 3, (3, 24, 40))


def test_damaged_jpegs_decode_alike_without_simplejpeg(monkeypatch):
    rng = random.Random(0)
    pytest.importorskip("simplejpeg")
    for _ in range(300):
        damaged = bytearray(jpeg())
        for _ in range(rng.randint(1, 3)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        results = []
        for library in (decode.jpeg_library, lambda: None):
            with monkeypatch.context() as patch:
                patch.setattr(decode, "jpeg_library", library)
                try:
                    results.append(decode_image(bytes(damaged), "jpg", 3, (24, 40)))
                except ValueError:
                    results.append(None)
        assert (results[0] is None) == (results[1] is None)
        assert np.array_equal(results[0], results[1])


def test_a_damaged_jpeg_of_a_batch_decodes_as_it_does_alone():
    """Also one that begins as the intact ones before it do, so that its header is not parsed."""
    rng = random.Random(0)
    outcomes = set()
    for _ in range(300):
        damaged = bytearray(jpeg())
        for _ in range(rng.randint(1, 3)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        try:
            alone = decode_image(bytes(damaged), "jpg", 3, (24, 40))
        except ValueError as error:
            with pytest.raises(type(error), match=re.escape(str(error))):
                decode_together([jpeg(), bytes(damaged)], "jpg", 3, (3, 24, 40))
            outcomes.add(str(error).partition(":")[0])
        else:
            together = decode_together([jpeg(), bytes(damaged)], "jpg", 3, (3, 24, 40))
            assert together is not None
            assert np.array_equal(together[1], alone)
            outcomes.add("decoded")
    assert {"decoded", "unusable JPEG picture"} <= outcomes


@pytest.mark.parametrize("dtype", ["float16", "float32", "uint16"])
@pytest.mark.parametrize("bad", ["nan", "inf", "-inf"])
def test_numbers_that_are_not_finite_are_counted(dtype, bad):
    array = np.arange(1, 13).reshape(3, 4).astype("float32")
    array[1, 2:] = float(bad)
    if dtype == "uint16":  # bits of bfloat16
        stored = (array.view(np.uint32) >> 16).astype(np.uint16)
    else:
        stored = array.astype(dtype)
    with pytest.raises(UserError, match="2 of 12 values are NaN or infinite"):
        decode_npy(npy(stored))
    rows = np.stack([np.frombuffer(npy(a), np.uint8) for a in (np.ones_like(stored), stored)])
    assert decode_npy_rows(rows) is None
    assert decode_npy(npy(np.full(3, 65504, "float16"))).max() == 65504  # the largest


@pytest.mark.parametrize("shape", ["(True, 4)", "(4.0,)", "(-1, 4)", f"({10**30},)", "(1,) * 9"])
def test_a_side_that_is_no_whole_number_is_refused(shape):
    header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    data = b"\x93NUMPY\1\0" + len(header).to_bytes(2, "little") + header.encode() + bytes(4)
    with pytest.raises(UserError, match="whole number from 1|npy header"):
        decode_npy(data)


def test_a_header_longer_than_any_is_refused_unread():
    data = b"\x93NUMPY\2\0" + (2**31).to_bytes(4, "little") + bytes(100)
    with pytest.raises(UserError, match=r"claims 2147483660 bytes; the member has 112"):
        decode_npy(data)
