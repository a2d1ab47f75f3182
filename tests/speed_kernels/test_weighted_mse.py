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
MASKS = ["elements", "one channel", "no channel"]
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


def draw_mask(kind: str | None, x0: torch.Tensor) -> torch.Tensor | None:
    """About half of what there is; nothing of the first image."""
    if kind is None:
        return None
    batch, channels, *positions = x0.shape
    shape = {
        "elements": (batch, channels, *positions),
        "one channel": (batch, 1, *positions),
        "no channel": (batch, *positions),
    }[kind]
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(batch)) < 0.5
    mask[0] = False
    return mask.to(x0.device)


def run(operator, prediction, *rest, **options):
    prediction = prediction.detach().requires_grad_()
    loss, error = operator(prediction, *rest, **options)
    assert not error.requires_grad
    upstream = torch.linspace(0.5, 1.5, len(loss), device=loss.device).to(loss.dtype)
    (gradient,) = torch.autograd.grad(loss, prediction, upstream)
    return {"loss": loss.detach(), "error": error, "gradient": gradient}


@settings(max_examples=16)
@given(
    batch=st.integers(1, 3),
    shape=st.sampled_from(SHAPES),
    dtype=st.sampled_from(DTYPES),
    zero=st.sampled_from([None, 2, 3, 4]),
    kind=st.sampled_from([None, *MASKS]),
)
def test_matches_float64_as_well_as_eager_does(batch, shape, dtype, zero, kind, assert_accurate):
    assume(shape != (1,) or dtype == torch.float32)  # one rounding can be lucky: no yardstick
    prediction, *rest = draw(batch, *shape, dtype=dtype, zero=zero)
    mask = draw_mask(kind, rest[0])
    truth = run(weighted_mse_reference, prediction.double(), *rest, mask=mask)
    eager = run(weighted_mse_reference, prediction, *rest, mask=mask)
    fused = run(weighted_mse, prediction, *rest, mask=mask)
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


@pytest.mark.parametrize("operator", [weighted_mse, weighted_mse_reference])
@pytest.mark.parametrize("kind", MASKS)
def test_a_masked_mean_is_that_of_the_kept_elements_alone(operator, kind):
    prediction, x0, coefficients, seed, ids = draw(3, 2, 4, 5)
    mask = draw_mask(kind, x0)
    assert mask is not None
    everywhere = mask.view(3, -1, 4, 5).expand_as(x0)
    prediction[~everywhere] = float("nan")  # what is dropped has no say at all
    figures = run(operator, prediction, x0, coefficients, seed, ids, mask=mask)
    noise = normal(seed, ids, 40).view_as(x0)
    for i in range(3):
        b_x, b_e, w = coefficients[i, 2:]
        difference = (prediction[i] - b_x * x0[i] - b_e * noise[i])[everywhere[i]]
        expected = difference.square().mean() if len(difference) else torch.zeros(())
        torch.testing.assert_close(figures["error"][i].cpu(), expected.cpu())
        torch.testing.assert_close(figures["loss"][i].cpu(), (w * expected).cpu())
    assert figures["loss"][0] == 0
    assert not figures["gradient"][~everywhere].any()
    assert figures["gradient"][everywhere].all()


@settings(max_examples=6)
@given(
    shape=st.sampled_from(SHAPES),
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from([None, *MASKS]),
)
def test_stored_and_regenerated_noise_give_the_same_bits(shape, dtype, kind):
    prediction, x0, *rest = draw(2, *shape, dtype=dtype)
    mask = draw_mask(kind, x0)
    x_in, noise = noised_input_and_noise(x0, *rest, dtype=dtype)
    assert torch.equal(x_in, noised_input(x0, *rest, dtype=dtype))
    drawn = run(weighted_mse, prediction, x0, *rest, mask=mask)
    read = run(weighted_mse, prediction, x0, *rest, noise=noise, mask=mask)
    assert all(torch.equal(drawn[name], read[name]) for name in drawn)


def test_a_mask_of_everything_changes_nothing():
    prediction, x0, *rest = draw(2, 3, 16, 24)
    whole = run(weighted_mse, prediction, x0, *rest)
    masked = run(weighted_mse, prediction, x0, *rest, mask=torch.ones_like(x0, dtype=torch.bool))
    assert all(torch.equal(whole[name], masked[name]) for name in whole)


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
    mask = draw_mask("one channel", rest[0])
    assert torch.autograd.gradcheck(lambda p: weighted_mse(p, *rest, mask=mask)[0], prediction)


def test_the_operator_is_registered_soundly():
    prediction, x0, *rest = draw(2, 3, 5)
    for noise, mask in ((None, None), (x0, draw_mask("elements", x0))):
        arguments = (prediction.requires_grad_(), x0, *rest, noise, mask)
        torch.library.opcheck(_squared_error, arguments)


def test_an_empty_batch_is_fine():
    figures = run(weighted_mse, *draw(0, 3, 4))
    assert figures["loss"].shape == (0,) and figures["gradient"].shape == (0, 3, 4)
    for operator in (weighted_mse, weighted_mse_reference):
        mask = torch.ones(0, 4, dtype=torch.bool, device=DEVICE)
        assert run(operator, *draw(0, 3, 4), mask=mask)["loss"].shape == (0,)


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
    with pytest.raises(ValueError, match=r"\(2, 3, 4\), \(2, 1, 4\), \(2, 4\)\]; got .*float"):
        weighted_mse(prediction, x0, *rest, mask=x0)
    with pytest.raises(ValueError, match=r"got torch.bool \(3, 4\) on"):
        weighted_mse(prediction, x0, *rest, mask=x0[0] > 0)
    with pytest.raises(ValueError, match=r"got torch.bool \(2, 4\) on meta"):
        weighted_mse(prediction, x0, *rest, mask=(x0[:, 0] > 0).to("meta"))
