"""Attention of a packed projection, whose gradient is one kernel's."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from speed_kernels.attention import (
    TOKENS,
    WIDEST,
    _attention_backward,
    attention,
    attention_reference,
    takes,
    tiles,
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FEW = TOKENS[0]
DTYPES = [torch.bfloat16, torch.float16]


def draw(batch: int, tokens: int, num_heads: int, width: int, dtype=torch.float16, device=DEVICE):
    """qkv, the bias in it, and the gradient of the result."""
    generator = torch.Generator().manual_seed(0)
    dim = num_heads * width
    sizes = (batch, tokens, 3 * dim), (3 * dim,), (batch, tokens, dim)
    qkv, bias, upstream = (torch.randn(size, generator=generator) for size in sizes)
    return (qkv + bias).to(device, dtype), bias.to(device), upstream.to(device, dtype)


def run(operator, num_heads, qkv, bias, upstream, dtype=None):
    qkv, bias = (t.detach().to(dtype or t.dtype).requires_grad_() for t in (qkv, bias))
    y = operator(qkv, num_heads, bias)
    gradients = torch.autograd.grad(y, (qkv, bias), upstream.to(y.dtype))
    return dict(zip(["y", "dqkv", "dbias"], [y, *gradients], strict=True))


@settings(max_examples=12)
@given(
    batch=st.integers(1, 2),
    tokens=st.sampled_from(TOKENS),
    num_heads=st.sampled_from([1, 3]),
    width=st.sampled_from([16, 24, 40, 64, 72, WIDEST]),
    dtype=st.sampled_from(DTYPES),
    transposed=st.booleans(),
)
def test_matches_float64_as_well_as_eager_does(
    batch, tokens, num_heads, width, dtype, transposed, assert_accurate
):
    qkv, bias, upstream = draw(batch, tokens, num_heads, width, dtype)
    assert takes(qkv, num_heads)
    if transposed:  # as a loss may hand it back
        upstream = upstream.transpose(0, 1).contiguous().transpose(0, 1)
    truth = run(attention_reference, num_heads, qkv, bias, upstream, torch.float64)
    eager = run(attention_reference, num_heads, qkv, bias, upstream)
    fused = run(attention, num_heads, qkv, bias, upstream)
    for name in truth:
        assert_accurate(name, fused[name], eager[name], truth[name])


def test_each_gradient_stands_where_its_projection_was(device):
    """Not only on average: the largest error of queries, keys and values each is of rounding."""
    qkv, bias, upstream = draw(2, TOKENS[1], 2, 24, device=device)
    truth = run(attention_reference, 2, qkv, bias, upstream, torch.float64)["dqkv"]
    fused = run(attention, 2, qkv, bias, upstream)["dqkv"]
    for part, wanted in zip(fused.chunk(3, dim=-1), truth.chunk(3, dim=-1), strict=True):
        assert (part.double() - wanted).abs().max() < 4e-3 * wanted.abs().max()


def test_the_bias_of_the_keys_has_no_gradient(device):
    """A number that is added to a row of scores changes nothing."""
    qkv, bias, upstream = draw(2, FEW, 2, 24, device=device)
    _, of_keys, _ = run(attention, 2, qkv, bias, upstream)["dbias"].chunk(3)
    assert not bool(of_keys.any())


def test_what_the_kernel_does_not_take_goes_through_pytorchs_attention(device):
    for tokens, width, dtype in (
        (FEW - 1, 24, torch.float16),
        (3 * FEW, 24, torch.float16),
        (FEW, 12, torch.float16),
        (FEW, 8, torch.float16),
        (FEW, WIDEST + 8, torch.float16),
        (FEW, 24, torch.float32),
    ):
        qkv, bias, upstream = draw(1, tokens, 2, width, dtype, device)
        assert not takes(qkv, 2)
        plain = run(attention_reference, 2, qkv, bias, upstream)
        found = run(attention, 2, qkv, bias, upstream)
        assert torch.equal(found["y"], plain["y"]) and torch.equal(found["dqkv"], plain["dqkv"])


def test_no_sum_is_kept_where_nothing_wants_a_gradient(device, monkeypatch):
    import speed_kernels.attention as module

    monkeypatch.setattr(module, "_attention", None)
    qkv, bias, _ = draw(1, FEW, 2, 16, device=device)
    with torch.no_grad():
        y = attention(qkv.requires_grad_(), 2, bias)
    assert torch.equal(y, attention_reference(qkv.detach(), 2))


@pytest.mark.parametrize("width", range(16, WIDEST + 1, 8))
def test_two_tiles_cover_a_head(width):
    given, wide, rest = tiles(width).values()
    assert given == width and wide <= width <= wide + rest <= 96
    assert all(n == 0 or (n >= 16 and n & (n - 1) == 0) for n in (wide, rest))


def test_without_a_bias_there_is_none_to_differentiate(device):
    qkv, _, upstream = draw(1, FEW, 2, 16, device=device)
    qkv.requires_grad_()
    found, plain = (
        torch.autograd.grad(f(qkv, 2), qkv, upstream)[0] for f in (attention, attention_reference)
    )
    assert F.cosine_similarity(found.flatten().float(), plain.flatten().float(), dim=0) > 0.9999


def test_the_operators_are_registered_soundly(device):
    qkv, bias, upstream = draw(1, FEW, 2, 16, device=device)
    torch.library.opcheck(
        torch.ops.speed_kernels.attention.default, (qkv.requires_grad_(), bias.requires_grad_(), 2),
        rtol=1e-2, atol=1e-2,
    )  # fmt: skip
    y, log_sum = torch.ops.speed_kernels.attention(qkv.detach(), bias.detach(), 2)
    torch.library.opcheck(_attention_backward, (upstream, qkv.detach(), y, log_sum))


def test_compiling_recomputing_and_repeating_change_no_bit(device):
    arguments = 2, *draw(2, FEW, 2, 16, device=device)
    plain = run(attention, *arguments)
    variants = [
        attention,
        torch.compile(attention, fullgraph=True, backend="aot_eager"),
        lambda *inputs: checkpoint(attention, *inputs, use_reentrant=False),
    ]
    for variant in variants:
        again = run(variant, *arguments)
        assert all(torch.equal(plain[name], again[name]) for name in plain)


def test_an_empty_batch_is_fine(device):
    figures = run(attention, 2, *draw(0, FEW, 2, 16, device=device))
    assert figures["dqkv"].shape == (0, FEW, 96) and not bool(figures["dbias"].any())
