"""GELU with the bias gradient in its backward, against float64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from speed_kernels.gelu import (
    ROWS,
    TILE_COLUMNS,
    _gelu,
    gelu,
    gelu_by_sigmoid,
    gelu_reference,
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def draw(*shape: int, dtype=torch.float32, device=DEVICE):
    """h, bias, dy."""
    generator = torch.Generator().manual_seed(0)
    sizes = (shape, shape[-1:], shape)
    scales = (2.0, 1.0, 1.0)
    return [
        (scale * torch.randn(size, generator=generator)).to(device, dtype)
        for size, scale in zip(sizes, scales, strict=True)
    ]


def run(operator, h, bias, dy, dtype=None):
    h, bias = (t.detach().to(dtype or t.dtype).requires_grad_() for t in (h, bias))
    y = operator(h, bias)
    dh, dbias = torch.autograd.grad(y, (h, bias), dy.to(y.dtype))
    return {"y": y, "dh": dh, "dbias": dbias}


@settings(max_examples=12)
@given(
    shape=st.sampled_from(
        [(3, 8), (2, 5, 40), (1, ROWS, 24), (ROWS + 3, 16), (2, 3, TILE_COLUMNS + 8), (7, 33), (9,)]
    ),
    dtype=st.sampled_from(DTYPES),
    dense=st.booleans(),
)
def test_matches_float64_as_well_as_eager_does(shape, dtype, dense, assert_accurate):
    h, bias, dy = draw(*shape, dtype=dtype)
    if not dense:
        h, dy = (t.transpose(0, -1).contiguous().transpose(0, -1) for t in (h, dy))
    truth = run(gelu_reference, h, bias, dy, torch.float64)
    eager = run(gelu_reference, h, bias, dy)
    for other in (gelu, gelu_by_sigmoid):
        figures = run(other, h, bias, dy)
        for name in truth:
            assert figures[name].dtype == dtype
            assert_accurate(name, figures[name], eager[name], truth[name])


@pytest.mark.parametrize("operator", [gelu, gelu_by_sigmoid])
def test_the_ends_are_those_of_the_definition(operator, device):
    h = torch.tensor([[-1e4, -100.0, -20.0, -0.0, 0.0, 20.0, 100.0, 1e4]], device=device)
    figures = run(operator, h, torch.zeros(8, device=device), torch.ones_like(h))
    expected = torch.tensor([[0, 0, 0, 0.5, 0.5, 1, 1, 1.0]], device=device)
    torch.testing.assert_close(figures["dh"], expected)
    torch.testing.assert_close(figures["y"], F.gelu(h, approximate="tanh"), rtol=1e-6, atol=0)


def test_the_bias_has_the_gradient_that_the_linear_layer_gives_it():
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (
        torch.randn(size, generator=generator, dtype=torch.float64).requires_grad_()
        for size in ((2, 3, 4), (5, 4), (5,))
    )

    def layer(x, weight, bias):
        return gelu(F.linear(x, weight, bias.detach()), bias)

    assert torch.autograd.gradcheck(layer, (x, weight, bias))


def test_a_frozen_bias_and_no_bias_are_fine(device):
    h, bias, dy = draw(2, 5, 16, device=device)
    expected = run(gelu_reference, h, bias, dy)
    h.requires_grad_()
    for given_bias in (bias, None):
        y = gelu(h, given_bias)
        torch.testing.assert_close(torch.autograd.grad(y, h, dy)[0], expected["dh"])


def test_the_operator_is_registered_soundly(device):
    h, bias, _ = draw(2, 3, 16, device=device)
    torch.library.opcheck(_gelu, (h.requires_grad_(), bias.requires_grad_()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiling_recomputing_and_repeating_change_no_bit(dtype, device):
    tensors = draw(2, 5, 16, dtype=dtype, device=device)
    plain = run(gelu, *tensors)
    variants = [
        gelu,
        torch.compile(gelu, fullgraph=True, backend="aot_eager"),
        lambda h, bias: checkpoint(gelu, h, bias, use_reentrant=False),
    ]
    for variant in variants:
        again = run(variant, *tensors)
        assert all(torch.equal(plain[name], again[name]) for name in plain)


def test_an_empty_batch_is_fine(device):
    figures = run(gelu, *draw(0, 3, 16, device=device))
    assert figures["dh"].shape == (0, 3, 16) and not bool(figures["dbias"].any())


def test_a_bias_of_another_width_is_named():
    with pytest.raises(ValueError, match=r"\(D,\) beside \(..., D\); got \(4,\) beside \(2, 3\)"):
        gelu(torch.zeros(2, 3), torch.zeros(4))
