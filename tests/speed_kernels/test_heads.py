"""Heads of a projection, whose gradients return to it in one pass."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from speed_kernels.heads import ROWS, TILE_COLUMNS, _pack_heads, split_heads, split_heads_reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def draw(batch: int, tokens: int, num_heads: int, width: int, dtype=torch.float32, device=DEVICE):
    """qkv, bias, and the gradients of q, k, v."""
    generator = torch.Generator().manual_seed(0)
    packed = 3 * num_heads * width
    sizes = [(batch, tokens, packed), (packed,), *[(batch, num_heads, tokens, width)] * 3]
    qkv, bias, *upstream = (
        torch.randn(size, generator=generator).to(device, dtype) for size in sizes
    )
    return qkv, bias, upstream


def run(operator, num_heads, qkv, bias, upstream, dtype=None):
    qkv, bias = (t.detach().to(dtype or t.dtype).requires_grad_() for t in (qkv, bias))
    outputs = operator(qkv, num_heads, bias)
    gradients = torch.autograd.grad(outputs, (qkv, bias), [g.to(qkv.dtype) for g in upstream])
    return dict(zip(["q", "k", "v", "dqkv", "dbias"], [*outputs, *gradients], strict=True))


@settings(max_examples=12)
@given(
    batch=st.integers(1, 2),
    tokens=st.sampled_from([1, 5, ROWS // 2, ROWS + 1]),
    num_heads=st.sampled_from([1, 3]),
    width=st.sampled_from([5, 8, TILE_COLUMNS // 3 + 4]),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(["heads first", "tokens first"]),
)
def test_matches_float64_as_well_as_eager_does(
    batch, tokens, num_heads, width, dtype, layout, assert_accurate
):
    qkv, bias, upstream = draw(batch, tokens, num_heads, width, dtype)
    if layout == "tokens first":
        upstream = [g.transpose(1, 2).contiguous().transpose(1, 2) for g in upstream]
    truth = run(split_heads_reference, num_heads, qkv, bias, upstream, torch.float64)
    eager = run(split_heads_reference, num_heads, qkv, bias, upstream)
    fused = run(split_heads, num_heads, qkv, bias, upstream)
    for name in ("q", "k", "v", "dqkv"):  # moved, not computed
        assert torch.equal(fused[name], eager[name])
    assert_accurate("dbias", fused["dbias"], eager["dbias"], truth["dbias"])


def test_queries_keys_and_values_are_views(device):
    qkv, bias, _ = draw(2, 3, 4, 8, device=device)
    for tensor in split_heads(qkv, 4, bias):
        assert tensor.untyped_storage().data_ptr() == qkv.untyped_storage().data_ptr()
    row = qkv[1, 2].view(3, 4, 8)
    q, k, v = split_heads(qkv, 4, bias)
    assert all(torch.equal(part[1, :, 2], row[i]) for i, part in enumerate((q, k, v)))


def test_the_bias_has_the_gradient_that_the_linear_layer_gives_it():
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (
        torch.randn(size, generator=generator, dtype=torch.float64).requires_grad_()
        for size in ((2, 3, 4), (12, 4), (12,))
    )

    def attended(x, weight, bias):
        q, k, v = split_heads(F.linear(x, weight, bias.detach()), 2, bias)
        return F.scaled_dot_product_attention(q, k, v)

    assert torch.autograd.gradcheck(attended, (x, weight, bias))


def test_a_gradient_from_one_output_alone_is_enough(device):
    qkv, bias, _ = draw(2, 3, 2, 8, device=device)
    qkv.requires_grad_()
    for i in range(3):
        gradients = [
            torch.autograd.grad(f(qkv, 2, bias)[i].square().sum(), qkv)[0]
            for f in (split_heads, split_heads_reference)
        ]
        assert torch.equal(*gradients)


def test_the_operator_is_registered_soundly(device):
    dq, dk, dv = torch.randn(3, 2, 5, 16, device=device).unbind()
    torch.library.opcheck(_pack_heads, (dq, dk, dv))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiling_recomputing_and_repeating_change_no_bit(dtype, device):
    arguments = 2, *draw(2, 5, 2, 8, dtype=dtype, device=device)
    plain = run(split_heads, *arguments)
    variants = [
        split_heads,
        torch.compile(split_heads, fullgraph=True, backend="aot_eager"),
        lambda *inputs: checkpoint(split_heads, *inputs, use_reentrant=False),
    ]
    for variant in variants:
        again = run(variant, *arguments)
        assert all(torch.equal(plain[name], again[name]) for name in plain)


def test_an_empty_batch_is_fine(device):
    figures = run(split_heads, 2, *draw(0, 3, 2, 8, device=device))
    assert figures["dqkv"].shape == (0, 3, 48) and not bool(figures["dbias"].any())


def test_what_does_not_divide_is_named():
    with pytest.raises(ValueError, match=r"must be \(B, N, 3 H K\) with H=5; got \(2, 3, 48\)"):
        split_heads(torch.zeros(2, 3, 48), 5)
    with pytest.raises(ValueError, match=r"bias must be \(48,\); got \(16,\)"):
        split_heads(torch.zeros(2, 3, 48), 2, torch.zeros(16))
