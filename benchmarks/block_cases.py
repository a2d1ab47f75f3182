"""Benchmark cases of a whole DiT block, its matrix products and attention included, in bfloat16."""

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn

from kernel_case import DEVICE, Case, compiled
from speed_engine.models import dit
from speed_engine.models.layers import attention, feed_forward, open_sum
from speed_engine.ops import BLOCK_FUSED, BLOCK_REFERENCE, BlockOperators

HEADS = {72: 4, 384: 6, 768: 12, 1024: 16, 1152: 16}  # by width
BUSY = 46  # (B, N, D) tensors read or written between matrix products; traffic.py counts them


@contextmanager
def running_on(operators: BlockOperators) -> Iterator[None]:
    with ExitStack() as stack:
        for module in (attention, feed_forward, open_sum):
            stack.enter_context(patch.object(module, "block_operators_for", always(operators)))
        yield


@functools.cache  # compiled code asks whether the function is still the same
def always(operators: BlockOperators) -> Callable[[torch.device], BlockOperators]:
    return lambda device: operators


def block_gradients(
    operators: BlockOperators, call: Callable, block: nn.Module, inputs: list[Tensor]
) -> tuple[Tensor, ...]:
    """Of everything, given the sum before the block open and leaving its own open, as in a DiT."""
    with running_on(operators):
        tokens, branch, gate, bias, condition, *upstream = inputs
        after = call(open_sum.OpenSum(tokens, branch, gate, bias), condition)
        weights = [
            p for name, p in block.named_parameters() if name != "mlp.fc2.bias"
        ]  # the next's
        leaves = [*weights, tokens, branch, gate, bias, condition]
        return torch.autograd.grad(after[:2], leaves, upstream)


def block_cases(shapes: dict[str, tuple[int, int, int]]) -> Iterator[Case]:
    for label, shape in shapes.items():
        batch, _, dim = shape
        block = dit.Block(dim, HEADS[dim], mlp_ratio=4.0).to(DEVICE, torch.bfloat16)
        sizes = [shape, shape, (batch, dim), (dim,), (batch, dim), shape, shape]
        sets = [[torch.randn(size, device=DEVICE).bfloat16() for size in sizes] for _ in range(2)]
        for inputs in sets:
            for leaf in inputs[:5]:
                leaf.requires_grad_()
        by_compiler = compiled(block)

        def run(i, operators, call, block=block, sets=sets):
            return block_gradients(operators, call, block, sets[i])

        def check(block=block, sets=sets, shape=shape):
            exact = dit.Block(shape[2], HEADS[shape[2]], mlp_ratio=4.0).to(DEVICE, torch.float64)
            exact.load_state_dict(block.state_dict())
            rows = [t.detach()[:2] if len(t) == shape[0] else t.detach() for t in sets[0]]
            leaves = [
                [t.to(dtype).requires_grad_() for t in rows]
                for dtype in (torch.bfloat16, torch.float64)
            ]
            ours = block_gradients(BLOCK_FUSED, block, block, leaves[0])
            plain = block_gradients(BLOCK_REFERENCE, block, block, leaves[0])
            truth = block_gradients(BLOCK_REFERENCE, exact, exact, leaves[1])
            for i, (fused, eager, expected) in enumerate(zip(ours, plain, truth, strict=True)):
                error, allowed = ((g.double() - expected).norm() for g in (fused, eager))
                assert error <= 2 * allowed + 1e-6 * expected.norm(), f"block gradient {i}"

        yield Case(
            f"block forward and backward, {label}",
            BUSY * 2 * int(np.prod(shape)),
            {
                "eager": lambda i, run=run, f=block: run(i, BLOCK_REFERENCE, f),
                "torch.compile": lambda i, run=run, f=by_compiler: run(i, BLOCK_REFERENCE, f),
                "kernels": lambda i, run=run, f=block: run(i, BLOCK_FUSED, f),
                "kernels, torch.compile": lambda i, run=run, f=by_compiler: run(i, BLOCK_FUSED, f),
            },
            len(sets),
            check,
        )
