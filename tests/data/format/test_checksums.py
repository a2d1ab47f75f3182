"""Checksums are zlib's, whichever library computes them."""

import random
import sys
import zlib
from runpy import run_path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from speed_engine.data.format import checksums
from speed_engine.runtime.machine import choose_checksums

LIBRARY = "zlib_ng.zlib_ng"


@pytest.mark.parametrize("installed", [True, False])
def test_checksums_are_those_of_zlib_with_and_without_zlib_ng(monkeypatch, installed):
    if installed:
        pytest.importorskip(LIBRARY)
    else:
        monkeypatch.setitem(sys.modules, LIBRARY, None)  # importing it raises ImportError
    crc32 = run_path(checksums.__file__)["crc32"]
    assert (crc32 is zlib.crc32) != installed

    @given(st.integers(0, 70_000), st.integers(0, 64), st.integers(0, 2**64))
    def equal(size, start, seed):  # instructions differ with length and alignment
        data = random.Random(seed).randbytes(start + size)
        for part in (data, bytearray(data), memoryview(data)[start:]):
            assert crc32(part) == zlib.crc32(part)

    equal()


def test_doctor_says_which_library_computes_checksums():
    assert (checksums.crc32 is zlib.crc32) == (choose_checksums().value == "zlib")
