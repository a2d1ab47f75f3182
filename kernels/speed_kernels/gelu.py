"""GELU in its tanh form, whose backward also sums the gradient of the bias before it.

    forward     s  = sigmoid(2 u),  u = sqrt(2 / pi) (h + 0.044715 h^3)
                y  = h s                                   = h (1 + tanh(u)) / 2
    backward    dh = dy (s + h s (1 - s) 2 du/dh)
                dbias = sum over R of dh                   see ``deferred_bias``

Letters: R rows (tokens of all images), D width, J chunks of R.
Saved for backward: h.
Traffic, in (R, D) tensors: forward reads h, writes y; backward reads dy, h, writes dh; besides,
1 / ROWS float32 ones of partial sums. The forward is PyTorch's own kernel.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.library import custom_op

from speed_kernels.deferred_bias import with_bias_gradient
from speed_kernels.language import runs_kernels, store, tl, triton

# Rows that a program sums into one partial sum, the tile that it holds, and of how many the memory
# is read ahead. Tuned on an H200: benchmarks/results/nvidia-h200/gpu_tune.json.
ROWS, TILE_ROWS, TILE_COLUMNS, STAGES = 128, 16, 128, 3
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # others go through the reference


def gelu_reference(h: Tensor, bias: Tensor | None = None) -> Tensor:
    """The definition of ``gelu`` in plain PyTorch."""
    return F.gelu(with_bias_gradient(h, bias), approximate="tanh")


def gelu_by_sigmoid(h: Tensor, bias: Tensor | None = None) -> Tensor:
    """The same by s, for ``torch.compile`` on a CPU, where a sigmoid takes half a tanh's time.

    Arguments and result as of ``gelu``; computed in float32 at least.
    """
    h = with_bias_gradient(h, bias)
    wide = h.float() if h.dtype.itemsize < 4 else h
    double_u = 2 * math.sqrt(2 / math.pi) * (wide + 0.044715 * wide * wide * wide)
    return (wide * torch.sigmoid(double_u)).to(h.dtype)


def gelu(h: Tensor, bias: Tensor | None = None) -> Tensor:
    """GELU in its tanh form; differentiable once where there is a bias.

    Args:
        h: (..., D), copied in the backward if not contiguous.
        bias: (D,), what the linear layer before has added to h, see ``deferred_bias``.

    Returns:
        Of the shape and dtype of ``h``.
    """
    if bias is not None and (bias.dim() != 1 or h.shape[-1:] != bias.shape):
        raise ValueError(
            f"gelu: bias must be (D,) beside (..., D); got {tuple(bias.shape)} beside "
            f"{tuple(h.shape)}."
        )
    if bias is None or h.dtype not in DTYPES or not runs_kernels(h):
        return gelu_reference(h, bias)
    return _gelu(h, bias)


@custom_op("speed_kernels::gelu", mutates_args=())
def _gelu(h: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(h, approximate="tanh")


@_gelu.register_fake
def _(h, bias):
    return torch.empty_like(h)


# Backward: one program per ROWS rows and TILE_COLUMNS columns; PyTorch adds their partial sums.


@triton.jit
def _gelu_backward_kernel(
    dy_ptr, h_ptr, dh_ptr, partial_ptr, num_rows, dim,
    ROWS: tl.constexpr, TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * ROWS
    columns = tl.program_id(1) * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    inside = columns < dim
    sums = tl.zeros((TILE_ROWS, TILE_COLUMNS), dtype=tl.float32)
    for i in tl.range(0, ROWS, TILE_ROWS, num_stages=STAGES):
        rows = first + i + tl.arange(0, TILE_ROWS)
        offsets = rows[:, None] * dim + columns[None, :]
        mask = (rows < num_rows)[:, None] & inside[None, :]
        dy = tl.load(dy_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        h = tl.load(h_ptr + offsets, mask=mask, other=0.0).to(tl.float32)

        square = h * h
        u2 = 1.5957691216057308 * h * (1.0 + 0.044715 * square)
        s = 1.0 / (1.0 + tl.exp(tl.minimum(-u2, 80.0)))  # beyond, exp overflows and s is 0 anyway
        slope = 1.5957691216057308 * (1.0 + 0.134145 * square)
        dh = dy * (s + h * s * (1.0 - s) * slope)
        store(dh_ptr + offsets, dh, mask=mask)
        sums += dh
    partial = tl.sum(sums, axis=0)
    tl.store(partial_ptr + tl.program_id(0).to(tl.int64) * dim + columns, partial, mask=inside)


@custom_op("speed_kernels::gelu_backward", mutates_args=())
def _gelu_backward(dy: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """dh and (J, D) partial sums of it."""
    dh, partial = _allocate_backward(h)
    num_rows, dim = h.numel() // max(h.shape[-1], 1), h.shape[-1]
    if h.numel():
        with torch.cuda.device_of(h):
            _gelu_backward_kernel[(len(partial), triton.cdiv(dim, TILE_COLUMNS))](
                dy.contiguous(), h.contiguous(), dh, partial, num_rows, dim,
                ROWS=ROWS, TILE_ROWS=TILE_ROWS, TILE_COLUMNS=TILE_COLUMNS, STAGES=STAGES,
            )  # fmt: skip
    return dh, partial


@_gelu_backward.register_fake
def _(dy, h):
    return _allocate_backward(h)


def _allocate_backward(h: Tensor) -> tuple[Tensor, Tensor]:
    dim = h.shape[-1]
    chunks = -(-h.shape[:-1].numel() // ROWS)
    partial = torch.empty((chunks, dim), dtype=torch.float32, device=h.device)
    return torch.empty_like(h, memory_format=torch.contiguous_format), partial


# Autograd.


def _setup_context(ctx, inputs, output):
    h, bias = inputs
    ctx.bias_dtype = bias.dtype
    ctx.save_for_backward(h)


@once_differentiable
def _backward(ctx, dy):
    (h,) = ctx.saved_tensors
    dh, partial = _gelu_backward(dy, h)
    return dh, partial.sum(dim=0).to(ctx.bias_dtype)


_gelu.register_autograd(_backward, setup_context=_setup_context)
