"""Attention of the heads of one projection, whose gradient returns to it in one pass.

    forward     q, k, v = the heads of qkv;  P = softmax(q k^T / sqrt(K));  y = P v
    backward    P  = exp(q k^T / sqrt(K) - L)          L: log of the sum of exp of a row of scores
                dP = dy v^T;  dS = P (dP - sum over K of dy y)
                dv = P^T dy;  dk = dS^T q / sqrt(K);  dq = dS k / sqrt(K)
                dbias = sums over B and N of dq, 0 and dy       see ``deferred_bias``

The sum of dk is 0 because softmax does not notice a number that is added to a row of scores, and
that of dv is the sum of dy because a row of P sums to 1. The result does not depend on an order in
which programs end, unlike that of kernels that add to dq from several programs.

Letters: B images, N tokens, H heads, K width of one, D = H K.
Saved for backward: qkv, y, L (B, H, N).
Traffic, in (B N, D) tensors: forward reads q, k, v, writes y; backward reads q, k, v, y, dy,
writes dqkv, eight, where the L2 cache holds a head's for the programs that share it. The forward is
PyTorch's own kernel.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.library import custom_op
from torch.nn.attention import SDPBackend

from speed_kernels.heads import split_heads, split_heads_reference
from speed_kernels.language import INTERPRETED, rounded, runs_kernels, tl, triton

# Tokens whose gradients a program computes, those that it meets them with at a time, and of how
# many of these the memory is read ahead.
ROWS, INNER, STAGES, WARPS = 64, 32, 2, 4
DTYPES = (torch.bfloat16, torch.float16)  # others go through PyTorch's attention
WIDEST = 80  # of a head, beyond which a program's tiles leave the registers
LOG2_E = tl.constexpr(1.4426950408889634)
_INTERPRETED = tl.constexpr(INTERPRETED)


def attention_reference(qkv: Tensor, num_heads: int, bias: Tensor | None = None) -> Tensor:
    """The definition of ``attention`` in plain PyTorch."""
    return _attend(*split_heads_reference(qkv, num_heads, bias))


def attention(qkv: Tensor, num_heads: int, bias: Tensor | None = None) -> Tensor:
    """Scaled dot-product attention, all tokens of an image to all; differentiable once.

    Args:
        qkv: (B, N, 3 H K).
        num_heads: H.
        bias: (3 H K,), what the projection has added to qkv, see ``deferred_bias``.

    Returns:
        (B, N, H K) of the dtype of ``qkv``.
    """
    if torch.is_grad_enabled() and qkv.requires_grad and takes(qkv, num_heads):
        return _attention(qkv, bias, num_heads)[0]
    return _attend(*split_heads(qkv, num_heads, bias))


def takes(qkv: Tensor, num_heads: int) -> bool:
    """Whether the gradient's kernel takes heads of this dtype, number and width."""
    width = qkv.shape[-1] // (3 * num_heads)
    fits = qkv.shape[1] % ROWS == 0 and width % 8 == 0 and 16 <= width <= WIDEST
    return qkv.numel() > 0 and fits and qkv.dtype in DTYPES and runs_kernels(qkv)


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


# Forward.


@custom_op("speed_kernels::attention", mutates_args=())
def _attention(qkv: Tensor, bias: Tensor | None, num_heads: int) -> tuple[Tensor, Tensor]:
    """y (B, N, D) and L (B, H, N), by the kernel that PyTorch would choose."""
    q, k, v = split_heads_reference(qkv, num_heads)
    chosen = SDPBackend(torch._fused_sdp_choice(q, k, v)) if qkv.is_cuda else SDPBackend.MATH  # pyright: ignore[reportPrivateImportUsage]
    y, log_sum = FORWARDS[chosen](q, k, v)[:2]
    batch, tokens, dim = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    return y.transpose(1, 2).reshape(batch, tokens, dim), log_sum.reshape(batch, num_heads, tokens)


@_attention.register_fake
def _(qkv, bias, num_heads):
    batch, tokens, dim = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    log_sum = torch.empty((batch, num_heads, tokens), dtype=torch.float32, device=qkv.device)
    return torch.empty((batch, tokens, dim), dtype=qkv.dtype, device=qkv.device), log_sum


def _by_definition(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    with torch.autocast(q.device.type, enabled=False):
        scores = (q.float() * q.shape[-1] ** -0.5) @ k.float().transpose(-1, -2)
        return (scores.softmax(dim=-1) @ v.float()).to(q.dtype), scores.logsumexp(dim=-1)


# What PyTorch's attention calls itself, here for the sums that it keeps for its own gradient.
FORWARDS = {
    SDPBackend.CUDNN_ATTENTION: lambda q, k, v: torch.ops.aten._scaled_dot_product_cudnn_attention(
        q, k, v, None, True
    ),
    SDPBackend.FLASH_ATTENTION: torch.ops.aten._scaled_dot_product_flash_attention,
    SDPBackend.EFFICIENT_ATTENTION: lambda q, k, v: (
        torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True)
    ),
    SDPBackend.MATH: _by_definition,
}


