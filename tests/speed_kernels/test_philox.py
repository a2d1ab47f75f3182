"""The generator is its specification, bit for bit, on every path."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from speed_kernels.language import chunk, tl, triton
from speed_kernels.philox import (
    BLOCK,
    SPECIFICATION,
    Stream,
    _cos_sin,
    _cos_sin_reference,
    _minus_2_log,
    _minus_2_log_reference,
    _rounds_numpy,
    _rounds_reference,
    normal,
    normal_reference,
    normal_triton,
    random_bits,
    random_bits_reference,
    random_bits_triton,
)

ONES = 0xFFFFFFFF
INT64 = st.integers(-(2**63), 2**63 - 1)
EDGE_IDS = [-1, -5, 2**31, 2**32 - 1, 2**32, 2**40 + 7, 2**63 - 1]


PATHS = {  # name: words, normals
    "operator": (random_bits, normal),
    "PyTorch": (random_bits_reference, normal_reference),
    "Triton": (random_bits_triton, normal_triton),
}
GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "philox.json").read_text())


@triton.jit
def words_kernel(out_ptr, key_ptr, counter_ptr):
    """Ten rounds on one counter, as the device functions call them."""
    lane = tl.arange(0, 1)
    c0, c1 = tl.load(counter_ptr + lane), tl.load(counter_ptr + 1 + lane)
    c2, c3 = tl.load(counter_ptr + 2 + lane), tl.load(counter_ptr + 3 + lane)
    words = tl.philox(
        tl.load(key_ptr), c0.to(tl.uint32), c1.to(tl.uint32), c2.to(tl.uint32), c3.to(tl.uint32)
    )
    for i in tl.static_range(4):
        tl.store(out_ptr + i + lane, words[i].to(tl.int64))


def rounds_triton(counter: list[int], key: list[int], device) -> list[int]:
    out = torch.empty(4, dtype=torch.int64, device=device)
    low_high = np.array([key[0] | key[1] << 32], dtype=np.uint64).view(np.int64)
    words_kernel[(1,)](
        out, torch.from_numpy(low_high).to(device), torch.tensor(counter, device=device)
    )
    return out.tolist()


@pytest.mark.parametrize(
    "key, counter, expected",
    [  # known answers published with Random123
        ([0, 0], [0, 0, 0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([ONES, ONES], [ONES] * 4, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0xA4093822, 0x299F31D0],
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_the_rounds_give_the_published_answers(key, counter, expected, device):
    tensors = [torch.tensor([word]) for word in counter]
    arrays = [np.array([word], dtype=np.uint64) for word in counter]
    assert [int(word) for word in _rounds_reference(tensors, list(key))] == expected
    assert [int(word[0]) for word in _rounds_numpy(arrays, key)] == expected
    assert rounds_triton(counter, key, device) == expected


@pytest.mark.parametrize("path", PATHS)
def test_every_path_gives_the_committed_bits(path, device):
    words, normals = PATHS[path]
    assert GOLDEN["specification"] == SPECIFICATION
    for case in GOLDEN["cases"]:
        seed = torch.tensor(case["seed"], device=device)
        ids, stream = torch.tensor([case["id"]], device=device), Stream(case["stream"])
        assert [f"{word:08x}" for word in words(seed, ids, 8, stream)[0].tolist()] == case["words"]
        bits = normals(seed, ids, 8, stream)[0].view(torch.int32).tolist()
        assert [f"{word & ONES:08x}" for word in bits] == case["normals"]


@triton.jit
def box_muller_kernel(radius_ptr, cos_ptr, sin_ptr, words_ptr, SIZE: tl.constexpr):
    lanes = tl.arange(0, SIZE)
    words = tl.load(words_ptr + lanes).to(tl.uint32)
    cos, sin = _cos_sin(words)
    tl.store(cos_ptr + lanes, cos)
    tl.store(sin_ptr + lanes, sin)
    tl.store(radius_ptr + lanes, tl.sqrt_rn(_minus_2_log(words)))


def test_words_at_the_ends_of_a_quadrant_keep_every_bit_and_the_sign_of_zero(device):
    near = [word + step for word in range(0, 2**32, 2**29) for step in (-1, 0, 1, 2)]
    words = torch.tensor([word % 2**32 for word in near])
    actual = [torch.empty(len(words), device=device) for _ in range(3)]
    box_muller_kernel[(1,)](*actual, words.to(device), SIZE=len(words))
    radius = _minus_2_log_reference(words).double().sqrt().float()
    for ours, expected in zip(actual, (radius, *_cos_sin_reference(words)), strict=True):
        assert torch.equal(ours.cpu().view(torch.int32), expected.view(torch.int32))


@settings(max_examples=15)
@given(
    seed=INT64 | st.sampled_from([-1, 0, 2**63 - 1]),
    ids=st.lists(INT64 | st.sampled_from(EDGE_IDS), min_size=1, max_size=3),
    count=st.integers(1, BLOCK + 70),
    stream=st.sampled_from(Stream),
)
def test_the_kernel_equals_the_reference_bit_for_bit(seed, ids, count, stream):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    root, counters = torch.tensor(seed), torch.tensor(ids)
    there = root.to(device), counters.to(device)
    bits = random_bits_triton(*there, count, stream).cpu()
    assert torch.equal(bits, random_bits_reference(root, counters, count, stream))
    fused, plain = normal_triton(*there, count, stream).cpu(), normal(root, counters, count, stream)
    assert torch.equal(fused.view(torch.int32), plain.view(torch.int32))


@triton.jit
def chunk_kernel(out_ptr, program, num_elements, num_chunks, BLOCK: tl.constexpr):
    image, first, offset = chunk(program, num_elements, num_chunks, BLOCK)
    tl.store(out_ptr, image)
    tl.store(out_ptr + 1, first)
    tl.store(out_ptr + 2, offset)


def test_offsets_pass_two_to_the_31(device):
    out = torch.empty(3, dtype=torch.int64, device=device)
    num_elements, num_chunks = 2**24, 2**14  # each fits into 32 bits, the offset does not
    program = 600 * num_chunks - 1
    chunk_kernel[(1,)](out, program, num_elements, num_chunks, BLOCK=1024)
    assert out.tolist() == [599, num_elements - 1024, 600 * num_elements - 1024]


@pytest.mark.parametrize("path", PATHS)
def test_no_images_and_no_elements_are_fine(path, device):
    seed, none = torch.tensor(0, device=device), torch.empty(0, dtype=torch.int64, device=device)
    for draw in PATHS[path]:
        assert draw(seed, none, 5, Stream.NOISE).shape == (0, 5)
        assert draw(seed, none.new_zeros(2), 0, Stream.NOISE).shape == (2, 0)


@pytest.mark.parametrize(
    "seed, ids, message",
    [
        (torch.tensor([0]), torch.arange(2), r"seed must be .* of shape \(\); got .* \(1,\)"),
        (torch.tensor(0.0), torch.arange(2), "seed must be an int64 tensor .* got torch.float32"),
        (torch.tensor(0), torch.arange(2).int(), r"ids must be .* \(B,\); got torch.int32"),
        (torch.tensor(0), torch.zeros(2, 2, dtype=torch.int64), r"ids must be .* \(2, 2\)"),
        (torch.tensor(0), torch.arange(2, device="meta"), "seed is on cpu and ids on meta"),
    ],
)
def test_what_cannot_address_a_draw_is_named(seed, ids, message):
    for draw in (random_bits, normal):
        with pytest.raises(ValueError, match=message):
            draw(seed, ids, 4, Stream.NOISE)


@settings(max_examples=40)
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
