"""Muon against its definition in float64, matrix by matrix."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from speed_engine.build import build_model
from speed_engine.config import TrainConfig
from speed_engine.models.config import DiTConfig, MDTConfig
from speed_engine.models.layers.fused_linear import FusedLinear
from speed_engine.training import muon
from speed_engine.training.muon import Muon, hidden_matrices, orthogonal


def reference(update: Tensor) -> Tensor:
    """One float64 matrix: steps on its singular values alone, which is what they mean."""
    u, values, v = torch.linalg.svd(update, full_matrices=False)
    values = values / (values.norm() + 1e-7)
    narrow = [(8.0934, -23.6205, 17.4462), (3.6366, -2.7219, 0.5365), (2.6613, -1.9772, 0.4526)]
    for a, b, c in narrow if len(values) <= 128 else [(3.4445, -4.7750, 2.0315)] * 5:
        values = a * values + b * values**3 + c * values**5
    return u * values @ v


SHAPES = [(1, 1), (1, 7), (7, 1), (5, 5), (12, 5), (5, 12), (128, 200), (129, 130)]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_products_change_singular_values_alone(shape):
    matrices = torch.randn(
        3, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    expected = torch.stack([reference(matrix) for matrix in matrices])
    torch.testing.assert_close(orthogonal(matrices), expected, atol=1e-6, rtol=1e-5)
    in_float32 = orthogonal(matrices.float()).double()
    assert (in_float32 - expected).norm() < 1e-4 * expected.norm()


def values_after(quintics: tuple[muon.Quintic, ...], values: Tensor) -> Tensor:
    for a, b, c in quintics:
        values = a * values + b * values**3 + c * values**5
    return values


def test_singular_values_come_near_one():
    wide = values_after(muon.STEEP, torch.logspace(-2.7, 0, 1000, dtype=torch.float64))
    assert 0.65 < wide.min() and wide.max() < 1.25
    narrow = values_after(muon.NEAREST, torch.logspace(-2, 0, 1000, dtype=torch.float64))
    assert (narrow - 1).abs().max() < 0.271


def test_the_quintics_of_narrow_matrices_are_those_of_least_error():
    """As Chebyshev has it: the largest distance from 1 is reached, with signs in turn, at one place
    more than there are coefficients.
    """
    of = torch.linspace(0.01, 1, 20_001, dtype=torch.float64)
    for quintic in muon.NEAREST:
        distances = values_after((quintic,), of) - 1
        largest = float(distances.abs().max())
        peaks = distances[(distances.abs() - largest).abs() < 5e-3 * largest].sign()
        assert peaks.unique_consecutive().tolist() == [-1, 1, -1, 1]
        of = torch.linspace(1 - largest, 1 + largest, 20_001, dtype=torch.float64)


def test_zeros_stay_zeros():
    assert torch.equal(orthogonal(torch.zeros(2, 3, 4)), torch.zeros(2, 3, 4))


class Net(nn.Module):
    """A block with maps of several kinds; the head is no hidden matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            [nn.ModuleList([FusedLinear(4, 12, 3), nn.Linear(12, 4), nn.Conv2d(4, 6, 3)])]
        )
        self.head = nn.Linear(4, 4)