# Backward: one program per head and ROWS tokens, first as keys and values, then as queries. A width
# that is no power of two is two tiles, the second of which is partly empty.


@triton.jit
def _columns(WIDE: tl.constexpr, REST: tl.constexpr):
    return tl.arange(0, WIDE), WIDE + tl.arange(0, REST)


@triton.jit
def _load(ptr, rows, stride, WIDTH: tl.constexpr, WIDE: tl.constexpr, REST: tl.constexpr):
    """Two tiles of rows, the second empty where REST is 0."""
    wide, rest = _columns(WIDE, REST if REST else 16)
    inside = (rest[None, :] < WIDTH) & (REST > 0)
    tile = tl.load(ptr + rows[:, None] * stride + wide[None, :])
    if REST:
        return tile, tl.load(ptr + rows[:, None] * stride + rest[None, :], mask=inside, other=0.0)
    else:
        return tile, tile


@triton.jit
def _store(
    ptr, rows, stride, tile, tile_rest,
    WIDTH: tl.constexpr, WIDE: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    wide, rest = _columns(WIDE, REST if REST else 16)
    dtype = ptr.dtype.element_ty
    tl.store(ptr + rows[:, None] * stride + wide[None, :], rounded(tile, dtype))
    if REST:
        offsets = rows[:, None] * stride + rest[None, :]
        tl.store(ptr + offsets, rounded(tile_rest, dtype), mask=rest[None, :] < WIDTH)


@triton.jit
def _store_sums(ptr, tile, tile_rest, WIDTH: tl.constexpr, WIDE: tl.constexpr, REST: tl.constexpr):
    wide, rest = _columns(WIDE, REST if REST else 16)
    tl.store(ptr + wide, tl.sum(tile.to(tl.float32), axis=0))
    if REST:
        tl.store(ptr + rest, tl.sum(tile_rest.to(tl.float32), axis=0), mask=rest < WIDTH)


@triton.jit
def _dot(a, b, sums=None):
    """a b + sums in float32; the interpreter would multiply the bits of bfloat16."""
    if _INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), sums)
    else:
        return tl.dot(a, b, sums)


