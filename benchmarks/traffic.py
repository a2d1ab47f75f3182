"""Bytes that a GPU moves for a DiT block, and for noise and loss, counted without a GPU.

Run: ``python benchmarks/traffic.py [--cases NAME ...] [--kernels] [--json]``.

Counted on the code that Inductor generates, see ``generated_code.py``. Matrix products and
attention are left out, with the tensors that they read and write. u is a (B, N, D) tensor in
bfloat16. What is called torch.compile has no kernels of ours.
"""

import argparse
import json
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from generated_code import Kernel, count, pretend_gpu
from harness import write_result
from noise_and_loss_cases import TABLES, from_device, hybrid_eager, noise_on_device
from speed_engine.models import dit
from speed_engine.models.layers import attention, feed_forward, open_sum
from speed_engine.models.layers.embeddings import unpatchify
from speed_engine.ops import ALL_KERNELS, BLOCK_FUSED, BLOCK_REFERENCE, BlockOperators
from speed_kernels import adaln, gelu, heads, noising, variational_bound
from speed_kernels import attention as attention_kernel

BATCH, TOKENS, DIM, NUM_HEADS = 256, 256, 1152, 16  # DiT-XL/2, latents 32 x 32, on one GPU
UNIT = 2 * BATCH * TOKENS * DIM
IMAGES, PATCH_SIZE = (32, 3, 256, 256), 16  # for noise and loss: what an image costs counts little


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
        before += (branch, gate)
        if operators.linear is BLOCK_FUSED.linear:  # the block before leaves it that
            before += (tensor(DIM, dtype=parameters, gradient=True),)

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
        for module in (attention, feed_forward, open_sum):
            stack.enter_context(patch.object(module, "block_operators_for", lambda _: operators))
        stack.enter_context(patch.object(attention, "kernels_on", lambda _: ALL_KERNELS))
        for module in (adaln, attention_kernel, gelu, heads, noising, variational_bound):
            stack.enter_context(patch.object(module, "runs_kernels", lambda _: True))
        stack.enter_context(patch.object(F, "scaled_dot_product_attention", flash))
        yield


def noise_and_loss_traffic(fused: bool) -> list[Kernel]:
    """Of noising the input, and of a loss with learned variance on the tokens of a model.

    The model lays its tokens out as images for the loss, and gets their gradient as tokens; what
    that moves without a loss is not the loss's.
    """
    batch, channels, height, width = IMAGES
    x0, t = tensor(*IMAGES, dtype=torch.float32), tensor(batch, dtype=torch.int64)
    grid = height // PATCH_SIZE, width // PATCH_SIZE
    shape = batch, grid[0] * grid[1], PATCH_SIZE**2 * 2 * channels
    tokens = tensor(*shape, dtype=torch.bfloat16, gradient=True)
    layout = lambda tokens: unpatchify(tokens, grid, PATCH_SIZE)
    kernels = _fused_steps if fused else _steps_of_dit
    with dispatched_to(BLOCK_FUSED):
        moved = kernels(x0, t, tokens, layout)
        without_loss = sum(kernel.num_bytes for kernel in count(layout, [tokens]))
    return [*moved, Kernel("layout of the answer", -without_loss)]


def _fused_steps(x0: Tensor, t: Tensor, tokens: Tensor, layout: Callable) -> list[Kernel]:
    seed, ids = tensor(dtype=torch.int64), tensor(len(x0), dtype=torch.int64)
    coefficients, rows = (tensor(len(x0), 5, dtype=torch.float32) for _ in range(2))

    def noise(x0: Tensor, coefficients: Tensor, seed: Tensor, ids: Tensor):
        return noising.noised_input(x0, coefficients, seed, ids, torch.bfloat16)

    def loss(tokens: Tensor, *rest: Tensor):
        return variational_bound.hybrid_loss(layout(tokens), *rest)[0].mean()

    moved = count(noise, [x0, coefficients, seed, ids])
    return moved + count(loss, [tokens, x0, coefficients, rows, seed, ids])


def _steps_of_dit(x0: Tensor, t: Tensor, tokens: Tensor, layout: Callable) -> list[Kernel]:
    tables = [tensor(len(table), dtype=torch.float32) for table in TABLES.values()]
    noise = tensor(*x0.shape, dtype=torch.float32)
    x_in = tensor(*x0.shape, dtype=torch.bfloat16)

    def loss(tokens: Tensor, x0: Tensor, x_in: Tensor, noise: Tensor, t: Tensor, *tables: Tensor):
        lookup = from_device(dict(zip(TABLES, tables, strict=True)))
        return hybrid_eager(layout(tokens), x0, x_in, noise, t, lookup)

    moved = count(noise_on_device, [x0, t, *tables[:2]])
    return moved + count(loss, [tokens, x0, x_in, noise, t, *tables])


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


def attention_of_heads(*qkv: Any) -> Tensor:
    """PyTorch's attention between kernels of ours, for what ``attention`` does not take."""
    return F.scaled_dot_product_attention(*heads.split_heads(*qkv)).transpose(1, 2).flatten(2)


def noise_and_loss(fused: bool) -> Case:
    return Case(lambda: noise_and_loss_traffic(fused), "bytes/element", math.prod(IMAGES))


AUTOCAST = dict(parameters=torch.float32, stream=torch.float32)
CASES = {
    "block, torch.compile": block(BLOCK_REFERENCE, between_others=False),
    "block, torch.compile, autocast": block(BLOCK_REFERENCE, between_others=False, **AUTOCAST),
    "block": block(BLOCK_FUSED),
    "block without gated_residual_adaln": without("gated_residual_adaln"),
    "block without gelu": without("gelu"),
    "block without attention": without("attention"),
    "block, PyTorch's attention": block(BLOCK_FUSED._replace(attention=attention_of_heads)),
    "block, autocast": block(BLOCK_FUSED, **AUTOCAST),
    "block, autocast, bfloat16 stream": block(BLOCK_FUSED, parameters=torch.float32),
    "noise and loss, torch.compile": noise_and_loss(fused=False),
    "noise and loss": noise_and_loss(fused=True),
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
