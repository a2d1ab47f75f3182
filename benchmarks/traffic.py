"""Bytes that a GPU moves for a DiT block, and for noise and loss, counted without a GPU.

Run: ``python benchmarks/traffic.py [--cases NAME ...] [--kernels] [--json]``.

Inductor generates the code it would run on an H200, forward and backward, and every kernel in it is
charged each tensor it is given once read or once written, views by what they show. That holds for
ours as well: those of Inductor's calls that go to ``speed_kernels`` (``tests/speed_kernels/
test_traffic.py`` checks in Triton's interpreter that they read and write just that). Matrix
products and attention are left out: they are the same in all. Nothing is run.
"""

import argparse
import copy
import json
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.device_interface import CudaInterface
from torch._functorch.aot_autograd import aot_function, make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor import compile_fx, decomposition, ir
from torch._inductor.graph import GraphLowering
from torch._inductor.scheduler import BaseSchedulerNode, ExternKernelSchedulerNode
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.utils import _pytree as pytree
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from harness import write_result
from speed_engine.models import attention, dit, open_sum
from speed_engine.ops import BLOCK_FUSED, BLOCK_REFERENCE, BlockOperators
from speed_kernels import adaln, gelu, heads

BATCH, TOKENS, DIM, NUM_HEADS = 256, 256, 1152, 16  # DiT-XL/2, latents 32 x 32, on one GPU
UNIT = 2 * BATCH * TOKENS * DIM  # bytes of one (B, N, D) tensor in bfloat16
SAME_IN_ALL = re.compile(r"\b(addmm|mm|bmm|_scaled_dot_product_flash_attention(_backward)?)\b")
H200 = SimpleNamespace(
    name="NVIDIA H200", major=9, minor=0, multi_processor_count=132, total_memory=141 * 2**30,
    max_threads_per_multi_processor=2048, max_threads_per_block=1024, warp_size=32,
    regs_per_multiprocessor=65536, shared_memory_per_block=48 * 2**10, L2_cache_size=50 * 2**20,
    shared_memory_per_block_optin=227 * 2**10, shared_memory_per_multiprocessor=228 * 2**10,
    clock_rate=1980000, memory_clock_rate=3201000, memory_bus_width=6144,
    is_integrated=False, gcnArchName="", uuid="",
)  # fmt: skip


class Kernel(NamedTuple):
    """A launch in the generated code."""

    name: str
    num_bytes: int


class Generated(Exception):
    """The code is there, and is not to be loaded."""


# Counting.


def count(function: Callable[..., Any], inputs: list[Tensor]) -> list[Kernel]:
    """Launches of forward and backward, without matrix products and attention.

    Args:
        function: inputs -> a tensor or several.
        inputs: fake CPU tensors; gradients of those that require one are computed.
    """
    kernels: list[Kernel] = []

    def compiler(module: torch.fx.GraphModule, examples: list[Any]) -> Callable:
        kernels.extend(generated_kernels(on_cuda(module, examples)))
        return make_boxed_func(module.forward)

    def partition(module: torch.fx.GraphModule, joint_inputs: Any, **options: Any):
        compile_fx._recursive_joint_graph_passes(module)
        return min_cut_rematerialization_partition(
            module, joint_inputs, compiler="inductor", **options
        )

    traced = aot_function(
        function,
        fw_compiler=compiler,
        bw_compiler=compiler,
        partition_fn=partition,
        decompositions=decomposition.select_decomp_table(),
        keep_inference_input_mutations=True,
    )
    outputs = [y for y in pytree.tree_leaves(traced(*inputs)) if y.requires_grad]
    if outputs:
        torch.autograd.backward(outputs, [torch.empty_like(y) for y in outputs])
    return kernels


def on_cuda(
    module: torch.fx.GraphModule, examples: list[Any]
) -> tuple[torch.fx.GraphModule, list[Any]]:
    """A graph traced on the CPU and its inputs, as if on a GPU, where autograd would need one."""
    module = copy.deepcopy(module)
    for node in module.graph.nodes:
        if node.kwargs.get("device") is not None:
            node.kwargs = node.kwargs | {"device": torch.device("cuda", 0)}
        for key in ("val", "tensor_meta", "example_value"):
            node.meta.pop(key, None)
    module.recompile()
    inputs = [
        torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda")
        if isinstance(x, Tensor)
        else x
        for x in examples
    ]
    mode = next(x.fake_mode for x in inputs if isinstance(x, Tensor))  # pyright: ignore[reportAttributeAccessIssue]
    FakeTensorProp(module, mode=mode).propagate_dont_convert_inputs(*inputs)
    return module, inputs


