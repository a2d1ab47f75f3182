"""The generator is its specification, bit for bit, on every path."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from speed_kernels.philox import (
    Stream,
    normal,
    normal_reference,
    random_bits,
    random_bits_reference,
)

INT64 = st.integers(-(2**63), 2**63 - 1)


def signed(low: int, high: int) -> int:
    word = low | high << 32
    return word - 2**64 if word >= 2**63 else word


@pytest.mark.parametrize("path", [random_bits, random_bits_reference])
@pytest.mark.parametrize(
    "key, counter, expected",
    [  # known answers published with Random123; the first word of the counter is the block
        ((0, 0), (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ],
)
def test_known_answers(path, key, counter, expected):
    words = path(torch.tensor(signed(*key)), torch.tensor([signed(*counter[1:3])]), 4, counter[3])
    assert tuple(words[0].tolist()) == expected


@given(seed=INT64, ids=st.lists(INT64, min_size=1, max_size=4), count=st.integers(1, 70))
def test_the_fast_path_equals_the_reference_bit_for_bit(seed, ids, count):
    root, counters = torch.tensor(seed), torch.tensor(ids)
    for stream in Stream:
        bits = random_bits(root, counters, count, stream)
        assert torch.equal(bits, random_bits_reference(root, counters, count, stream))
        fast, slow = (f(root, counters, count, stream) for f in (normal, normal_reference))
        assert torch.equal(fast.view(torch.int32), slow.view(torch.int32))


@given(start=st.integers(0, 40), length=st.integers(1, 8), count=st.integers(1, 64))
def test_an_image_has_the_same_noise_in_every_batch_and_length(start, length, count):
    seed, ids = torch.tensor(7), torch.arange(50)
    whole = normal(seed, ids, 64)
    part = normal(seed, ids[start : start + length], count)
    assert torch.equal(part, whole[start : start + length, :count])


def test_normals_are_normal_and_streams_independent():
    seed, ids = torch.tensor(3), torch.arange(4000)
    noise = normal(seed, ids, 256).double().numpy()
    assert stats.kstest(noise.ravel()[:500_000], "norm").pvalue > 1e-3
    assert abs(noise.mean()) < 5 / np.sqrt(noise.size)
    other = normal(seed, ids, 256, Stream.GENERATION).double().numpy()
    assert abs(np.corrcoef(noise.ravel(), other.ravel())[0, 1]) < 5 / np.sqrt(noise.size)


def test_operators_are_registered_soundly():
    seed, ids = torch.tensor(1), torch.arange(3)
    for operator in (torch.ops.speed_kernels.normal, torch.ops.speed_kernels.random_bits):
        torch.library.opcheck(operator.default, (seed, ids, 10, 0))


def test_a_compiled_caller_gets_the_same_bits_for_every_seed_without_recompiling():
    compiled = torch.compile(lambda s, i: normal(s, i, 9) * 2, fullgraph=True, backend="aot_eager")
    ids = torch.arange(5)
    with torch._dynamo.config.patch(error_on_recompile=True):  # pyright: ignore[reportAttributeAccessIssue]
        for seed in (0, 1, -5):
            root = torch.tensor(seed)
            assert torch.equal(compiled(root, ids), normal(root, ids, 9) * 2)
