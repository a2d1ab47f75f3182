"""Queries, keys and values as heads of one projection, whose gradients return to it in one pass.

    forward     q, k, v = the three (B, H, N, K) views of qkv (B, N, 3 H K)
    backward    dqkv    = dq, dk, dv side by side
                dbias   = sum over B and N of dqkv         see ``deferred_bias``

Letters: B images, N tokens, H heads, K width of one, D = H K, R = B N rows, J chunks of R.
Saved for backward: nothing.
Traffic, in (R, D) tensors: forward none; backward reads dq, dk, dv, writes dqkv, three; besides,
3 / ROWS float32 ones of partial sums.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.library import custom_op

from speed_kernels.deferred_bias import with_bias_gradient
from speed_kernels.language import runs_kernels, tl, triton

# Rows that a program sums into one partial sum, and the tile that it holds. Not tuned on a GPU.
ROWS, TILE_ROWS, TILE_COLUMNS = 128, 8, 128
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # others go through the reference


def split_heads_reference(
    qkv: Tensor, num_heads: int, bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition of ``split_heads`` in plain PyTorch."""
    return _views(with_bias_gradient(qkv, bias), num_heads)


def split_heads(
    qkv: Tensor, num_heads: int, bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Heads of a packed projection; differentiable once where there is a bias.

    Args:
        qkv: (B, N, 3 H K).
        num_heads: H.
        bias: (3 H K,), what the projection has added to qkv, see ``deferred_bias``.

    Returns:
        q, k, v, each (B, H, N, K), views of ``qkv``. Their gradients cost least where a row (b, n)
        of theirs is contiguous, as those of flash attention are; others are copied first.
    """
    if qkv.dim() != 3 or qkv.shape[-1] % (3 * num_heads):
        raise ValueError(
            f"split_heads: qkv must be (B, N, 3 H K) with H={num_heads}; got {tuple(qkv.shape)}."
        )
    if bias is not None and bias.shape != qkv.shape[-1:]:
        raise ValueError(f"split_heads: bias must be ({qkv.shape[-1]},); got {tuple(bias.shape)}.")
    if bias is None or qkv.dtype not in DTYPES or not runs_kernels(qkv):
        return split_heads_reference(qkv, num_heads, bias)
    return _SplitHeads.apply(qkv, num_heads, bias)


def _views(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    heads = qkv.unflatten(-1, (3, num_heads, -1))
    q, k, v = heads.permute(2, 0, 3, 1, 4)
    return q, k, v


# Backward: one program per ROWS rows and TILE_COLUMNS columns of the three; PyTorch adds their
# partial sums.


@triton.jit
def _pack_kernel(
    dq_ptr, dk_ptr, dv_ptr, dqkv_ptr, partial_ptr, num_rows, dim,
    ROWS: tl.constexpr, TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    inside = columns < dim
    sum_q = tl.zeros((TILE_ROWS, TILE_COLUMNS), dtype=tl.float32)
    sum_k = tl.zeros((TILE_ROWS, TILE_COLUMNS), dtype=tl.float32)
    sum_v = tl.zeros((TILE_ROWS, TILE_COLUMNS), dtype=tl.float32)
    for i in range(0, ROWS, TILE_ROWS):
        rows = chunk * ROWS + i + tl.arange(0, TILE_ROWS)
        mask = (rows < num_rows)[:, None] & inside[None, :]
        offsets = rows[:, None] * dim + columns[None, :]
        dq = tl.load(dq_ptr + offsets, mask=mask, other=0.0)
        dk = tl.load(dk_ptr + offsets, mask=mask, other=0.0)
        dv = tl.load(dv_ptr + offsets, mask=mask, other=0.0)

        packed = rows[:, None] * (3 * dim) + columns[None, :]
        tl.store(dqkv_ptr + packed, dq, mask=mask)
        tl.store(dqkv_ptr + packed + dim, dk, mask=mask)
        tl.store(dqkv_ptr + packed + 2 * dim, dv, mask=mask)
        sum_q += dq.to(tl.float32)
        sum_k += dk.to(tl.float32)
        sum_v += dv.to(tl.float32)

    sums_ptr = partial_ptr + chunk * (3 * dim) + columns
    tl.store(sums_ptr, tl.sum(sum_q, axis=0), mask=inside)
    tl.store(sums_ptr + dim, tl.sum(sum_k, axis=0), mask=inside)
    tl.store(sums_ptr + 2 * dim, tl.sum(sum_v, axis=0), mask=inside)


@custom_op("speed_kernels::pack_heads", mutates_args=())
def _pack_heads(dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor, Tensor]:
    """(B, N, D) each -> dqkv (B, N, 3 D) and (J, 3 D) partial sums of it."""
    dqkv, partial = _allocate(dq)
    batch, num_tokens, dim = dq.shape
    if dq.numel():
        with torch.cuda.device_of(dq):
            _pack_kernel[(len(partial), triton.cdiv(dim, TILE_COLUMNS))](
                dq.contiguous(), dk.contiguous(), dv.contiguous(), dqkv, partial,
                batch * num_tokens, dim,
                ROWS=ROWS, TILE_ROWS=TILE_ROWS, TILE_COLUMNS=TILE_COLUMNS,
            )  # fmt: skip
    return dqkv, partial


@_pack_heads.register_fake
def _(dq, dk, dv):
    return _allocate(dq)


def _allocate(dq: Tensor) -> tuple[Tensor, Tensor]:
    batch, num_tokens, dim = dq.shape
    chunks = -(-batch * num_tokens // ROWS)
    partial = torch.empty((chunks, 3 * dim), dtype=torch.float32, device=dq.device)
    return torch.empty((batch, num_tokens, 3 * dim), dtype=dq.dtype, device=dq.device), partial


# Autograd. Not of a ``custom_op``, whose outputs may not be views of its inputs.


class _SplitHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, num_heads, bias):
        ctx.bias_dtype = bias.dtype
        return _views(qkv, num_heads)

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients):
        dq, dk, dv = (gradient.transpose(1, 2).flatten(2) for gradient in gradients)
        dqkv, partial = _pack_heads(dq, dk, dv)
        return dqkv, None, partial.sum(dim=0).to(ctx.bias_dtype)