def generated_kernels(graph: tuple[torch.fx.GraphModule, list[Any]]) -> list[Kernel]:
    """What Inductor's code for a graph launches."""
    kernels: list[Kernel] = []
    generate = GraphLowering.codegen

    def stop(lowering: GraphLowering):
        generate(lowering)
        charged = (charge(node) for node in lowering.scheduler.nodes if not skipped(node))
        kernels.extend(kernel for kernel in charged if kernel.num_bytes)
        raise Generated

    with patch.object(GraphLowering, "compile_to_module", stop):
        try:
            compile_fx.compile_fx_inner(*graph)
        except Exception as error:  # wrapped by Inductor, differently from version to version
            if "Generated" not in repr(error):
                raise
    return kernels


def skipped(node: BaseSchedulerNode) -> bool:
    """Matrix products, attention, and nodes that stand for a part of another's result."""
    if not isinstance(node, ExternKernelSchedulerNode) or is_ours(node):
        return False
    call = node.node
    name = f"{getattr(call, 'python_kernel_name', '')} {getattr(call, 'op_overload', '')}"
    if not isinstance(call, ir.MultiOutput) and not SAME_IN_ALL.search(name):
        raise ValueError(f"no rule says what {name} moves; add one to traffic.py.")
    return True


def is_ours(node: BaseSchedulerNode) -> bool:
    call = node.node
    return isinstance(call, ir.FallbackKernel) and "speed_kernels" in str(call.op_overload)


def charge(node: BaseSchedulerNode) -> Kernel:
    if not is_ours(node):
        return Kernel(node.get_name(), node.get_read_write_buffers_sizes())
    call: Any = node.node
    several = isinstance(call.layout, ir.MultiOutputLayout)
    results = pytree.tree_leaves(call.outputs) if several else [call]
    moved = [*call.inputs, *(result for result in results if result is not None)]
    return Kernel(
        str(call.op_overload), sum(int(x.get_numel()) * x.get_dtype().itemsize for x in moved)
    )


@contextmanager
def pretend_gpu() -> Iterator[None]:
    """Inductor finds an H200. Only code may be generated: what needs the device would crash."""
    target = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda device=0: 0,
        get_active_torch_device=lambda: torch.device("cuda", 0),
    )
    answers = {
        CudaInterface: {
            "is_available": True, "current_device": 0, "device_count": 1,
            "get_device_properties": H200, "get_compute_capability": 90,
            "is_triton_capable": True, "raise_if_triton_unavailable": None,
            "is_bf16_supported": True,
        },
        CudaInterface.Worker: {"get_device_properties": H200},
        torch.cuda: {
            "get_device_properties": H200, "get_device_capability": (9, 0), "current_device": 0,
            "device_count": 1, "_lazy_init": None, "get_arch_list": ["sm_90"],
            "is_bf16_supported": True,
        },
    }  # fmt: skip
    with ExitStack() as stack:
        for owner, values in answers.items():
            for name, value in values.items():
                answer = staticmethod(lambda *args, _value=value, **kwargs: _value)
                stack.enter_context(patch.object(owner, name, answer))
        stack.enter_context(patch.object(driver, "_active", target))
        yield


# What is counted.


def tensor(*shape: int, dtype: torch.dtype, gradient: bool = False) -> Tensor:
    return torch.empty(shape, dtype=dtype, requires_grad=gradient)


