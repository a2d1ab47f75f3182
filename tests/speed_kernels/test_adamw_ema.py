"""AdamW with averages in one sweep, against float64 and PyTorch's own AdamW."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speed_kernels.adamw_ema import BLOCK, _adamw_ema, adamw_ema, adamw_ema_reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPES = [(3, 5), (BLOCK,), (1,), (BLOCK + 7,), (0,), (27, 19)]
NUMBERS: dict[str, Any] = dict(
    learning_rate=1e-2, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1
)


def draw(shapes=SHAPES, horizons=2, dtype=torch.float32):
    """Parameters, gradients, moments, averages and steps of a run that has begun."""
    generator = torch.Generator().manual_seed(0)

    def tensors(scale=1.0):
        values = [scale * torch.randn(shape, generator=generator) for shape in shapes]
        return [value.to(DEVICE, dtype) for value in values]

    p, g, m = tensors(), tensors(), tensors(0.1)
    v = [value.abs() for value in tensors(0.1)]
    averages = [tensors() for _ in range(horizons)]
    return p, g, m, v, averages, torch.full((len(shapes),), 9.0, device=DEVICE)


def run(
    operator, horizons=2, dtype=torch.float32, norm=None, max_norm=1.0, steps=2, shapes=SHAPES
):  # fmt: skip
    """Everything after some updates, as one list, and how many there were."""
    p, g, m, v, averages, counts = draw(shapes, horizons, dtype)
    if norm is None:
        norm = torch.cat([tensor.flatten() for tensor in g]).norm().item()
    decays = [0.9, 0.9999, 0.5][:horizons]
    root = torch.tensor(norm, device=DEVICE)
    for _ in range(steps):
        operator(p, g, m, v, averages, counts, root, max_norm=max_norm, decays=decays, **NUMBERS)
    flat = [tensor for average in averages for tensor in average]
    return [*p, *m, *v, *flat], counts


@settings(max_examples=10)
@given(
    horizons=st.integers(0, 3),
    max_norm=st.sampled_from([0.5, 1e4, float("inf")]),
)
def test_matches_float64_as_well_as_eager_does(horizons, max_norm, assert_accurate):
    options = dict(max_norm=max_norm)
    truth, _ = run(adamw_ema_reference, horizons, torch.float64, **options)
    eager, _ = run(adamw_ema_reference, horizons, **options)
    fused, step = run(adamw_ema, horizons, **options)
    assert step.tolist() == [11] * len(SHAPES)
    for i, tensors in enumerate(zip(fused, eager, truth, strict=True)):
        if tensors[0].numel():
            assert_accurate(i, *tensors)


def test_each_tensor_has_a_count_of_its_own():
    p, g, m, v, _, counts = draw([(3,), (4,)], horizons=0)
    counts[1] = 0
    both = [[tensor.clone() for tensor in group] for group in (p, m, v)]
    norm = torch.tensor(1.0, device=DEVICE)
    options: dict[str, Any] = dict(max_norm=1.0, decays=[], **NUMBERS)
    adamw_ema(both[0], g, both[1], both[2], [], counts.clone(), norm, **options)
    for i in range(2):
        count = counts[i : i + 1].clone()
        adamw_ema([p[i]], [g[i]], [m[i]], [v[i]], [], count, norm, **options)
        assert torch.equal(both[0][i], p[i])


def test_the_reference_is_pytorch_s_adamw_and_lerp():
    p, g, _, _, (average,), step = draw(horizons=1, dtype=torch.float64)
    m, v = ([torch.zeros_like(tensor) for tensor in p] for _ in range(2))
    step.zero_()
    theirs = [tensor.clone().requires_grad_() for tensor in p]
    their_average = [tensor.clone() for tensor in average]
    optimizer = torch.optim.AdamW(
        theirs, lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1, foreach=True
    )
    norm = torch.tensor(3.0, dtype=torch.float64, device=DEVICE)
    for _ in range(3):
        adamw_ema_reference(
            p, g, m, v, [average], step, norm, max_norm=1.5, decays=[0.99], **NUMBERS
        )
        for tensor, gradient in zip(theirs, g, strict=True):
            tensor.grad = gradient * 1.5 / (3 + 1e-6)
        optimizer.step()
        for mean, tensor in zip(their_average, theirs, strict=True):
            mean.lerp_(tensor.detach(), 0.01)
    for ours, other in zip([*p, *average], [*theirs, *their_average], strict=True):
        torch.testing.assert_close(ours, other.detach(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("operator", [adamw_ema, adamw_ema_reference])
@pytest.mark.parametrize("norm", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing(operator, norm):
    after, step = run(operator, norm=norm)
    before, _ = run(operator, steps=0)
    assert step.tolist() == [9] * len(SHAPES)
    assert all(torch.equal(*pair) for pair in zip(after, before, strict=True))


def test_unaligned_tensors_give_the_same_bits():
    p, g, m, v, averages, step = draw([(BLOCK + 7,)], horizons=1)
    buffer = torch.zeros(BLOCK + 8, device=DEVICE)
    buffer[1:] = g[0]
    shifted = buffer[1:]
    assert shifted.data_ptr() % 16
    norm = torch.tensor(1.0, device=DEVICE)
    adamw_ema(p, [shifted], m, v, averages, step, norm, max_norm=1.0, decays=[0.9], **NUMBERS)
    aligned, _ = run(adamw_ema, 1, norm=1.0, steps=1, shapes=[(BLOCK + 7,)])
    for ours, other in zip([*p, *m, *v, *averages[0]], aligned, strict=True):
        assert torch.equal(ours, other)


def test_the_operator_is_registered_soundly():
    p, g, m, v, averages, step = draw([(5,), (2, 3)], horizons=1)
    numbers = [1e-2, 0.9, 0.999, 1e-8, 0.1, 1.0, 0.99]
    norm = torch.tensor(1.0, device=DEVICE)
    torch.library.opcheck(_adamw_ema, (p, g, m, v, averages[0], step, norm, numbers))


def test_no_parameters_are_fine():
    adamw_ema(
        [], [], [], [], [], torch.zeros(0), torch.tensor(1.0), max_norm=1.0, decays=[], **NUMBERS
    )


def test_what_cannot_be_updated_is_named():
    def call(p, g, averages=(), decays=(), steps=None):
        zeros = [torch.zeros_like(tensor) for tensor in p]
        steps = torch.zeros(len(p)) if steps is None else steps
        state = (p, g, zeros, zeros, averages, steps, torch.tensor(1.0))
        adamw_ema(*state, max_norm=1.0, decays=decays, **NUMBERS)

    one = torch.zeros(3, 4)
    with pytest.raises(ValueError, match="1 parameters but 2 gradients"):
        call([one], [one, one])
    with pytest.raises(
        ValueError, match=r"gradients\[0\] must be contiguous torch.float32 \(3, 4\)"
    ):
        call([one], [torch.zeros(4, 3).mT])
    with pytest.raises(ValueError, match=r"parameters\[0\] .*; got torch.bfloat16"):
        call([one.bfloat16()], [one])
    with pytest.raises(ValueError, match=r"steps must be \(1,\)"):
        call([one], [one], steps=torch.zeros(()))
    with pytest.raises(ValueError, match=r"on meta; got torch.float32 \(3, 4\) on cpu"):
        call([one], [one], steps=torch.zeros(1, device="meta"))
    with pytest.raises(ValueError, match="1 lists of averages but 0 decays"):
        call([one], [one], averages=[[one]])
