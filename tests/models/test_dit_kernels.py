"""A transformer whose blocks run on kernels answers and learns as one on PyTorch does."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from speed_engine.models.dit import Block, DiT
from speed_engine.models.layers import attention, feed_forward, open_sum
from speed_engine.models.layers.open_sum import OpenSum
from speed_engine.models.mdt import MDT, MDTv2
from speed_engine.ops import ALL_KERNELS, BLOCK_FUSED, BLOCK_REFERENCE, NO_KERNELS

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DIM, SIZE = 32, (4, 6)


@pytest.fixture
def kernels(monkeypatch):
    """Choose what blocks run on, whatever the device."""

    def choose(operators):
        for module in (attention, feed_forward, open_sum):
            monkeypatch.setattr(module, "block_operators_for", lambda device: operators)
        families = ALL_KERNELS if operators is BLOCK_FUSED else NO_KERNELS
        monkeypatch.setattr(attention, "kernels_on", lambda device: families)

    return choose


def trained(module: nn.Module) -> nn.Module:
    """Away from gates and biases of zero, which leave little to compare."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        if not bool(parameter.any()):
            nn.init.normal_(parameter, std=0.1, generator=generator)
    return module.to(DEVICE)


def make_model(**options) -> nn.Module:
    torch.manual_seed(0)
    shape = {"input_size": SIZE, "num_heads": 4} | options
    return trained(DiT(channels=3, patch_size=2, dim=DIM, depth=2, num_classes=5, **shape))


def step(model, autocast: bool = False, call=None, size=SIZE) -> dict[str, torch.Tensor]:
    """Answer and all gradients."""
    model.zero_grad()
    dtype = next(model.parameters()).dtype
    result = answer(model if call is None else call, autocast, dtype, size)
    result.to(torch.promote_types(result.dtype, torch.float32)).square().sum().backward()
    return {"answer": result.detach()} | {name: p.grad for name, p in model.named_parameters()}


def answer(model, autocast: bool, dtype: torch.dtype = torch.float32, size=SIZE) -> torch.Tensor:
    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    t, labels = torch.tensor([0, 500], device=DEVICE), torch.tensor([4, 5], device=DEVICE)
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=autocast):
        return model(x, t, labels)


@pytest.mark.parametrize(
    "autocast, stream",
    [(False, None), (True, torch.bfloat16)],
    ids=["float32", "autocast, bfloat16 stream"],
)
def test_answer_and_gradients_are_those_of_the_reference(autocast, stream, kernels):
    model = make_model(residual_dtype=stream)
    kernels(BLOCK_REFERENCE)
    truth, expected = step(make_model().double()), step(model, autocast)
    kernels(BLOCK_FUSED)
    actual = step(model, autocast)
    assert actual.keys() == expected.keys() == truth.keys()
    assert_as_exact(actual, expected, truth)


@pytest.mark.parametrize("version, depth", [(MDT, 3), (MDTv2, 4)])
def test_answers_with_and_without_a_mask_are_those_of_the_reference(version, depth, kernels):
    torch.manual_seed(0)
    options = {"dim": DIM, "depth": depth, "num_heads": 4, "decode_layers": 2, "num_classes": 5}
    network = version(input_size=SIZE, channels=3, patch_size=2, **options)
    size, generator = (2, network.mask_words), torch.Generator().manual_seed(0)
    draws = torch.randint(2**32, size, generator=generator).to(DEVICE)
    model = trained(network)
    exact = copy.deepcopy(model).double()

    def both(network):
        return lambda *inputs: network(*inputs) + network(*inputs, draws)

    kernels(BLOCK_REFERENCE)
    truth, expected = step(exact, call=both(exact)), step(model, True, both(model))
    kernels(BLOCK_FUSED)
    assert_as_exact(step(model, True, both(model)), expected, truth)


def assert_as_exact(actual, expected, truth):
    """No farther from the truth than twice what is expected."""
    for name, value in truth.items():
        error, eager = ((v[name].double() - value).norm() for v in (actual, expected))
        assert error <= 2 * eager + 1e-6 * value.norm(), name


def test_attention_of_64_tokens_has_a_gradient_of_its_own(kernels, monkeypatch):
    from speed_kernels import attention as kernel

    calls = []
    original = kernel._attention_backward
    monkeypatch.setattr(
        kernel, "_attention_backward", lambda *inputs: calls.append(1) or original(*inputs)
    )
    size, options = (16, 16), {"input_size": (16, 16), "num_heads": 2}
    model = make_model(**options)
    kernels(BLOCK_REFERENCE)
    truth = step(make_model(**options).double(), size=size)
    expected = step(model, autocast=True, size=size)
    assert not calls
    kernels(BLOCK_FUSED)
    actual = step(model, autocast=True, size=size)
    assert len(calls) == 2  # blocks
    assert_as_exact(actual, expected, truth)


@pytest.mark.long
def test_one_graph_holds_the_whole_model(kernels):
    kernels(BLOCK_FUSED)
    model = make_model()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    plain = step(model, autocast=True)
    for name, value in step(model, True, compiled).items():
        torch.testing.assert_close(value, plain[name], msg=name)


@pytest.mark.parametrize("operators", [BLOCK_REFERENCE, BLOCK_FUSED], ids=["plain", "kernels"])
def test_a_sum_left_open_is_the_closed_one(operators, kernels):
    kernels(operators)
    block = trained(Block(DIM, 4, mlp_ratio=2.0))
    tokens, condition = torch.randn(2, 5, DIM).to(DEVICE), torch.randn(2, DIM).to(DEVICE)
    after = block(OpenSum(tokens), condition)
    torch.testing.assert_close(after.closed(), block(tokens, condition))
    torch.testing.assert_close(
        block(after, condition).closed(), block(block(tokens, condition), condition)
    )


@pytest.mark.parametrize("operators", [BLOCK_REFERENCE, BLOCK_FUSED], ids=["plain", "kernels"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["as it comes", "bfloat16"])
@torch.no_grad()
def test_the_stream_is_kept_in_the_dtype_asked_for(dtype, operators, kernels):
    kernels(operators)
    model, seen = make_model(residual_dtype=dtype), []
    for block in model.get_submodule("blocks").children():
        block.register_forward_hook(lambda _, __, after: seen.append(after.tokens.dtype))
    for autocast in (False, True):
        answer(model, autocast)
    assert seen == [dtype or torch.float32] * 4


@pytest.mark.long
@pytest.mark.skipif(torch.cuda.is_available(), reason="runs the kernels in the interpreter")
def test_two_processes_have_the_gradient_of_one(two_processes):
    assert float(two_processes(Path(__file__).with_name("sharded_step.py"))) <= 1e-6
