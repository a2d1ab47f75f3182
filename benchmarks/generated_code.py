"""The code that Inductor generates for a GPU, and the bytes that each of its kernels moves.

Nothing is run, and no GPU is needed: a function is traced on the CPU, its graphs are told that they
are on an H200, and Inductor writes their code, forward and backward. Every kernel in it is charged
each tensor it is given, read once or written once, views by what they show. That holds for those
of ``speed_kernels`` as well; ``tests/speed_kernels/test_traffic.py`` finds in Triton's interpreter
that they read and write just that.
"""

import copy
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from functorch.compile import (
    aot_function,
    make_boxed_func,  # pyright: ignore[reportPrivateImportUsage]
    min_cut_rematerialization_partition,
)
from torch import Tensor
from torch._dynamo.device_interface import CudaInterface
from torch._inductor import compile_fx, decomposition, ir
from torch._inductor.graph import GraphLowering
from torch._inductor.scheduler import BaseSchedulerNode, ExternKernelSchedulerNode
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.node import map_aggregate
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.utils import _pytree as pytree
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

RARELY_READ = {"speed_kernels.hybrid_sums.default": 1}  # x0, for the images at t = 0
NOT_CHARGED = re.compile(  # randint draws the seed of a generator
    r"\b(addmm|mm|bmm|_scaled_dot_product_flash_attention(_backward)?|randint)\b"
    r"|speed_kernels\.attention(_backward)?\."
)
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


def count(function: Callable[..., Any], inputs: list[Tensor]) -> list[Kernel]:
    """Launches of forward and backward, without matrix products and attention.

    Args:
        function: inputs -> a tensor or several.
        inputs: fake CPU tensors; gradients of those that require one are computed.
    """
    kernels: list[Kernel] = []

    def compiler(gm: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Callable:
        kernels.extend(generated_kernels(on_cuda(gm, example_inputs)))
        return make_boxed_func(gm.forward)

    def partition(module: torch.fx.GraphModule, joint_inputs: Any, **options: Any):
        compile_fx._recursive_joint_graph_passes(module)
        return min_cut_rematerialization_partition(
            module, joint_inputs, compiler="inductor", **options
        )

    def without_gradient(gm: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Callable:
        moved, inputs = on_cuda(gm, example_inputs)
        with V.set_fake_mode(fake_mode(inputs)):
            compile_fx._recursive_joint_graph_passes(moved)
        kernels.extend(generated_kernels((moved, inputs)))
        return make_boxed_func(gm.forward)

    traced = aot_function(
        function,
        fw_compiler=compiler,
        bw_compiler=compiler,
        inference_compiler=without_gradient,
        partition_fn=partition,
        decompositions=decomposition.select_decomp_table(),
        keep_inference_input_mutations=True,
    )
    outputs = [y for y in pytree.tree_leaves(traced(*inputs)) if y.requires_grad]
    if outputs:
        torch.autograd.backward(outputs, [torch.empty_like(y) for y in outputs])
    return kernels


def on_cuda(
    module: torch.fx.GraphModule, examples: Sequence[Any]
) -> tuple[torch.fx.GraphModule, list[Any]]:
    """A graph traced on the CPU and its inputs, as if on a GPU, where autograd would need one."""
    module = copy.deepcopy(module)
    moved = lambda x: torch.device("cuda", 0) if isinstance(x, torch.device) else x
    for node in module.graph.nodes:
        node.args, node.kwargs = map_aggregate((node.args, node.kwargs), moved)
        for key in ("val", "tensor_meta", "example_value"):
            node.meta.pop(key, None)
    module.recompile()
    inputs = [
        torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda")
        if isinstance(x, Tensor)
        else x
        for x in examples
    ]
    FakeTensorProp(module, mode=fake_mode(inputs)).propagate_dont_convert_inputs(*inputs)
    return module, inputs


def fake_mode(inputs: list[Any]) -> FakeTensorMode:
    return next(x.fake_mode for x in inputs if isinstance(x, FakeTensor))


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
    if not isinstance(call, ir.MultiOutput) and not NOT_CHARGED.search(name):
        raise ValueError(f"no rule says what {name} moves; add one to traffic.py.")
    return True


def is_ours(node: BaseSchedulerNode) -> bool:
    call = node.node
    if not isinstance(call, ir.FallbackKernel) or NOT_CHARGED.search(str(call.op_overload)):
        return False
    return "speed_kernels" in str(call.op_overload)


def charge(node: BaseSchedulerNode) -> Kernel:
    if not is_ours(node):
        return Kernel(node.get_name(), node.get_read_write_buffers_sizes())
    call: Any = node.node
    several = isinstance(call.layout, ir.MultiOutputLayout)
    results = pytree.tree_leaves(call.outputs) if several else [call]
    name = str(call.op_overload)
    moved = [x for i, x in enumerate(call.inputs) if i != RARELY_READ.get(name)]
    moved += [result for result in results if result is not None]
    return Kernel(name, sum(int(x.get_numel()) * x.get_dtype().itemsize for x in moved))


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
