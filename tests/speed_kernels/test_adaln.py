"""adaLN and the gated residual sum before it, against float64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from speed_kernels.adaln import (
    MAX_DIM,
    TOKENS_BACKWARD,
    _adaln,
    _gated_residual_adaln,
    adaln,
    adaln_reference,
    gated_residual_adaln,
    gated_residual_adaln_reference,
    stages,
)

# Tokens no multiple of a chunk, D no power of two; small ones make the yardstick a matter of luck.
SHAPES = [(4, 3, 72), (2, 17, 100), (1, 18, 384)]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def draw(shape, dtype, device):
    """x, branch, gate, shift, scale, dx_out, dy."""
    batch, _, dim = shape
    generator = torch.Generator().manual_seed(0)
    sizes = [shape, shape, *[(batch, dim)] * 3, shape, shape]
    return [torch.randn(size, generator=generator).to(device, dtype) for size in sizes]


def run_adaln(operator, tensors, dtype):
    x, _, _, shift, scale, _, dy = (tensor.to(dtype) for tensor in tensors)
    leaves = [tensor.requires_grad_() for tensor in (x, shift, scale)]
    y = operator(*leaves)
    values = [y, *torch.autograd.grad(y, leaves, dy)]
    return dict(zip(["y", "dx", "dshift", "dscale"], values, strict=True))


def run_gated(operator, tensors, dtype):
    *leaves, dx_out, dy = (tensor.to(dtype) for tensor in tensors)
    leaves = [tensor.requires_grad_() for tensor in leaves]
    outputs = operator(*leaves)
    gradients = torch.autograd.grad(outputs, leaves, (dx_out, dy))
    names = ["x_out", "y", "dx", "dbranch", "dgate", "dshift", "dscale"]
    return dict(zip(names, [*outputs, *gradients], strict=True))


@pytest.mark.parametrize(
    "shape, dtype",
    [*((shape, torch.float32) for shape in SHAPES), *((SHAPES[1], half) for half in DTYPES[1:])],
    ids=str,
)
@pytest.mark.parametrize(
    "run, operator, reference",
    [
        (run_adaln, adaln, adaln_reference),
        (run_gated, gated_residual_adaln, gated_residual_adaln_reference),
    ],
    ids=["adaln", "gated"],
)
def test_matches_float64_as_well_as_eager_does(
    run, operator, reference, shape, dtype, device, assert_accurate
):
    tensors = draw(shape, dtype, device)
    truth = run(reference, tensors, torch.float64)
    eager, fused = run(reference, tensors, dtype), run(operator, tensors, dtype)
    for name in truth:
        assert fused[name].dtype == dtype
        assert_accurate(name, fused[name], eager[name], truth[name])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_normalised_is_the_sum_that_is_returned(dtype, device):
    x, branch, gate, shift, scale, *_ = draw((2, 5, 72), dtype, device)
    x_out, y = gated_residual_adaln(x, branch, gate, shift, scale)
    assert torch.equal(y, adaln(x_out, shift, scale))


@settings(max_examples=6)
@given(
    batch=st.integers(1, 2),
    num_tokens=st.sampled_from([1, 7, TOKENS_BACKWARD, TOKENS_BACKWARD + 1]),
    dim=st.sampled_from([24, 40, 72]),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(["dense", "tokens first", "every other element"]),
)
def test_a_linear_layer_leaves_its_bias_gradient(
    batch, num_tokens, dim, dtype, layout, assert_accurate
):
    x, branch, gate, shift, scale, dx_out, dy = draw((batch, num_tokens, dim), dtype, DEVICE)
    if layout == "tokens first":
        branch, dy = (t.transpose(0, 1).contiguous().transpose(0, 1) for t in (branch, dy))
    elif layout == "every other element":
        branch, dy = (t.repeat_interleave(2, dim=2)[..., ::2] for t in (branch, dy))
    bias = torch.linspace(-1, 1, dim).to(DEVICE, dtype)

    def gradients(operator, dtype):
        tensors = [tensor.to(dtype) for tensor in (x, branch, gate, shift, scale, bias)]
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        outputs = operator(*leaves)
        return torch.autograd.grad(outputs, leaves, (dx_out.to(dtype), dy.to(dtype)))

    truth, eager = (
        gradients(gated_residual_adaln_reference, kind) for kind in (torch.float64, dtype)
    )
    fused = gradients(gated_residual_adaln, dtype)
    names = ["dx", "dbranch", "dgate", "dshift", "dscale", "dbias"]
    for name, *values in zip(names, fused, eager, truth, strict=True):
        assert_accurate(name, *values)


def test_the_bias_has_the_gradient_that_the_linear_layer_gives_it(device):
    x, branch, gate, shift, scale, *_ = draw((2, 5, 16), torch.float64, device)
    weight, bias = torch.randn(16, 16, dtype=torch.float64), torch.randn(16, dtype=torch.float64)
    leaves = [tensor.to(device).requires_grad_() for tensor in (weight, bias)]

    def run(weight, bias, deferred):
        product = F.linear(branch, weight, bias.detach() if deferred else bias)
        return gated_residual_adaln(x, product, gate, shift, scale, bias if deferred else None)

    for deferred in (False, True):
        assert torch.autograd.gradcheck(lambda w, b, d=deferred: run(w, b, d), leaves)


@pytest.mark.parametrize("stream", [torch.float32, torch.bfloat16], ids=str)
def test_the_stream_keeps_its_dtype_and_the_norm_has_that_of_the_modulation(
    stream, device, assert_accurate
):
    """As under autocast: branch and modulation in bfloat16, the stream in either."""
    x, branch, gate, shift, scale, dx_out, dy = draw((1, 5, 48), torch.bfloat16, device)
    x, dx_out = x.to(stream), dx_out.to(stream)

    def run(operator, dtype=None):
        tensors = (x, branch, gate, shift, scale)
        leaves = [t.detach() if dtype is None else t.to(dtype) for t in tensors]
        leaves = [leaf.requires_grad_() for leaf in leaves]
        outputs = operator(*leaves)
        upstream = [g.to(y.dtype) for g, y in zip((dx_out, dy), outputs, strict=True)]
        return [*outputs, *torch.autograd.grad(outputs, leaves, upstream)]

    fused, eager = run(gated_residual_adaln), run(gated_residual_adaln_reference)
    truth = run(gated_residual_adaln_reference, torch.float64)
    half = torch.bfloat16
    assert [value.dtype for value in fused] == [stream, half, stream, half, half, half, half]
    for i, values in enumerate(zip(fused, eager, truth, strict=True)):
        assert_accurate(f"value {i}", *values)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="the interpreter has one order only")
def test_two_runs_have_the_same_bits(device):
    tensors = draw((2, 40, 72), torch.bfloat16, device)
    first, second = (run_gated(gated_residual_adaln, tensors, torch.bfloat16) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_recomputing_changes_no_bit(device):
    tensors = draw((1, 5, 32), torch.float32, device)

    def recomputed(*leaves):
        return checkpoint(gated_residual_adaln, *leaves, use_reentrant=False)

    operators = gated_residual_adaln, recomputed
    plain, again = (run_gated(f, tensors, torch.float32) for f in operators)
    assert all(torch.equal(plain[name], again[name]) for name in plain)


def test_modulation_is_read_in_place_from_its_chunks(device):
    x, branch, *_ = draw((2, 3, 32), torch.float32, device)
    modulation = torch.randn(2, 6 * 32, device=device)
    gate, shift, scale, *_ = modulation.chunk(6, dim=1)
    assert not gate.is_contiguous()
    outputs = gated_residual_adaln(x.mT.contiguous().mT, branch, gate, shift, scale)
    expected = gated_residual_adaln(
        x, branch, gate.contiguous(), shift.contiguous(), scale.contiguous()
    )
    assert all(torch.equal(*pair) for pair in zip(outputs, expected, strict=True))


def test_a_gradient_from_one_output_alone_is_enough(device):
    x, branch, gate, shift, scale, *_ = draw((1, 3, 16), torch.float32, device)
    x.requires_grad_()
    for output in range(2):
        gradients = [
            torch.autograd.grad(f(x, branch, gate, shift, scale)[output].square().sum(), x)[0]
            for f in (gated_residual_adaln, gated_residual_adaln_reference)
        ]
        torch.testing.assert_close(*gradients)


def test_float64_passes_gradcheck():
    x, branch, gate, shift, scale, *_ = draw((1, 2, 8), torch.float64, "cpu")
    leaves = [tensor.requires_grad_() for tensor in (x, branch, gate, shift, scale)]
    assert torch.autograd.gradcheck(gated_residual_adaln, leaves)


def test_the_operators_are_registered_soundly(device):
    x, branch, gate, shift, scale, *_ = (
        tensor.requires_grad_() for tensor in draw((1, 2, 16), torch.float32, device)
    )
    torch.library.opcheck(_adaln, (x, shift, scale, 1e-6))
    bias = torch.zeros(16, device=device, requires_grad=True)
    for added in (None, bias):
        torch.library.opcheck(_gated_residual_adaln, (x, branch, gate, shift, scale, added, 1e-6))


def test_compiles_without_graph_breaks(device):
    tensors = draw((1, 3, 32), torch.float32, device)
    compiled = torch.compile(gated_residual_adaln, fullgraph=True, backend="aot_eager")
    plain, traced = (run_gated(f, tensors, torch.float32) for f in (gated_residual_adaln, compiled))
    assert all(torch.equal(plain[name], traced[name]) for name in plain)


def test_an_empty_batch_is_fine(device):
    figures = run_gated(
        gated_residual_adaln, draw((0, 3, 16), torch.float32, device), torch.float32
    )
    assert figures["dgate"].shape == (0, 16) and figures["dx"].shape == (0, 3, 16)


def test_what_cannot_be_launched_is_named():
    x, row = torch.zeros(2, 5, 16), torch.zeros(2, 16)
    with pytest.raises(ValueError, match=r"scale must be \(2, 16\) there; got \(16,\)"):
        adaln(x, row, row[0])
    with pytest.raises(ValueError, match=r"branch must match x, \(2, 5, 16\)"):
        gated_residual_adaln(x, x[:1], row, row, row)
    with pytest.raises(ValueError, match="shift is torch.float32 and scale torch.bfloat16"):
        adaln(x.bfloat16(), row, row.bfloat16())
    with pytest.raises(ValueError, match=r"bias must be \(16,\); got \(5,\)"):
        gated_residual_adaln(x, x, row, row, row, x[0, :, 0])


def test_tokens_wider_than_a_program_holds_go_through_the_reference(device):
    tensors = draw((1, 3, MAX_DIM + 8), torch.float32, device)
    for run, operator, reference in (
        (run_adaln, adaln, adaln_reference),
        (run_gated, gated_residual_adaln, gated_residual_adaln_reference),
    ):
        found, expected = (run(of, tensors, torch.float32) for of in (operator, reference))
        assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("block_d", [128, 2048, 4096])
def test_what_is_read_ahead_fits_the_shared_memory_of_every_gpu(dtype, block_d):
    row = [torch.empty(0, dtype=dtype)] * 4
    ahead = stages(4, *row, block_d=block_d) - 1
    size = 4 * block_d * dtype.itemsize
    assert ahead * size <= 80 * 1024 < 99 * 1024
    assert ahead == 3 or (ahead + 1) * size > 80 * 1024  # as much as fits
