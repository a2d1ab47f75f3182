"""Group norm with SiLU, against float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from speed_kernels.group_norm_silu import (
    TILE,
    TILES,
    _group_norm_silu,
    _group_norm_silu_backward,
    group_norm_silu,
    group_norm_silu_reference,
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
Device = torch.device | str
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = ["contiguous", "channels last", "every other row"]


def place(values, layout):
    """The values, lying in memory as said."""
    if layout == "channels last":
        return values.to(memory_format=torch.channels_last)
    if layout == "every other row":
        return values.repeat_interleave(2, dim=2)[:, :, ::2]
    return values.contiguous()


def draw(
    shape=(2, 6, 3, 5),
    dtype=torch.float32,
    layout="contiguous",
    scaled=True,
    device: Device = DEVICE,
):
    """x, weight, bias, scale, shift (or none of them); then the gradient from above."""
    batch, channels = shape[:2]
    generator = torch.Generator().manual_seed(0)
    sizes = (shape, (channels,), (channels,), (batch, 2 * channels), shape)
    x, weight, bias, rows, dy = (torch.randn(size, generator=generator) for size in sizes)
    x = place((2 * x + 3).to(device, dtype), layout)
    modulation = rows.to(device, dtype).chunk(2, dim=1) if scaled else (None, None)
    return (x, weight.to(device), bias.to(device), *modulation), dy.to(device, dtype)


def run(operator, inputs, dy, num_groups=3, dtype=None):
    leaves = [
        t if t is None else (t.detach() if dtype is None else t.to(dtype)).requires_grad_()
        for t in inputs
    ]
    x, *rest = leaves
    y = operator(x, num_groups, *rest)
    given = [leaf for leaf in leaves if leaf is not None]
    names = ["y", "dx", "dweight", "dbias", "dscale", "dshift"][: 1 + len(given)]
    return dict(zip(names, [y, *torch.autograd.grad(y, given, dy.to(y.dtype))], strict=True))


@settings(max_examples=20)
@given(
    batch=st.integers(1, 2),
    groups=st.integers(1, 3),
    width=st.integers(1, 5),
    size=st.tuples(st.integers(1, 9), st.integers(2, 9)),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(LAYOUTS),
    scaled=st.booleans(),
)
def test_matches_float64_as_well_as_eager_does(
    batch, groups, width, size, dtype, layout, scaled, assert_accurate
):
    inputs, dy = draw((batch, groups * width, *size), dtype, layout, scaled)
    truth = run(group_norm_silu_reference, inputs, dy, groups, torch.float64)
    eager, fused = (
        run(f, inputs, dy, groups) for f in (group_norm_silu_reference, group_norm_silu)
    )
    for name in truth:
        assert fused[name].dtype == eager[name].dtype
        assert_accurate(name, fused[name], eager[name], truth[name])


@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_sums_over_many_chunks_and_blocks_of_channels_are_right(layout, assert_accurate):
    """More channels than a tile and more positions than a program, neither a multiple."""
    shape = (1, 72, 1, TILES * TILE // 64 + 5) if layout != "contiguous" else (1, 4, 2, 4100)
    inputs, dy = draw(shape, torch.bfloat16, layout)
    truth = run(group_norm_silu_reference, inputs, dy, 2, torch.float64)
    eager, fused = (run(f, inputs, dy, 2) for f in (group_norm_silu_reference, group_norm_silu))
    for name in truth:
        assert_accurate(name, fused[name], eager[name], truth[name])


def test_how_the_sums_are_split_does_not_matter(monkeypatch):
    """Many chunks of few positions, and more of them than are added at a time."""
    from speed_kernels import group_norm_silu as module

    inputs, dy = draw((2, 6, 5, 5))
    whole = run(group_norm_silu, inputs, dy)
    monkeypatch.setattr(module, "TILES", 1)
    monkeypatch.setattr(module, "TILE", 4)
    monkeypatch.setattr(module, "PARTIALS", 8)
    for name, value in run(group_norm_silu, inputs, dy).items():
        torch.testing.assert_close(value, whole[name])


@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_a_large_mean_costs_no_accuracy(layout):
    (x, weight, bias, *_), dy = draw((1, 4, 8, 8), layout=layout, scaled=False)
    inputs = (x + 10_000, weight, bias, None, None)
    truth = run(group_norm_silu_reference, inputs, dy, 2, torch.float64)
    fused = run(group_norm_silu, inputs, dy, 2)
    torch.testing.assert_close(fused["y"].double(), truth["y"], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_the_result_lies_in_memory_as_the_input_does(layout):
    (x, weight, bias, *_), dy = draw(layout=layout, scaled=False)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = group_norm_silu(x.requires_grad_(), 3, weight, bias)
    (dx,) = torch.autograd.grad(y, x, dy)
    assert y.stride() == dx.stride() == x.stride()
    assert x.data_ptr() in {t.data_ptr() for t in saved}  # and it was not copied


def test_without_modulation_it_is_that_by_zero():
    (x, weight, bias, *_), _ = draw()
    zero = torch.zeros(2, 6, device=DEVICE)
    assert torch.equal(
        group_norm_silu(x, 3, weight, bias), group_norm_silu(x, 3, weight, bias, zero, zero)
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="the interpreter has one order only")
def test_repeated_calls_give_the_same_bits():
    first, again = (run(group_norm_silu, *draw((2, 6, 9, 9))) for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("scaled", [False, True])
def test_float64_passes_gradcheck(scaled):
    inputs, _ = draw((2, 4, 2, 2), torch.float64, scaled=scaled, device="cpu")
    leaves = [t.detach().double().requires_grad_() for t in inputs if t is not None]
    assert torch.autograd.gradcheck(lambda x, *rest: group_norm_silu(x, 2, *rest), leaves)


@pytest.mark.parametrize(
    "layout, scaled", [("contiguous", True), ("channels last", False), ("every other row", True)]
)
def test_the_operators_are_registered_soundly(layout, scaled):
    inputs, dy = draw(layout=layout, scaled=scaled)
    x, *rest = (t if t is None else t.detach().requires_grad_() for t in inputs)
    torch.library.opcheck(_group_norm_silu, (x, 3, *rest, 1e-5))
    _, mean, rstd = _group_norm_silu(inputs[0], 3, *inputs[1:], 1e-5)
    torch.library.opcheck(_group_norm_silu_backward, (dy, inputs[0], 3, *inputs[1:], mean, rstd))


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_compiles_whole_under_autocast_and_checkpointing(autocast):
    torch._dynamo.reset()
    inner, outer = (torch.nn.Conv2d(6, 6, 3, padding=1).to(DEVICE) for _ in range(2))
    modulate = torch.nn.Linear(4, 12).to(DEVICE)
    norm = torch.nn.GroupNorm(3, 6).to(DEVICE)

    def block(x, condition):
        scale, shift = modulate(condition).chunk(2, dim=1)
        return outer(group_norm_silu(inner(x), 3, norm.weight, norm.bias, scale, shift))

    def step(x, condition, checkpointed):
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=autocast):
            if checkpointed:
                return checkpoint(
                    block, x, condition, use_reentrant=False, preserve_rng_state=False
                )
            return block(x, condition)

    batch = torch.randn(2, 6, 4, 4, device=DEVICE), torch.randn(2, 4, device=DEVICE)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    leaves = [p for module in (inner, outer, modulate, norm) for p in module.parameters()]
    results = [
        torch.autograd.grad(f(*batch, checkpointed).float().square().sum(), leaves)
        for f, checkpointed in ((step, False), (compiled, False), (compiled, True))
    ]
    for other in results[1:]:
        for pair in zip(results[0], other, strict=True):
            torch.testing.assert_close(*pair)


@pytest.mark.parametrize("shape", [(0, 6, 2, 2), (2, 6, 0, 3)])
def test_nothing_to_normalise_is_fine(shape):
    figures = run(group_norm_silu, *draw(shape))
    assert figures["y"].shape == figures["dx"].shape == shape
    assert torch.equal(figures["dweight"], torch.zeros(6, device=DEVICE))
    assert figures["dscale"].shape == (shape[0], 6)


def test_what_cannot_be_launched_is_named():
    (x, weight, bias, _, shift), _ = draw()
    scale = torch.zeros(2, 6, device=DEVICE)
    with pytest.raises(ValueError, match=r"at least one S.*; got torch.float32 \(2, 6\)"):
        group_norm_silu(x[..., 0, 0], 3, weight, bias)
    with pytest.raises(ValueError, match="num_groups=4 does not divide the 6 channels"):
        group_norm_silu(x, 4, weight, bias)
    with pytest.raises(ValueError, match="both scale and shift, or neither"):
        group_norm_silu(x, 3, weight, bias, scale)
    with pytest.raises(ValueError, match=r"scale must be \(2, 6\), floating, there; got .*\(6,\)"):
        group_norm_silu(x, 3, weight, bias, scale[0], shift)
    with pytest.raises(ValueError, match=r"bias must be \(6,\), .*; got .* on meta"):
        group_norm_silu(x, 3, weight, bias.to("meta"))
    with pytest.raises(ValueError, match="weight must be .*; got torch.int64"):
        group_norm_silu(x, 3, weight.long(), bias)
    with pytest.raises(ValueError, match="weight is torch.bfloat16 and bias torch.float32"):
        group_norm_silu(x, 3, weight.bfloat16(), bias)