def block_traffic(
    operators: BlockOperators,
    parameters: torch.dtype = torch.bfloat16,
    stream: torch.dtype = torch.bfloat16,
    between_others: bool = True,
) -> list[Kernel]:
    """Of one block of DiT-XL/2.

    Args:
        operators: what computes what is not a matrix product.
        parameters: their dtype; float32 ones run under autocast to bfloat16.
        stream: dtype of the residual stream.
        between_others: whether the sum before it and its own are left open, as in ``DiT``; if not,
            it has tokens in, tokens out.
    """
    with default_dtype(parameters):
        block = dit.Block(DIM, NUM_HEADS, mlp_ratio=4.0)
    names, values = zip(*block.named_parameters(), strict=True)
    product = torch.bfloat16  # with or without autocast
    tokens = tensor(BATCH, TOKENS, DIM, dtype=stream, gradient=True)
    condition = tensor(BATCH, DIM, dtype=parameters, gradient=True)
    before: tuple[Tensor, ...] = (tokens,)
    if between_others:
        branch = tensor(BATCH, TOKENS, DIM, dtype=product, gradient=True)
        gate = tensor(BATCH, DIM, dtype=product, gradient=True)
        bias = operators.linear(block.mlp.fc2, tensor(1, 4 * DIM, dtype=parameters))[1]
        before += (branch, gate) if bias is None else (branch, gate, bias)

    def run(condition: Tensor, *tensors: Tensor):
        weights, before = tensors[: len(values)], tensors[len(values) :]
        stream = open_sum.OpenSum(*before) if between_others else before[0]
        with torch.autocast("cpu", torch.bfloat16, enabled=parameters == torch.float32):
            after = torch.func.functional_call(
                block, dict(zip(names, weights, strict=True)), (stream, condition)
            )
        return after[:3] if between_others else after

    with dispatched_to(operators):
        return count(run, [condition, *values, *before])


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def dispatched_to(operators: BlockOperators) -> Iterator[None]:
    """As on a GPU, for tensors that are traced on the CPU."""
    flash = lambda q, k, v: torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]
    with ExitStack() as stack:
        for module in (attention, dit, open_sum):
            stack.enter_context(patch.object(module, "block_operators_for", lambda _: operators))
        for module in (adaln, gelu, heads):
            stack.enter_context(patch.object(module, "runs_kernels", lambda _: True))
        stack.enter_context(patch.object(F, "scaled_dot_product_attention", flash))
        yield


class Case(NamedTuple):
    """What is counted, in units of ``num_bytes``."""

    kernels: Callable[[], list[Kernel]]
    unit: str
    num_bytes: int


def block(*args: Any, **options: Any) -> Case:
    return Case(lambda: block_traffic(*args, **options), "u", UNIT)


def without(operator: str) -> Case:
    """The block whose ``operator`` is left to Inductor."""
    return block(BLOCK_FUSED._replace(**{operator: getattr(BLOCK_REFERENCE, operator)}))


AUTOCAST = dict(parameters=torch.float32, stream=torch.float32)
CASES = {
    "block, torch.compile": block(BLOCK_REFERENCE, between_others=False),
    "block, torch.compile, autocast": block(BLOCK_REFERENCE, between_others=False, **AUTOCAST),
    "block": block(BLOCK_FUSED),
    "block without gated_residual_adaln": without("gated_residual_adaln"),
    "block without gelu": without("gelu"),
    "block without split_heads": without("split_heads"),
    "block, autocast": block(BLOCK_FUSED, **AUTOCAST),
    "block, autocast, bfloat16 stream": block(BLOCK_FUSED, parameters=torch.float32),
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--kernels", action="store_true", help="list what each launch moves")
    parser.add_argument("--json", action="store_true", help="print one object, keep nothing")
    options = parser.parse_args()
    figures = {}
    for name in options.cases:
        case = CASES[name]
        with pretend_gpu(), FakeTensorMode(allow_non_fake_inputs=True):
            kernels = case.kernels()
        total = sum(kernel.num_bytes for kernel in kernels) / case.num_bytes
        figures[name] = {"traffic": round(total, 2), "unit": case.unit, "launches": len(kernels)}
        if options.json:
            continue
        print(f"{name:44} {total:7.2f} {case.unit} in {len(kernels)} launches", flush=True)
        if options.kernels:
            for kernel in kernels:
                print(f"    {kernel.num_bytes / case.num_bytes:6.2f} {kernel.name}")
    if options.json:
        print(json.dumps(figures))
    elif len(figures) == len(CASES):
        print(write_result("traffic", {"cases": figures}))


if __name__ == "__main__":
    main()