@triton.jit
def _attention_backward_kernel(
    dy_ptr, qkv_ptr, y_ptr, log_sum_ptr, dqkv_ptr, partial_ptr, num_heads, scale,
    WIDTH: tl.constexpr, WIDE: tl.constexpr, REST: tl.constexpr, TOKENS: tl.constexpr,
    ROWS: tl.constexpr, INNER: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    image, head = (tl.program_id(1) // num_heads).to(tl.int64), tl.program_id(1) % num_heads
    dim, stride = num_heads * WIDTH, 3 * num_heads * WIDTH
    log_sum_ptr += tl.program_id(1).to(tl.int64) * TOKENS
    dy_ptr += image * TOKENS * dim + head * WIDTH
    y_ptr += image * TOKENS * dim + head * WIDTH
    qkv_ptr += image * TOKENS * stride + head * WIDTH
    dqkv_ptr += image * TOKENS * stride + head * WIDTH
    partial_ptr += (image * tl.num_programs(0) + tl.program_id(0)) * stride + head * WIDTH
    mine = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    dtype = qkv_ptr.dtype.element_ty
    TAIL: tl.constexpr = REST if REST else 16

    k, k_rest = _load(qkv_ptr + dim, mine, stride, WIDTH, WIDE, REST)
    v, v_rest = _load(qkv_ptr + 2 * dim, mine, stride, WIDTH, WIDE, REST)
    dk = tl.zeros((ROWS, WIDE), dtype=tl.float32)
    dv = tl.zeros((ROWS, WIDE), dtype=tl.float32)
    dk_rest = tl.zeros((ROWS, TAIL), dtype=tl.float32)
    dv_rest = tl.zeros((ROWS, TAIL), dtype=tl.float32)
    for i in tl.range(0, TOKENS, INNER, num_stages=STAGES):
        queries = i + tl.arange(0, INNER)
        q, q_rest = _load(qkv_ptr, queries, stride, WIDTH, WIDE, REST)
        dy, dy_rest = _load(dy_ptr, queries, dim, WIDTH, WIDE, REST)
        y, y_rest = _load(y_ptr, queries, dim, WIDTH, WIDE, REST)
        log_sum = LOG2_E * tl.load(log_sum_ptr + queries)
        delta = tl.sum(dy.to(tl.float32) * y.to(tl.float32), axis=1)
        scores = _dot(k, tl.trans(q))
        dp = _dot(v, tl.trans(dy))
        if REST:
            delta += tl.sum(dy_rest.to(tl.float32) * y_rest.to(tl.float32), axis=1)
            scores = _dot(k_rest, tl.trans(q_rest), scores)
            dp = _dot(v_rest, tl.trans(dy_rest), dp)
        p = tl.exp2(scores * (scale * LOG2_E) - log_sum[None, :])
        ds = rounded(p * (dp - delta[None, :]), dtype)
        dv = _dot(rounded(p, dtype), dy, dv)
        dk = _dot(ds, q, dk)
        if REST:
            dv_rest = _dot(rounded(p, dtype), dy_rest, dv_rest)
            dk_rest = _dot(ds, q_rest, dk_rest)
    _store(dqkv_ptr + dim, mine, stride, dk * scale, dk_rest * scale, WIDTH, WIDE, REST)
    _store(dqkv_ptr + 2 * dim, mine, stride, dv, dv_rest, WIDTH, WIDE, REST)

    q_mine, q_mine_rest = _load(qkv_ptr, mine, stride, WIDTH, WIDE, REST)
    dy_mine, dy_mine_rest = _load(dy_ptr, mine, dim, WIDTH, WIDE, REST)
    y_mine, y_mine_rest = _load(y_ptr, mine, dim, WIDTH, WIDE, REST)
    log_sum_mine = LOG2_E * tl.load(log_sum_ptr + mine)
    delta_mine = tl.sum(dy_mine.to(tl.float32) * y_mine.to(tl.float32), axis=1)
    if REST:
        delta_mine += tl.sum(dy_mine_rest.to(tl.float32) * y_mine_rest.to(tl.float32), axis=1)
    dq = tl.zeros((ROWS, WIDE), dtype=tl.float32)
    dq_rest = tl.zeros((ROWS, TAIL), dtype=tl.float32)
    _store_sums(partial_ptr + 2 * dim, dy_mine, dy_mine_rest, WIDTH, WIDE, REST)
    for j in tl.range(0, TOKENS, INNER, num_stages=STAGES):
        keys = j + tl.arange(0, INNER)
        k_met, k_met_rest = _load(qkv_ptr + dim, keys, stride, WIDTH, WIDE, REST)
        v_met, v_met_rest = _load(qkv_ptr + 2 * dim, keys, stride, WIDTH, WIDE, REST)
        scores_mine = _dot(q_mine, tl.trans(k_met))
        dp_mine = _dot(dy_mine, tl.trans(v_met))
        if REST:
            scores_mine = _dot(q_mine_rest, tl.trans(k_met_rest), scores_mine)
            dp_mine = _dot(dy_mine_rest, tl.trans(v_met_rest), dp_mine)
        p_mine = tl.exp2(scores_mine * (scale * LOG2_E) - log_sum_mine[:, None])
        ds_mine = rounded(p_mine * (dp_mine - delta_mine[:, None]), dtype)
        dq = _dot(ds_mine, k_met, dq)
        if REST:
            dq_rest = _dot(ds_mine, k_met_rest, dq_rest)
    _store(dqkv_ptr, mine, stride, dq * scale, dq_rest * scale, WIDTH, WIDE, REST)
    _store_sums(partial_ptr, dq * scale, dq_rest * scale, WIDTH, WIDE, REST)
    _store_sums(partial_ptr + dim, dq * 0.0, dq_rest * 0.0, WIDTH, WIDE, REST)


@custom_op("speed_kernels::attention_backward", mutates_args=())
def _attention_backward(
    dy: Tensor, qkv: Tensor, y: Tensor, log_sum: Tensor
) -> tuple[Tensor, Tensor]:
    """dqkv (B, N, 3 D) and (B N / ROWS, 3 D) partial sums of it."""
    dqkv, partial = _allocate_backward(qkv)
    batch, num_heads, tokens = log_sum.shape
    width = qkv.shape[-1] // (3 * num_heads)
    with torch.cuda.device_of(qkv):
        _attention_backward_kernel[(tokens // ROWS, batch * num_heads)](
            dy.contiguous(), qkv.contiguous(), y, log_sum, dqkv, partial,
            num_heads, width**-0.5, WIDTH=width, TOKENS=tokens,
            ROWS=ROWS, INNER=INNER, STAGES=STAGES, num_warps=WARPS, **tiles(width),
        )  # fmt: skip
    return dqkv, partial


@_attention_backward.register_fake
def _(dy, qkv, y, log_sum):
    return _allocate_backward(qkv)


def tiles(width: int) -> dict[str, int]:
    """Columns of the two tiles of a head, powers of two of at least 16 or none."""
    wide = 1 << (width.bit_length() - 1)
    rest = width - wide
    return {"WIDE": wide, "REST": max(16, 1 << (rest - 1).bit_length()) if rest else 0}


def _allocate_backward(qkv: Tensor) -> tuple[Tensor, Tensor]:
    batch, tokens, packed = qkv.shape
    partial = torch.empty(
        (batch * (tokens // ROWS), packed), dtype=torch.float32, device=qkv.device
    )
    return torch.empty_like(qkv, memory_format=torch.contiguous_format), partial


# Autograd.


def _setup_context(ctx, inputs, output):
    qkv, bias, _ = inputs
    y, log_sum = output
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.mark_non_differentiable(log_sum)
    ctx.save_for_backward(qkv, y, log_sum)


@once_differentiable
def _backward(ctx, dy, _):
    qkv, y, log_sum = ctx.saved_tensors
    dqkv, partial = _attention_backward(dy, qkv, y, log_sum)
    dbias = None if ctx.bias_dtype is None else partial.sum(dim=0).to(ctx.bias_dtype)
    return dqkv, dbias, None


_attention.register_autograd(_backward, setup_context=_setup_context)
