"""Which implementation a device gets, and what is left to the definitions."""

import pytest
import torch
from torch import nn

from speed_engine import ops
from speed_engine.ops import (
    ALL_KERNELS,
    BLOCK_COMPILED,
    BLOCK_FUSED,
    BLOCK_REFERENCE,
    FUSED,
    HAS_TRITON,
    NO_KERNELS,
    REFERENCE,
    Kernels,
    block_operators_for,
    kernels_on,
    operators_for,
    prepare_compiler,
    use_kernels,
)
from speed_kernels import philox

CUDA = torch.device("cuda", 3)


@pytest.fixture(autouse=True)
def kernels_as_before():
    yield
    use_kernels(ALL_KERNELS)


def test_kernels_run_on_cuda_and_references_elsewhere():
    assert operators_for(CUDA) is (FUSED if HAS_TRITON else REFERENCE)
    assert block_operators_for(CUDA) is (BLOCK_FUSED if HAS_TRITON else BLOCK_REFERENCE)
    for device in ("cpu", "mps", "meta"):
        assert operators_for(torch.device(device)) is REFERENCE
        assert block_operators_for(torch.device(device)) is BLOCK_REFERENCE


def test_code_compiled_for_a_cpu_is_made_of_what_inductor_makes_fast():
    def traced(x):
        return x + (block_operators_for(x.device) is BLOCK_COMPILED)

    assert torch.compile(traced, backend="eager", fullgraph=True)(torch.zeros(())) == 1


def test_a_family_that_is_left_out_runs_its_definitions():
    for family in Kernels._fields:
        use_kernels(ALL_KERNELS._replace(**{family: False}))
        assert getattr(kernels_on(CUDA), family) is False
        assert (operators_for(CUDA) is REFERENCE) == (family == "objective")
        assert (block_operators_for(CUDA) is BLOCK_REFERENCE) == (family == "block")
    assert ops.FAMILIES.keys() == set(Kernels._fields)


@pytest.mark.parametrize("wanted", [True, False])
def test_draws_on_cuda_run_the_definition_where_they_are_left_out(monkeypatch, wanted):
    for name in ("random_bits", "normal"):
        monkeypatch.setattr(philox, f"{name}_triton", lambda *_: "kernel")
        monkeypatch.setattr(philox, f"{name}_reference", lambda *_: "definition")
    use_kernels(NO_KERNELS._replace(random=wanted))
    for draw in (philox._random_bits_cuda, philox._normal_cuda):
        assert draw(torch.tensor(0), torch.zeros(1), 1, 0) == ("kernel" if wanted else "definition")


@pytest.mark.parametrize("wanted", [True, False])
def test_norms_and_the_update_of_cuda_tensors_follow_the_switch(monkeypatch, wanted):
    class OnCuda:
        device, is_cuda = CUDA, True

    def named(kind: type, name: str):
        return kind(*[lambda *_, _name=name, **__: called.append(_name)] * len(kind._fields))

    called: list[str] = []
    for prefix, kind in (("NORM", ops.NormOperators), ("UPDATE", ops.UpdateOperators)):
        monkeypatch.setattr(ops, f"{prefix}_FUSED", named(kind, "kernel"))
        monkeypatch.setattr(ops, f"{prefix}_REFERENCE", named(kind, "definition"))
    use_kernels(ALL_KERNELS if wanted else NO_KERNELS)
    x: torch.Tensor = OnCuda()  # pyright: ignore[reportAssignmentType]
    ops.qk_norm_rope(x, x, x, x, x, x, 1e-6)
    ops.group_norm_silu(x, 1, x, x, None, None, 1e-6)
    ops.adamw_ema([x])
    assert called == ["kernel" if wanted else "definition"] * 3


def test_a_layer_leaves_the_gradient_of_a_bias_that_it_has_and_trains():
    x, layer = torch.randn(2, 3), nn.Linear(3, 4)
    product, bias = BLOCK_FUSED.linear(layer, x)
    assert bias is layer.bias and torch.equal(product, layer(x))
    assert torch.autograd.grad(product.sum(), layer.bias, allow_unused=True) == (None,)
    for other in (nn.Linear(3, 4, bias=False), layer.requires_grad_(False)):
        product, bias = BLOCK_FUSED.linear(other, x)
        assert bias is None and torch.equal(product, other(x))


def test_inductor_is_told_of_every_operator_that_it_has_no_code_for():
    """Else torch 2.11 describes each by all that it was computed from: gigabytes of text."""
    from torch._inductor.lowering import fallbacks

    prepare_compiler()
    names = list(torch.ops.speed_kernels)
    assert "gated_residual_adaln_backward" in names
    assert {getattr(torch.ops.speed_kernels, name).default for name in names} <= fallbacks


def test_code_that_was_compiled_for_other_kernels_is_compiled_again(monkeypatch, tmp_path):
    """Inductor keeps code under the names of our operators, whatever these return since."""
    import torch.compiler.config as compiler

    from speed_engine import ops

    prepare_compiler()
    monkeypatch.setattr(compiler, "cache_key_tag", "of the user ")
    prepare_compiler.__wrapped__()
    prepare_compiler()  # again: no more
    assert compiler.cache_key_tag == "of the user " + ops.kernels_sha256()
    for name in ("philox.py", "gelu.py"):
        (tmp_path / name).write_text("x = 1\n")
    monkeypatch.setattr(ops._philox, "__file__", str(tmp_path / "philox.py"))
    first = ops.kernels_sha256()
    (tmp_path / "gelu.py").write_text("x = 2\n")
    assert ops.kernels_sha256() != first
