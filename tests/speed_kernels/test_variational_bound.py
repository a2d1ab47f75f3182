"""Loss with a learned variance, and its gradient, against float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speed_kernels.noising import noised_input_and_noise
from speed_kernels.philox import BLOCK, normal
from speed_kernels.variational_bound import _hybrid_sums, hybrid_loss, hybrid_loss_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPES = [(3, 5, 7), (4, 8, 8), (2, BLOCK // 2 + 4), (1, 40, 27)]
ABAR = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), dim=0)


def bound_row(t: int, weight: float) -> list[float]:
    """Of the linear schedule, at t >= 1; at t = 0 with the variance of t = 1."""
    step = max(t, 1)
    before, now = float(ABAR[step - 1]), float(ABAR[step])
    beta = 1 - now / before
    posterior = math.log(beta * (1 - before) / (1 - now))
    before = 1.0 if t == 0 else before
    beta = 1 - float(ABAR[t]) / before
    root = math.sqrt((1 - float(ABAR[t])) / float(ABAR[t]))
    gap = math.sqrt(before) * beta / (1 - float(ABAR[t])) * root
    return [posterior, math.log(beta), gap, float(t == 0), weight]


def draw(timesteps: list[int], *shape: int, dtype=torch.float32):
    """Answer, x0, coefficients, bound rows, seed, ids; the answer is near the noise."""
    batch = len(timesteps)
    generator = torch.Generator().manual_seed(batch + sum(shape))
    x0 = torch.rand(batch, *shape, generator=generator) * 2.4 - 1.2
    x0 = x0.clamp(-1, 1)  # both ends of the pixels' range have their own formula
    ids, seed = torch.arange(2**33, 2**33 + batch), torch.tensor(-3)
    noise = normal(seed, ids, math.prod(shape)).view(x0.shape)
    epsilon = noise + 0.2 * torch.randn(x0.shape, generator=generator)
    v = torch.rand(x0.shape, generator=generator) * 2 - 1
    coefficients = torch.rand(batch, 5, generator=generator) + 0.5
    rows = torch.tensor([bound_row(t, 0.5 + 0.1 * i) for i, t in enumerate(timesteps)])
    answer = torch.cat([epsilon, v], dim=1).to(dtype)
    rows = rows.view(batch, 5)
    return [tensor.to(DEVICE) for tensor in (answer, x0, coefficients, rows, seed, ids)]


def run(operator, answer, *rest, **options):
    answer = answer.detach().requires_grad_()
    loss, error = operator(answer, *rest, **options)
    assert not error.requires_grad
    upstream = torch.linspace(0.5, 1.5, len(loss), device=loss.device).to(loss.dtype)
    (gradient,) = torch.autograd.grad(loss, answer, upstream)
    epsilon, v = gradient.chunk(2, dim=1)
    return {"loss": loss.detach(), "error": error, "epsilon": epsilon, "v": v}


@settings(max_examples=12)
@given(
    timesteps=st.lists(st.sampled_from([0, 0, 1, 2, 50, 999]), min_size=1, max_size=3),
    shape=st.sampled_from(SHAPES),
    dtype=st.sampled_from(DTYPES),
)
def test_matches_float64_as_well_as_eager_does(timesteps, shape, dtype, assert_accurate):
    answer, *rest = draw(timesteps, *shape, dtype=dtype)
    truth = run(hybrid_loss_reference, answer.double(), *rest)
    eager = run(hybrid_loss_reference, answer, *rest)
    fused = run(hybrid_loss, answer, *rest)
    for name in truth:
        assert fused[name].dtype == eager[name].dtype
        # Half precision rounds a gradient where it is saved and again where it is scaled, which
        # may be at another place between two powers of two: three half units instead of one.
        factor = 3 if name in ("epsilon", "v") and dtype != torch.float32 else 2
        assert_accurate(name, fused[name], eager[name], truth[name], factor)


def test_the_darkest_and_brightest_pixels_are_known_in_bfloat16(assert_accurate):
    answer, x0, *rest = draw([0], 3, 4, 4)
    half, answer = x0.bfloat16(), answer.double()
    assert (half.abs() == 1).any()
    wide = run(hybrid_loss_reference, answer, half.float(), *rest)
    for name, value in run(hybrid_loss_reference, answer, half, *rest).items():
        assert torch.equal(value, wide[name])
    answer = answer.float()
    eager, fused = (run(f, answer, half, *rest) for f in (hybrid_loss_reference, hybrid_loss))
    for name in wide:
        assert_accurate(name, fused[name], eager[name], wide[name])


@pytest.mark.parametrize("t", [0, 1, 999])
def test_epsilon_is_trained_by_the_error_and_v_by_the_bound(t):
    answer, x0, coefficients, rows, seed, ids = draw([t], 3, 4, 4)
    error_only, bound_only = rows.clone(), coefficients.clone()
    error_only[:, 4], bound_only[:, 4] = 0, 0
    without_bound = run(hybrid_loss, answer, x0, coefficients, error_only, seed, ids)
    without_error = run(hybrid_loss, answer, x0, bound_only, rows, seed, ids)
    both = run(hybrid_loss, answer, x0, coefficients, rows, seed, ids)
    assert not without_bound["v"].any() and not without_error["epsilon"].any()
    assert without_error["v"].any() and without_bound["epsilon"].any()
    assert torch.equal(both["v"], without_error["v"])
    assert torch.equal(both["epsilon"], without_bound["epsilon"])
    torch.testing.assert_close(both["loss"], without_bound["loss"] + without_error["loss"])


def test_clean_data_is_read_at_the_first_timestep_only():
    answer, x0, *rest = draw([0, 1, 500], 3, 4, 4)
    before = run(hybrid_loss, answer, x0, *rest)
    after = run(hybrid_loss, answer, torch.full_like(x0, float("nan")), *rest)
    assert before["loss"][0] != after["loss"][0]
    for name in before:
        assert torch.equal(before[name][1:], after[name][1:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_stored_and_regenerated_noise_give_the_same_bits(dtype):
    answer, x0, coefficients, rows, seed, ids = draw([0, 300], 2, BLOCK // 2 + 4, dtype=dtype)
    _, noise = noised_input_and_noise(x0, coefficients, seed, ids, dtype)
    arguments = (answer, x0, coefficients, rows, seed, ids)
    drawn, read = run(hybrid_loss, *arguments), run(hybrid_loss, *arguments, noise=noise)
    assert all(torch.equal(drawn[name], read[name]) for name in drawn)


def test_repeated_and_strided_calls_give_the_same_bits():
    answer, x0, *rest = draw([0, 7], 3, 16, 24)
    first = run(hybrid_loss, answer, x0, *rest)
    strided = answer.to(memory_format=torch.channels_last), x0.mT.contiguous().mT
    again = run(hybrid_loss, *strided, *rest)
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_an_impossible_prediction_has_a_finite_loss_and_no_gradient_at_the_first_timestep():
    """Probabilities are floored at 1e-12, as published."""
    answer, x0, *rest = draw([0], 3, 4, 4)
    answer[:, :3] = 1e4
    figures, plain = (run(f, answer, x0, *rest) for f in (hybrid_loss, hybrid_loss_reference))
    for name in figures:
        assert torch.isfinite(figures[name]).all()
        torch.testing.assert_close(figures[name], plain[name])


def test_float64_passes_gradcheck_in_v():
    """In v: the bound holds epsilon fixed, which a finite difference would not."""
    answer, *rest = draw([0, 0, 3, 600], 2, 3)
    epsilon, v = answer.double().chunk(2, dim=1)
    assert torch.autograd.gradcheck(
        lambda half: hybrid_loss(torch.cat([epsilon, half], dim=1), *rest)[0],
        v.contiguous().requires_grad_(),
    )


def test_the_operator_is_registered_soundly():
    answer, x0, _, *rest = draw([0, 5], 3, 5)
    for noise in (None, x0):
        torch.library.opcheck(_hybrid_sums, (answer.requires_grad_(), x0, *rest, noise))


def test_an_empty_batch_is_fine():
    figures = run(hybrid_loss, *draw([], 3, 4))
    assert figures["loss"].shape == (0,) and figures["v"].shape == (0, 3, 4)


def test_what_cannot_be_launched_is_named():
    answer, x0, coefficients, rows, seed, ids = draw([0, 5], 3, 4)
    with pytest.raises(ValueError, match=r"must be \(2, 6, 4\) there.*got \(2, 3, 4\)"):
        hybrid_loss(answer[:, :3], x0, coefficients, rows, seed, ids)
    with pytest.raises(ValueError, match=r"got \(2, 6, 4\) on meta"):
        hybrid_loss(answer.to("meta"), x0, coefficients, rows, seed, ids)
    with pytest.raises(ValueError, match=r"bound_rows must be float32 .*\(2, 5\); got .*\(2, 4\)"):
        hybrid_loss(answer, x0, coefficients, rows[:, :4], seed, ids)
    with pytest.raises(ValueError, match="got torch.float64"):
        hybrid_loss(answer, x0, coefficients, rows.double(), seed, ids)
    with pytest.raises(ValueError, match="only the answer has a gradient here"):
        hybrid_loss(answer, x0.requires_grad_(), coefficients, rows, seed, ids)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_more_than_two_to_the_31_elements():
    _, x0, coefficients, rows, seed, ids = draw([0, 5, 600], 1, 2)
    x0, answer = x0.new_zeros(3, 1, 2**29), x0.new_zeros(3, 2, 2**29, dtype=torch.bfloat16)
    _, error = hybrid_loss(answer, x0, coefficients, rows, seed, ids)
    _, _, slopes = _hybrid_sums(answer, x0, rows, seed, ids, None)
    assert torch.allclose(error, torch.ones_like(error), atol=1e-3)
    last = normal(seed, ids[2:], 64)
    torch.testing.assert_close(slopes[2, 0, :64].float(), -last[0], rtol=1e-2, atol=1e-2)
