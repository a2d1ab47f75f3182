"""Muon against its definition in float64, matrix by matrix."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from speed_engine.build import build_model
from speed_engine.config import TrainConfig
from speed_engine.models.config import DiTConfig, EdmUNetConfig, MDTConfig, ModelConfig, UNetConfig
from speed_engine.models.edm_unet import DhariwalUNet
from speed_engine.models.families import Shape, build_network
from speed_engine.models.layers.edm_block import EdmBlock
from speed_engine.models.layers.fused import ONE, FusedLinear, Maps, holding
from speed_engine.models.layers.unet_layers import AttentionBlock
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
    # A singular value of 1 grows by a thousand times what it is off, here by a margin of 2.4e-7.
    assert (in_float32 - expected).norm() < 5e-4 * expected.norm()


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (1, 200), (5, 3), (32, 48)])
def test_rounding_does_not_lead_beyond_where_the_quintics_are_near_one(shape):
    """The norm of a matrix of rank one is a singular value: from 1.002 on it would end at 9."""
    generator = torch.Generator().manual_seed(0)
    rows, columns = (torch.randn(300, n, 1, generator=generator) for n in shape)
    sizes = torch.logspace(-2, 2, 300)[:, None, None]
    matrices = (sizes * rows @ columns.mT).bfloat16()
    values = torch.linalg.matrix_norm(orthogonal(matrices).float(), 2)
    assert 0.35 < values.min() and values.max() < 1.3


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
        layers = nn.ModuleList([FusedLinear(4, 12, 3), nn.Linear(12, 4), nn.Conv2d(4, 6, 3)])
        layers.append(holding(Maps((2, 3, -1), axis=1), nn.Conv1d(4, 12, 1)))
        layers.append(holding(Maps((-1, 3), axis=1), nn.Conv2d(4, 12, 1)))
        self.blocks = nn.ModuleList([layers])
        self.head = nn.Linear(4, 4)


# Of each hidden matrix of the net, the rows of each map.
ROWS = [
    [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]],
    [[0, 1, 2, 3]],
    [[0, 1, 2, 3, 4, 5]],
    [[0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11]],
    [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8, 11]],
]


def gradients(net: Net, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in net.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("elements", [1, 2**26])
def test_steps_are_those_of_the_definition(elements, monkeypatch):
    monkeypatch.setattr(muon, "BATCH_ELEMENTS", elements)
    net, rate, momentum, decay = Net(), 0.1, 0.9, 0.5
    weights = list(hidden_matrices(net))
    optimizer = Muon(weights, lr=rate, momentum=momentum, weight_decay=decay)
    expected = {weight: weight.detach().double() for weight, _ in weights}
    buffers = {weight: torch.zeros_like(value) for weight, value in expected.items()}
    for seed in range(3):
        gradients(net, seed)
        optimizer.step()
        for weight, maps in zip(expected, ROWS, strict=True):
            assert weight.grad is not None
            gradient = weight.grad.double()
            buffers[weight] = momentum * buffers[weight] + (1 - momentum) * gradient
            ahead = ((1 - momentum) * gradient + momentum * buffers[weight]).flatten(1)
            update = torch.full_like(ahead, torch.nan)
            for rows in maps:
                size = 0.2 * max(len(rows), ahead.shape[1]) ** 0.5
                update[rows] = size * reference(ahead[rows])
            shrunk = (1 - rate * decay) * expected[weight]
            expected[weight] = shrunk - rate * update.view_as(weight)
            torch.testing.assert_close(weight.double(), expected[weight], atol=1e-5, rtol=1e-4)


def test_weights_with_channels_last_are_updated_alike():
    ends = []
    for layout in (torch.contiguous_format, torch.channels_last):
        net = Net().to(memory_format=layout)
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.fill_(1.0)
        optimizer = Muon(list(hidden_matrices(net)), lr=0.1, weight_decay=0.5)
        for seed in range(2):
            gradients(net, seed)
            for parameter in net.parameters():  # as autograd leaves them
                assert parameter.grad is not None
                parameter.grad = torch.empty_like(parameter).copy_(parameter.grad)
            optimizer.step()
        ends.append([parameter.detach().contiguous() for parameter in net.parameters()])
    for ordinary, last in zip(*ends, strict=True):
        torch.testing.assert_close(last, ordinary)


class Launches(TorchDispatchMode):
    """Counts operators that compute; views and allocations launch nothing on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += not function.is_view and "empty" not in function.name()
        return function(*args, **(kwargs or {}))


def launches_of_a_step(matrices: int, shape: tuple[int, int]) -> int:
    weights = [nn.Parameter(torch.ones(shape)) for _ in range(matrices)]
    for weight in weights:
        weight.grad = torch.ones(shape)
    optimizer = Muon([(weight, ONE) for weight in weights], lr=0.1)
    with Launches() as launches:
        optimizer.step()
    return launches.count


