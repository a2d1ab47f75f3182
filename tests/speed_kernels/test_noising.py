"""Noised input: fused equals the reference bit for bit, and the reference its formula."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speed_kernels.noising import (
    _noised_input,
    _noised_input_and_noise,
    noised_input,
    noised_input_and_noise,
    noised_input_and_noise_reference,
    noised_input_reference,
)
from speed_kernels.philox import BLOCK, normal

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def draw(batch: int, *shape: int, dtype=torch.float32, first: int = 2**33):
    """x0, coefficients, seed, ids."""
    generator = torch.Generator().manual_seed(batch + sum(shape))
    x0 = torch.randn(batch, *shape, generator=generator).to(DEVICE, dtype)
    coefficients = torch.randn(batch, 5, generator=generator).to(DEVICE)
    ids = torch.arange(first, first + batch, device=DEVICE)
    return x0, coefficients, torch.tensor(-3, device=DEVICE), ids


@settings(max_examples=8)
@given(
    batch=st.integers(1, 3),
    shape=st.sampled_from([(1,), (3, 5, 7), (4, 8, 8), (BLOCK,), (BLOCK + 4,), (1, 40, 27)]),
    source=st.sampled_from(DTYPES),
    target=st.sampled_from(DTYPES),
)
def test_fused_equals_the_reference_bit_for_bit(batch, shape, source, target):
    arguments = draw(batch, *shape, dtype=source)
    fused, plain = (f(*arguments, target) for f in (noised_input, noised_input_reference))
    assert fused.dtype == target and fused.shape == (batch, *shape)
    assert torch.equal(fused, plain)
    for operator in (noised_input_and_noise, noised_input_and_noise_reference):
        x_in, noise = operator(*arguments, target)
        assert torch.equal(x_in, plain) and noise.dtype == torch.float32
        assert torch.equal(noise, normal(*arguments[2:], noise[0].numel()).view(noise.shape))


def test_the_reference_is_the_formula():
    x0, coefficients, seed, ids = draw(3, 2, 4, 4)
    noise = normal(seed, ids, 32).view_as(x0).double()
    a_x, a_e = (coefficients[:, i].double().view(-1, 1, 1, 1) for i in range(2))
    x_in = noised_input_reference(x0.double(), coefficients, seed, ids, torch.float64)
    assert torch.equal(x_in, a_x * x0.double() + a_e * noise)


def test_strided_input_gives_the_same_as_a_copy():
    x0, rows, seed, ids = draw(2, 4, 6, 10)
    strided = x0.to(memory_format=torch.channels_last), rows.mT.contiguous().mT
    assert not any(tensor.is_contiguous() for tensor in strided)
    x_in = noised_input(*strided, seed, ids, torch.bfloat16)
    assert torch.equal(x_in, noised_input(x0, rows, seed, ids, torch.bfloat16))


def test_an_empty_batch_is_fine():
    assert noised_input(*draw(0, 3, 4), torch.bfloat16).shape == (0, 3, 4)
    assert noised_input_and_noise(*draw(0, 3, 4), torch.bfloat16)[1].shape == (0, 3, 4)


def test_the_gradient_of_x0_is_the_reference_s():
    x0, rows, seed, ids = draw(2, 3, 5)
    x0.requires_grad_()
    gradients = [
        torch.autograd.grad(f(x0, rows, seed, ids, torch.float32).square().sum(), x0)[0]
        for f in (noised_input, noised_input_reference, lambda *a: noised_input_and_noise(*a)[0])
    ]
    torch.testing.assert_close(gradients[0], gradients[1])
    assert torch.equal(gradients[0], gradients[2])


def test_the_operator_is_registered_soundly():
    x0, *rest = draw(2, 3, 5)
    for operator in (_noised_input, _noised_input_and_noise):
        torch.library.opcheck(operator, (x0.requires_grad_(), *rest, torch.bfloat16))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(x0=torch.zeros(2, 4, dtype=torch.uint8)), "x0 must be floating point, got"),
        (dict(x0=torch.zeros(3, 4)), r"one of B ids per image; got x0 \(3, 4\) and ids \(2,\)"),
        (dict(coefficients=torch.zeros(2, 4)), r"of shape \(2, 5\); got torch.float32 .* \(2, 4\)"),
        (dict(coefficients=torch.zeros(2, 5).double()), "must be float32 .* got torch.float64"),
        (dict(coefficients=torch.zeros(2, 5, device="meta")), "x0 on cpu, coefficients on meta"),
    ],
)
def test_what_cannot_be_launched_is_named(change, message):
    arguments = dict(
        x0=torch.zeros(2, 4),
        coefficients=torch.zeros(2, 5),
        seed=torch.tensor(0),
        ids=torch.arange(2),
    )
    with pytest.raises(ValueError, match=message):
        noised_input(**(arguments | change), dtype=torch.float32)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_more_than_two_to_the_31_elements():
    x0 = torch.zeros(3, 2**30, dtype=torch.bfloat16, device=DEVICE)
    coefficients, seed, ids = draw(3, 1)[1:]
    x_in = noised_input(x0, coefficients, seed, ids, torch.bfloat16)
    tail = noised_input_reference(x0[2:, :64], coefficients[2:], seed, ids[2:], torch.bfloat16)
    assert torch.equal(x_in[2:, :64], tail)
