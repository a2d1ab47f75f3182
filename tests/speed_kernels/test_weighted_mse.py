"""Weighted error and its gradient against float64."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from speed_kernels.noising import noised_input, noised_input_and_noise
from speed_kernels.philox import BLOCK, normal
from speed_kernels.weighted_mse import _squared_error, weighted_mse, weighted_mse_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPES = [(1,), (3, 5, 7), (4, 8, 8), (BLOCK,), (2, BLOCK + 4), (1, 40, 27)]


def draw(batch: int, *shape: int, dtype=torch.float32, zero: int | None = None):
    """Prediction, x0, coefficients, seed, ids; column ``zero`` of the coefficients is 0."""
    generator = torch.Generator().manual_seed(batch + sum(shape))
    prediction, x0 = (torch.randn(batch, *shape, generator=generator) for _ in range(2))
    coefficients = torch.randn(batch, 5, generator=generator)
    coefficients[:, 4] = coefficients[:, 4].exp()
    if zero is not None:
        coefficients[:, zero] = 0
    ids = torch.arange(2**33, 2**33 + batch, device=DEVICE)
    seed = torch.tensor(-3, device=DEVICE)
    return prediction.to(DEVICE, dtype), x0.to(DEVICE), coefficients.to(DEVICE), seed, ids


def run(operator, prediction, *rest, **options):
    prediction = prediction.detach().requires_grad_()
    loss, error = operator(prediction, *rest, **options)
    assert not error.requires_grad
    upstream = torch.linspace(0.5, 1.5, len(loss), device=loss.device).to(loss.dtype)
    (gradient,) = torch.autograd.grad(loss, prediction, upstream)
    return {"loss": loss.detach(), "error": error, "gradient": gradient}


@settings(max_examples=12)
@given(
    batch=st.integers(1, 3),
    shape=st.sampled_from(SHAPES),
    dtype=st.sampled_from(DTYPES),
    zero=st.sampled_from([None, 2, 3, 4]),
)
def test_matches_float64_as_well_as_eager_does(batch, shape, dtype, zero, assert_accurate):
    assume(shape != (1,) or dtype == torch.float32)  # one rounding can be lucky: no yardstick
    prediction, *rest = draw(batch, *shape, dtype=dtype, zero=zero)
    truth = run(weighted_mse_reference, prediction.double(), *rest)
    eager = run(weighted_mse_reference, prediction, *rest)
    fused = run(weighted_mse, prediction, *rest)
    for name in truth:
        assert fused[name].dtype == eager[name].dtype
        # Half precision rounds a gradient where it is saved and again where it is scaled.
        factor = 3 if name == "gradient" and dtype != torch.float32 else 2
        assert_accurate(name, fused[name], eager[name], truth[name], factor)


def test_the_reference_is_the_formula():
    prediction, x0, coefficients, seed, ids = draw(3, 2, 4, 4)
    noise = normal(seed, ids, 32).view_as(x0).double()
    b_x, b_e, w = (coefficients[:, i].double().view(-1, 1, 1, 1) for i in (2, 3, 4))
    expected = (prediction - (b_x * x0 + b_e * noise)).square().flatten(1).mean(1)
    loss, error = weighted_mse_reference(prediction.double(), x0, coefficients, seed, ids)
    torch.testing.assert_close(error, expected)
    torch.testing.assert_close(loss, w.flatten() * expected)


def test_a_perfect_prediction_has_no_error():
    """The noise of the loss is the noise of the input."""
    _, x0, coefficients, seed, ids = draw(2, 3, 8, 8)
    coefficients[:, 2:4] = coefficients[:, :2]  # the target is then the noised input
    x_in = noised_input(x0, coefficients, seed, ids, torch.float32)
    loss, error = weighted_mse(x_in, x0, coefficients, seed, ids)
    assert torch.equal(loss, torch.zeros_like(loss)) and torch.equal(error, loss)


@settings(max_examples=6)
@given(
    shape=st.sampled_from(SHAPES),
    dtype=st.sampled_from(DTYPES),
)
def test_stored_and_regenerated_noise_give_the_same_bits(shape, dtype):
    prediction, x0, *rest = draw(2, *shape, dtype=dtype)
    x_in, noise = noised_input_and_noise(x0, *rest, dtype=dtype)
    assert torch.equal(x_in, noised_input(x0, *rest, dtype=dtype))
    drawn = run(weighted_mse, prediction, x0, *rest)
    read = run(weighted_mse, prediction, x0, *rest, noise=noise)
    assert all(torch.equal(drawn[name], read[name]) for name in drawn)


def test_repeated_and_strided_calls_give_the_same_bits():
    prediction, x0, *rest = draw(2, 3, 16, 24)
    first = run(weighted_mse, prediction, x0, *rest)
    strided = prediction.to(memory_format=torch.channels_last), x0.mT.contiguous().mT
    again = run(weighted_mse, *strided, *rest)
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_float64_passes_gradcheck():
    prediction, *rest = draw(2, 3, 2)
    prediction = prediction.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda p: weighted_mse(p, *rest)[0], prediction)


def test_the_operator_is_registered_soundly():
    prediction, x0, *rest = draw(2, 3, 5)
    for noise in (None, x0):
        arguments = (prediction.requires_grad_(), x0, *rest, noise)
        torch.library.opcheck(_squared_error, arguments)


def test_an_empty_batch_is_fine():
    figures = run(weighted_mse, *draw(0, 3, 4))
    assert figures["loss"].shape == (0,) and figures["gradient"].shape == (0, 3, 4)


def test_what_cannot_be_launched_is_named():
    prediction, x0, *rest = draw(2, 3, 4)
    with pytest.raises(ValueError, match=r"must match x0, \(2, 3, 4\) on .*; got \(2, 3\)"):
        weighted_mse(prediction[..., 0], x0, *rest)
    with pytest.raises(ValueError, match=r"got \(2, 3, 4\) on meta"):
        weighted_mse(prediction.to("meta"), x0, *rest)
    with pytest.raises(ValueError, match="only the prediction has a gradient here"):
        weighted_mse(prediction, x0.requires_grad_(), *rest)
    x0 = x0.detach()
    with pytest.raises(ValueError, match=r"must be float32 \(2, 3, 4\) .*bfloat16"):
        weighted_mse(prediction, x0, *rest, noise=x0.bfloat16())