def gradients(net: Net, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in net.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("elements", [1, 2**26])
def test_steps_are_those_of_the_definition(elements, monkeypatch):
    monkeypatch.setattr(muon, "BATCH_ELEMENTS", elements)
    net, rate, momentum, decay = Net(), 0.1, 0.9, 0.5
    weights = list(hidden_matrices(net))
    assert [parts for _, parts in weights] == [3, 1, 1]
    optimizer = Muon(weights, lr=rate, momentum=momentum, weight_decay=decay)
    expected = {weight: weight.detach().double() for weight, _ in weights}
    buffers = {weight: torch.zeros_like(value) for weight, value in expected.items()}
    for seed in range(3):
        gradients(net, seed)
        optimizer.step()
        for weight, parts in weights:
            assert weight.grad is not None
            gradient = weight.grad.double()
            buffers[weight] = momentum * buffers[weight] + (1 - momentum) * gradient
            ahead = (1 - momentum) * gradient + momentum * buffers[weight]
            maps = ahead.flatten(1).chunk(parts)
            size = 0.2 * max(maps[0].shape) ** 0.5
            update = torch.cat([size * reference(each) for each in maps]).view_as(weight)
            expected[weight] = (1 - rate * decay) * expected[weight] - rate * update
            torch.testing.assert_close(weight.double(), expected[weight], atol=1e-5, rtol=1e-4)


class Launches(TorchDispatchMode):
    """Counts operators that compute; views and allocations launch nothing on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += not function.is_view and "empty" not in function.name()
        return function(*args, **(kwargs or {}))


def launches_of_a_step(matrices: int) -> int:
    weights = [nn.Parameter(torch.ones(4, 8)) for _ in range(matrices)]
    for weight in weights:
        weight.grad = torch.ones(4, 8)
    optimizer = Muon([(weight, 1) for weight in weights], lr=0.1)
    with Launches() as launches:
        optimizer.step()
    return launches.count


def test_another_matrix_of_a_shape_costs_two_launches(monkeypatch):
    """Its gradient is let through or not, and its momentum follows it; all else is together."""
    monkeypatch.setitem(muon.COMPUTE_DTYPES, "cpu", torch.bfloat16)
    assert launches_of_a_step(5) - launches_of_a_step(2) == 3 * 2


def test_only_the_products_are_in_the_type_of_products(monkeypatch):
    monkeypatch.setitem(muon.COMPUTE_DTYPES, "cpu", torch.bfloat16)
    weight = nn.Parameter(torch.ones(4, 8))
    (update,) = Muon([(weight, 1)], lr=0.1)._orthogonal([weight], [torch.ones(4, 8)])
    assert update.dtype == torch.float32
    assert torch.equal(update, update.bfloat16().float())  # they were


def test_the_update_has_the_size_of_adamws():
    weight = nn.Parameter(torch.zeros(64, 256))
    weight.grad = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    Muon([(weight, 1)], lr=1.0).step()
    assert float(weight.detach().square().mean().sqrt()) == pytest.approx(0.2, rel=0.2)


def test_embeddings_heads_norms_and_biases_are_left_to_adamw():
    model = build_model(TrainConfig(model=DiTConfig(dim=16, depth=2, num_heads=2)))
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    found = [(names[weight], parts) for weight, parts in hidden_matrices(model)]
    kinds = (
        ("attn.qkv", 3), ("attn.proj", 1), ("mlp.fc1", 1), ("mlp.fc2", 1),
        ("adaLN_modulation.1", 6),
    )  # fmt: skip
    assert found == [(f"blocks.{i}.{name}.weight", n) for i in range(2) for name, n in kinds]


@pytest.mark.parametrize("model", [DiTConfig(size="DiT-S/2-modern"), MDTConfig(size="MDT-S/2")])
def test_the_parts_of_a_fused_weight_are_whole(model):
    with torch.device("meta"):
        weights = list(hidden_matrices(build_model(TrainConfig(model=model))))
    assert any(parts > 1 for _, parts in weights)
    assert all(len(weight) % parts == 0 for weight, parts in weights)


@pytest.mark.parametrize("shape, parts", [((24, 8), 3), ((8, 24), 1), ((6, 4, 3, 3), 1)])
def test_the_cost_is_that_of_the_products(shape, parts):
    weight = nn.Parameter(torch.zeros(shape))
    weight.grad = torch.ones(shape)
    optimizer = Muon([(weight, parts)], lr=1.0)
    with FlopCounterMode(display=False) as counter:
        optimizer.step()
    assert muon.step_flops(weight, parts) == counter.get_total_flops()
