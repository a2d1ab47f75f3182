"""Noised input and weighted error against their formulas in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from speed_kernels.noising import noised_input_reference
from speed_kernels.philox import normal
from speed_kernels.weighted_mse import weighted_mse_reference


@given(batch=st.integers(1, 4), size=st.integers(1, 9), first=st.integers(0, 2**40))
def test_the_operators_share_one_noise(batch, size, first):
    torch.manual_seed(0)
    seed, ids = torch.tensor(5), torch.arange(first, first + batch)
    x0, rows = torch.randn(batch, 2, size, size), torch.rand(batch, 5)
    noise = normal(seed, ids, 2 * size * size).view_as(x0).double()
    a_x, a_e, b_x, b_e, w = (rows[:, i].double().view(-1, 1, 1, 1) for i in range(5))

    x_in = noised_input_reference(x0, rows, seed, ids, torch.float32)
    torch.testing.assert_close(x_in.double(), a_x * x0 + a_e * noise, rtol=1e-6, atol=1e-6)

    prediction = torch.randn_like(x0, requires_grad=True)
    loss, error = weighted_mse_reference(prediction, x0, rows, seed, ids)
    expected = (prediction - (b_x * x0 + b_e * noise)).square().flatten(1).mean(1)
    torch.testing.assert_close(error.double(), expected.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(loss.double(), w.flatten() * expected, rtol=1e-5, atol=1e-6)
    assert loss.requires_grad and not error.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_model_input_has_the_dtype_asked_for(dtype):
    x0 = torch.zeros(2, 1, 4, 4)
    x_in = noised_input_reference(x0, torch.ones(2, 5), torch.tensor(0), torch.arange(2), dtype)
    assert x_in.dtype == dtype and x_in.shape == x0.shape
