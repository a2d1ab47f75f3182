"""Clean images: fused equals the reference bit for bit, and the reference its definition."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speed_kernels.clean_images import _clean_images, clean_images, clean_images_reference, flips
from speed_kernels.philox import BLOCK, Stream, normal, random_bits

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.uint8, torch.float16, torch.bfloat16, torch.float32]
SHAPES = [(2, 1, 1), (2, 3, 5), (4, 8, 8), (2, 1, BLOCK + 3), (2, 40, 27)]
STORED = 5


def draw(batch: int, shape: tuple[int, int, int], dtype: torch.dtype, gather: bool):
    """stored, seed, ids, rows."""
    generator = torch.Generator().manual_seed(sum(shape))
    stored = torch.rand(STORED if gather else batch, *shape, generator=generator) * 255
    rows = torch.randint(STORED, (batch,), generator=generator).to(DEVICE) if gather else None
    ids = torch.arange(2**33, 2**33 + batch, device=DEVICE)
    return stored.to(DEVICE, dtype), torch.tensor(-3, device=DEVICE), ids, rows


@settings(max_examples=24)
@given(
    batch=st.integers(1, 3),
    shape=st.sampled_from(SHAPES),
    dtype=st.sampled_from(DTYPES),
    gather=st.booleans(),
    flip=st.booleans(),
    posterior=st.booleans(),
    scaled=st.booleans(),
)
def test_fused_equals_the_reference_bit_for_bit(
    batch, shape, dtype, gather, flip, posterior, scaled
):
    arguments = draw(batch, shape, dtype, gather)
    pixels = dtype == torch.uint8
    scale, shift = (0.18215, 0.0609) if scaled and not pixels else (1.0, 0.0)
    drawn = posterior and not pixels
    options: dict[str, Any] = dict(posterior=drawn, flip=flip, scale=scale, shift=shift)
    fused, plain = (f(*arguments, **options) for f in (clean_images, clean_images_reference))
    channels = shape[0] // 2 if drawn else shape[0]
    assert fused.dtype == plain.dtype == torch.float32
    assert fused.shape == (batch, channels, *shape[1:])
    assert torch.equal(fused, plain)


OPERATORS = pytest.mark.parametrize("operator", [clean_images, clean_images_reference])


@OPERATORS
def test_every_pixel_value_is_what_numpy_makes_of_it(operator):
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16)
    expected = pixels.astype(np.float32) / np.float32(127.5) - np.float32(1)
    stored, seed, ids = (
        torch.from_numpy(pixels).to(DEVICE),
        *draw(1, (1, 1, 1), DTYPES[0], False)[1:3],
    )
    assert torch.equal(operator(stored, seed, ids).cpu(), torch.from_numpy(expected))


@OPERATORS
def test_a_posterior_is_drawn_scaled_and_mirrored_as_defined(operator):
    stored, seed, ids, rows = draw(3, (6, 4, 5), torch.float32, gather=True)
    x0 = operator(stored, seed, ids, rows, posterior=True, scale=0.5, shift=2.0, flip=True)
    noise = normal(seed, ids, 60, Stream.LATENT_POSTERIOR).view(3, 3, 4, 5)
    bits = random_bits(seed, ids, 1, Stream.FLIP)
    assert rows is not None
    for i, row in enumerate(rows):
        image = stored[row]
        image = image.flip(-1) if bits[i, 0] >= 2**31 else image
        expected = (image[:3] + image[3:] * noise[i] - 2) / 2
        torch.testing.assert_close(x0[i], expected)


def test_one_image_in_two_is_mirrored_by_its_own_counter():
    ids = torch.arange(10_000, device=DEVICE)
    seed = torch.tensor(3, device=DEVICE)
    mirrored = flips(seed, ids)
    assert abs(float(mirrored.double().mean()) - 0.5) < 5 * 0.5 / 100
    assert torch.equal(mirrored[17:40], flips(seed, ids[17:40]))
    assert not torch.equal(mirrored[:64], flips(seed + 1, ids[:64]))


@OPERATORS
def test_a_gathered_batch_is_the_batch_that_was_gathered_before(operator):
    stored, seed, ids, rows = draw(3, (6, 4, 5), torch.float16, gather=True)
    options = dict(posterior=True, scale=0.18215, flip=True)
    gathered = operator(stored, seed, ids, rows, **options)
    assert torch.equal(gathered, operator(stored[rows], seed, ids, **options))


def test_where_there_is_nothing_to_do_nothing_is_copied():
    stored, seed, ids, _ = draw(3, (1, 8, 8), torch.float32, gather=False)
    for operator in (clean_images, clean_images_reference):
        assert operator(stored, seed, ids).data_ptr() == stored.data_ptr()


def test_strided_input_gives_the_same_as_a_copy():
    stored, seed, ids, rows = draw(3, (6, 4, 5), torch.float32, gather=True)
    strided = stored.to(memory_format=torch.channels_last)
    assert not strided.is_contiguous()
    options = dict(posterior=True, flip=True)
    given = clean_images(strided, seed, ids, rows, **options)
    assert torch.equal(given, clean_images(stored, seed, ids, rows, **options))


@pytest.mark.parametrize("gather", [False, True])
def test_an_empty_batch_is_fine(gather):
    stored, seed, ids, rows = draw(0, (6, 4, 5), torch.float32, gather)
    assert clean_images(stored, seed, ids, rows, posterior=True, flip=True).shape == (0, 3, 4, 5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gather", [False, True])
def test_the_operator_is_registered_soundly(dtype, gather):
    arguments = draw(2, (2, 3, 4), dtype, gather)
    pixels = dtype == torch.uint8
    torch.library.opcheck(_clean_images, (*arguments, not pixels, 1.0, 0.0, True))


def test_a_compiled_caller_is_not_compiled_again_for_other_images():
    torch._dynamo.reset()
    stored, seed, ids, rows = draw(3, (6, 4, 5), torch.float16, gather=True)
    assert rows is not None

    def call(seed, ids, rows):
        return clean_images(stored, seed, ids, rows, posterior=True, scale=0.2, flip=True) + 1

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):  # pyright: ignore[reportAttributeAccessIssue]
        for step in range(3):
            batch = (seed + step, ids + 3 * step, (rows + step) % STORED)
            assert torch.equal(compiled(*batch), call(*batch))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(stored=torch.zeros(2, 4, 4)), r"stored must be \(N, C, H, W\).*float32 \(2, 4, 4\)"),
        (dict(stored=torch.zeros(2, 2, 4, 4).double()), "got torch.float64"),
        (dict(stored=torch.zeros(2, 3, 4, 4), posterior=True), r"mean then .*\(2, 3, 4, 4\)"),
        (dict(stored=torch.zeros(2, 2, 4, 4).byte(), posterior=True), "floating .*got torch.uint8"),
        (dict(stored=torch.zeros(2, 2, 4, 4).byte(), scale=0.5), "scale=0.5 .* for latents"),
        (dict(stored=torch.zeros(3, 2, 4, 4)), "3 stored images for 2 ids; give rows"),
        (dict(rows=torch.zeros(3, dtype=torch.int64)), r"rows must be .*\(2,\); got .*\(3,\)"),
        (dict(rows=torch.zeros(2)), "rows must be int64 .*got torch.float32"),
        (dict(stored=torch.zeros(2, 2, 4, 4, device="meta")), r"\['cpu', 'meta'\]"),
        (dict(ids=torch.arange(2).int()), "ids must be an int64 tensor"),
    ],
)  # fmt: skip
def test_what_cannot_be_launched_is_named(change, message):
    arguments = dict(stored=torch.zeros(2, 2, 4, 4), seed=torch.tensor(0), ids=torch.arange(2))
    with pytest.raises(ValueError, match=message):
        clean_images(**(arguments | change))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_more_than_two_to_the_31_stored_elements():
    stored = torch.zeros(5, 4, 2**14, 2**14, dtype=torch.uint8, device=DEVICE)
    stored[4] = 255
    seed, ids = torch.tensor(0, device=DEVICE), torch.arange(1, device=DEVICE)
    x0 = clean_images(stored, seed, ids, torch.tensor([4], device=DEVICE), flip=True)
    assert bool((x0 == 1).all())