@pytest.mark.parametrize("shape", [(4, 8), (8, 4)])
def test_another_matrix_of_a_shape_costs_no_launch(monkeypatch, shape):
    monkeypatch.setitem(muon.COMPUTE_DTYPES, "cpu", torch.bfloat16)
    assert launches_of_a_step(5, shape) == launches_of_a_step(2, shape)


def test_only_the_products_are_in_the_type_of_products(monkeypatch):
    monkeypatch.setitem(muon.COMPUTE_DTYPES, "cpu", torch.bfloat16)
    weight = nn.Parameter(torch.ones(8, 4))
    (update,) = Muon([(weight, ONE)], lr=0.1)._orthogonal([weight], [torch.ones(8, 4)])
    assert update.dtype == torch.float32
    assert update.stride() == weight.stride()  # as fused optimizers ask on CUDA
    assert torch.equal(update, update.bfloat16().float())  # they were


def test_the_update_has_the_size_of_adamws():
    weight = nn.Parameter(torch.zeros(64, 256))
    weight.grad = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    Muon([(weight, ONE)], lr=1.0).step()
    assert float(weight.detach().square().mean().sqrt()) == pytest.approx(0.2, rel=0.2)


ATTENTION = {"qkv": 3, "proj_out": 1}
TRANSFORMER = {"proj_in": 1, "proj_out": 1} | {
    f"transformer_blocks.0.{name}": 2 if name == "ff.net.0.proj" else 1
    for name in (
        *(f"attn{i}.to_{letter}" for i in (1, 2) for letter in ("q", "k", "v", "out.0")),
        "ff.net.0.proj", "ff.net.2",
    )
}  # fmt: skip
DIT = {"attn.qkv": 3, "attn.proj": 1, "mlp.fc1": 1, "mlp.fc2": 1, "adaLN_modulation.1": 6}
MODERN = {"attn.qkv": 3, "attn.proj": 1, "mlp.w12": 2, "mlp.w3": 1, "adaLN_modulation.1": 6}
TEXT_DIT = DIT | {"cross_attn.q": 1, "cross_attn.kv": 2, "cross_attn.proj": 1}
MERGING = DIT | {"skip_linear": 1}


def unet(attention: dict[str, int], modulated: bool = False) -> dict[str, dict[str, int]]:
    """With blocks whose t is added and convolutions that resample, or as ADM has both."""
    same = {"in_layers.2": 1, "emb_layers.1": 2 if modulated else 1, "out_layers.3": 1}
    other = same | {"skip_connection": 1}
    return {
        "input_blocks.1.0": same,
        "input_blocks.2.0": same if modulated else {"op": 1},
        "input_blocks.3.0": other, "input_blocks.3.1": attention,
        "middle_block.0": same, "middle_block.1": attention, "middle_block.2": same,
        "output_blocks.0.0": other, "output_blocks.0.1": attention,
        "output_blocks.1.0": other, "output_blocks.1.1": attention,
        "output_blocks.1.2": same if modulated else {"conv": 1},
        "output_blocks.2.0": other,
        "output_blocks.3.0": other,
    }  # fmt: skip


def edm(affine: int, skips_resampled: bool, attends_up: bool) -> dict[str, dict[str, int]]:
    same = {"conv0": 1, "affine": affine, "conv1": 1}
    other, attention = same | {"skip": 1}, {"qkv": 3, "proj": 1}
    resampled = other if skips_resampled else same
    return {
        "enc.8x8_block0": same,
        "enc.4x4_down": resampled, "enc.4x4_block0": other | attention,
        "dec.4x4_in0": same | attention, "dec.4x4_in1": same,
        "dec.4x4_block0": other | attention if attends_up else other,
        "dec.4x4_block1": other | attention,
        "dec.8x8_up": resampled, "dec.8x8_block0": other, "dec.8x8_block1": other,
    }  # fmt: skip


SMALL: dict[str, Any] = {"dim": 16, "depth": 2, "num_heads": 2}
ADM: dict[str, Any] = {"scale_shift_norm": True, "resblock_updown": True, "num_heads": 2}
# Of every network: its configuration, what it is conditioned on, how many maps each matrix holds.
NETWORKS: dict[str, tuple[ModelConfig, dict[str, Any], dict[str, dict[str, int]]]] = {
    "DiT": (DiTConfig(**SMALL), {"num_classes": 5}, {"blocks.0": DIT, "blocks.1": DIT}),
    "modern DiT": (
        DiTConfig(**SMALL, variant="modern"), {}, {"blocks.0": MODERN, "blocks.1": MODERN},
    ),
    "text DiT": (
        DiTConfig(**SMALL), {"token_dim": 6}, {"blocks.0": TEXT_DIT, "blocks.1": TEXT_DIT},
    ),
    "MDT": (
        MDTConfig(**SMALL, decode_layers=1), {"num_classes": 5},
        {"blocks.0": DIT, "blocks.1": DIT, "sideblocks.0": DIT},
    ),
    "MDTv2": (
        MDTConfig(version=2, dim=16, depth=3, num_heads=2, decode_layers=1), {"num_classes": 5},
        {
            "en_inblocks.0": DIT, "en_outblocks.0": MERGING, "de_blocks.0": MERGING,
            "sideblocks.0": DIT,
        },
    ),
    "UNet": (UNetConfig(), {"num_classes": 5}, unet(ATTENTION)),
    "UNet of ADM": (UNetConfig(**ADM), {"num_classes": 5}, unet(ATTENTION, modulated=True)),
    "UNet of texts": (UNetConfig(), {"token_dim": 6}, unet(TRANSFORMER)),
    "SongUNet": (
        EdmUNetConfig(attention_resolutions=(4,)), {"num_classes": 5}, edm(1, True, False),
    ),
    "DhariwalUNet": (
        EdmUNetConfig(network="adm", model_channels=64, attention_resolutions=(4,)),
        {"num_classes": 5}, edm(2, False, True),
    ),
}  # fmt: skip


