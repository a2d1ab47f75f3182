"""Which implementation a device gets, and that doctor says the same."""

import torch
from torch import nn

from speed_engine.ops import (
    BLOCK_COMPILED,
    BLOCK_FUSED,
    BLOCK_REFERENCE,
    FUSED,
    HAS_TRITON,
    REFERENCE,
    block_operators_for,
    operators_for,
)
from speed_engine.runtime.machine import choose_block_kernels, choose_kernels


def test_kernels_run_on_cuda_and_references_elsewhere():
    cuda = torch.device("cuda", 3)
    assert operators_for(cuda) is (FUSED if HAS_TRITON else REFERENCE)
    assert block_operators_for(cuda) is (BLOCK_FUSED if HAS_TRITON else BLOCK_REFERENCE)
    for device in ("cpu", "mps", "meta"):
        assert operators_for(torch.device(device)) is REFERENCE
        assert block_operators_for(torch.device(device)) is BLOCK_REFERENCE


def test_code_compiled_for_a_cpu_is_made_of_what_inductor_makes_fast():
    def traced(x):
        return x + (block_operators_for(x.device) is BLOCK_COMPILED)

    assert torch.compile(traced, backend="eager", fullgraph=True)(torch.zeros(())) == 1


def test_doctor_names_the_implementation_that_runs():
    for device in ("cuda", "cpu"):
        fused = operators_for(torch.device(device)) is FUSED
        assert choose_kernels(device).value == ("Triton" if fused else "PyTorch reference")
        fused = block_operators_for(torch.device(device)) is BLOCK_FUSED
        assert choose_block_kernels(device).value == ("Triton" if fused else "PyTorch reference")


def test_a_layer_leaves_the_gradient_of_a_bias_that_it_has_and_trains():
    x, layer = torch.randn(2, 3), nn.Linear(3, 4)
    product, bias = BLOCK_FUSED.linear(layer, x)
    assert bias is layer.bias and torch.equal(product, layer(x))
    assert torch.autograd.grad(product.sum(), layer.bias, allow_unused=True) == (None,)
    for other in (nn.Linear(3, 4, bias=False), layer.requires_grad_(False)):
        product, bias = BLOCK_FUSED.linear(other, x)
        assert bias is None and torch.equal(product, other(x))