@pytest.mark.parametrize("low_channels", [None, 1], ids=["plain", "super-resolution"])
@pytest.mark.parametrize("network", NETWORKS)
def test_ends_embeddings_norms_and_biases_are_left_to_adamw(network, low_channels):
    settings, conditions, expected = NETWORKS[network]
    with torch.device("meta"):
        model = build_network(settings, Shape((8, 8), 1, low_channels=low_channels, **conditions))
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    found = [(names[weight], maps.sizes[maps.axis]) for weight, maps in hidden_matrices(model)]
    prefix = "" if low_channels is None else "model."
    assert len(found) == len(dict(found))
    assert dict(found) == {
        f"{prefix}{block}.{name}.weight": count
        for block, matrices in expected.items()
        for name, count in matrices.items()
    }


@pytest.mark.parametrize(
    "model",
    [
        DiTConfig(size="DiT-S/2-modern"),
        MDTConfig(size="MDT-S/2"),
        UNetConfig(size="adm-64"),
        EdmUNetConfig(size="adm-cifar10"),
    ],
)
def test_the_maps_of_a_published_size_are_whole(model):
    with torch.device("meta"):
        weights = list(hidden_matrices(build_model(TrainConfig(model=model))))
    assert any(maps != ONE for _, maps in weights)
    for weight, maps in weights:
        rows = weight.flatten(1)
        assert maps.together(maps.apart(rows)).shape == rows.shape


@pytest.mark.parametrize("kind", ["UNet", "DhariwalUNet"])
def test_queries_keys_and_values_of_a_u_net_are_updated_as_three_matrices(kind):
    torch.manual_seed(0)
    if kind == "UNet":
        block, numbers = AttentionBlock(64, 4), torch.arange(192).view(4, 3, 16)
    else:
        block = EdmBlock(64, 64, 8, DhariwalUNet.style, 0.0, attention=True)
        numbers = torch.arange(192).view(1, 64, 3).mT  # one head; rows of q, k and v in turn
    found = hidden_matrices(nn.Sequential(nn.ModuleList([block])))
    ((fused, maps),) = [(weight, maps) for weight, maps in found if len(weight) == 192]
    fused.grad = torch.randn_like(fused)
    separate = []
    for rows in numbers.unbind(1):
        weight = nn.Parameter(fused.detach().flatten(1)[rows.flatten()])
        weight.grad = fused.grad.flatten(1)[rows.flatten()]
        separate.append((rows.flatten(), weight))
    Muon([(fused, maps)], lr=0.1).step()
    Muon([(weight, ONE) for _, weight in separate], lr=0.1).step()
    for rows, weight in separate:
        torch.testing.assert_close(fused.detach().flatten(1)[rows], weight.detach())


@pytest.mark.parametrize(
    "shape, maps",
    [
        ((24, 8), Maps((3, -1), axis=0)),
        ((8, 24), ONE),
        ((6, 4, 3, 3), ONE),
        ((24, 8, 1), Maps((2, 3, -1), axis=1)),
    ],
)
def test_the_cost_is_that_of_the_products(shape, maps):
    weight = nn.Parameter(torch.zeros(shape))
    weight.grad = torch.ones(shape)
    optimizer = Muon([(weight, maps)], lr=1.0)
    with FlopCounterMode(display=False) as counter:
        optimizer.step()
    assert muon.step_flops(weight, maps) == counter.get_total_flops()


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.long)])
def test_processes_train_as_one_in_every_layout_and_skip_together(processes, size):
    said = processes(Path(__file__).with_name("sharded_muon.py"), size)
    found = dict(map(json.loads, said.splitlines()))
    assert list(found) == ["ddp", "fsdp", "hsdp"]
    for layout, ranks in found.items():
        assert all(difference <= 2e-5 for difference, _ in ranks), (layout, ranks)
        assert [skipped for _, skipped in ranks] == [1] * size, layout
