"""Attention of the heads of one projection, whose gradient returns to it in one pass.

    forward     q, k, v = the heads of qkv;  P = softmax(q k^T / sqrt(K));  y = P v
    backward    P  = exp(q k^T / sqrt(K) - L)          L: log of the sum of exp of a row of scores
                dP = dy v^T;  dS = P (dP - sum over K of dy y) / sqrt(K)
                dv = P^T dy;  dk = dS^T q;  dq = dS k
                dbias = sums over B and N of dq, 0 and dy       see ``deferred_bias``

The sum of dk is 0 because softmax does not notice a number that is added to a row of scores, and
that of dv is the sum of dy because a row of P sums to 1. One program computes all of a head, so
that the result depends on no order in which programs end.

Letters: B images, N tokens, H heads, K width of one, D = H K.
Saved for backward: qkv, y, L (B, H, N).
Traffic, in (B N, D) tensors: forward reads q, k, v, writes y; backward reads q, k, v, y, dy,
writes dqkv, eight. The forward is PyTorch's own kernel.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.library import custom_op
from torch.nn.attention import SDPBackend

from speed_kernels.heads import split_heads, split_heads_reference
from speed_kernels.language import INTERPRETED, rounded, runs_kernels, tl, triton

# Tokens that the kernel takes, all of an image; keys that a program meets at a time, and how far it
# reads ahead of them. Tuned on an H200: benchmarks/results/nvidia-h200/gpu_tune.json.
TOKENS, KEYS, STAGES = (64, 128, 256), 64, 3
DTYPES = (torch.bfloat16, torch.float16)  # others go through PyTorch's attention
WIDEST = 80  # of a head; beyond, a program's tiles leave the registers
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
    """Whether the gradient's kernel takes so many tokens and heads of this dtype and width here."""
    width = qkv.shape[-1] // (3 * num_heads)
    fits = qkv.shape[1] in TOKENS and width % 8 == 0 and 16 <= width <= WIDEST
    known = not qkv.is_cuda or _is_hopper(qkv.device)
    return fits and qkv.dtype in DTYPES and runs_kernels(qkv) and known


@torch.compiler.assume_constant_result
def _is_hopper(device: torch.device) -> bool:
    """An H100, H200 or GH200: elsewhere the tiles fit worse, and nothing was measured.

    False for the fake CUDA tensors of an estimate on a machine without a GPU.
    """
    return torch.cuda.is_available() and torch.cuda.get_device_capability(device)[0] == 9


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


# Forward.


@custom_op("speed_kernels::attention", mutates_args=())
def _attention(qkv: Tensor, bias: Tensor | None, num_heads: int) -> tuple[Tensor, Tensor]:
    """y (B, N, D) and L (B, H, N), by the kernel that PyTorch would choose."""
    if not qkv.numel():  # of which PyTorch's own attention answers None on a GPU
        return _allocate_forward(qkv, num_heads)
    q, k, v = split_heads_reference(qkv, num_heads)
    chosen = SDPBackend(torch._fused_sdp_choice(q, k, v)) if qkv.is_cuda else SDPBackend.MATH  # pyright: ignore[reportPrivateImportUsage]
    y, log_sum = FORWARDS[chosen](q, k, v)[:2]
    batch, tokens, dim = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    return y.transpose(1, 2).reshape(batch, tokens, dim), log_sum.reshape(batch, num_heads, tokens)


@_attention.register_fake
def _(qkv, bias, num_heads):
    return _allocate_forward(qkv, num_heads)


def _allocate_forward(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    batch, tokens, packed = qkv.shape
    log_sum = torch.empty((batch, num_heads, tokens), dtype=torch.float32, device=qkv.device)
    return torch.empty((batch, tokens, packed // 3), dtype=qkv.dtype, device=qkv.device), log_sum


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


# Backward: one program per head, which holds all queries and their gradient, and meets KEYS keys at
# a time. A width that is no power of two is two tiles, the second of which is partly empty.


@triton.jit
def _load(ptr, rows, stride, WIDTH: tl.constexpr, WIDE: tl.constexpr, REST: tl.constexpr):
    """Both tiles of rows; without a second one, the first again."""
    pointers = ptr + rows[:, None] * stride
    tile = tl.load(pointers + tl.arange(0, WIDE)[None, :])
    if REST:
        rest = WIDE + tl.arange(0, REST)
        return tile, tl.load(pointers + rest[None, :], mask=rest[None, :] < WIDTH, other=0.0)
    else:
        return tile, tile


@triton.jit
def _store(ptr, rows, stride, tile, tile_rest, WIDTH: tl.constexpr):
    """Both tiles of rows, the second one unless it is None."""
    pointers = ptr + rows[:, None] * stride
    dtype = ptr.dtype.element_ty
    WIDE: tl.constexpr = tile.shape[1]
    tl.store(pointers + tl.arange(0, WIDE)[None, :], rounded(tile, dtype))
    if tile_rest is not None:
        rest = WIDE + tl.arange(0, tile_rest.shape[1])
        tl.store(pointers + rest[None, :], rounded(tile_rest, dtype), mask=rest[None, :] < WIDTH)


@triton.jit
def _store_sums(ptr, tile, tile_rest, WIDTH: tl.constexpr):
    WIDE: tl.constexpr = tile.shape[1]
    tl.store(ptr + tl.arange(0, WIDE), tl.sum(tile, axis=0))
    if tile_rest is not None:
        rest = WIDE + tl.arange(0, tile_rest.shape[1])
        tl.store(ptr + rest, tl.sum(tile_rest, axis=0), mask=rest < WIDTH)


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
    KEYS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    image, head = (tl.program_id(0) // num_heads).to(tl.int64), tl.program_id(0) % num_heads
    dim, stride = num_heads * WIDTH, 3 * num_heads * WIDTH
    qkv_ptr += image * TOKENS * stride + head * WIDTH
    dqkv_ptr += image * TOKENS * stride + head * WIDTH
    partial_ptr += image * stride + head * WIDTH
    dy_ptr += image * TOKENS * dim + head * WIDTH
    y_ptr += image * TOKENS * dim + head * WIDTH
    tokens = tl.arange(0, TOKENS)
    dtype = qkv_ptr.dtype.element_ty

    q, q_rest = _load(qkv_ptr, tokens, stride, WIDTH, WIDE, REST)
    dy, dy_rest = _load(dy_ptr, tokens, dim, WIDTH, WIDE, REST)
    y, y_rest = _load(y_ptr, tokens, dim, WIDTH, WIDE, REST)
    delta = tl.sum(dy.to(tl.float32) * y.to(tl.float32), axis=1)
    dq = tl.zeros((TOKENS, WIDE), dtype=tl.float32)
    dq_rest = tl.zeros((TOKENS, REST if REST else 16), dtype=tl.float32)
    if REST:
        delta += tl.sum(dy_rest.to(tl.float32) * y_rest.to(tl.float32), axis=1)
        _store_sums(partial_ptr + 2 * dim, dy.to(tl.float32), dy_rest.to(tl.float32), WIDTH)
    else:
        _store_sums(partial_ptr + 2 * dim, dy.to(tl.float32), None, WIDTH)
    log_sum = LOG2_E * tl.load(log_sum_ptr + tl.program_id(0).to(tl.int64) * TOKENS + tokens)

    for j in tl.range(0, TOKENS, KEYS, num_stages=STAGES):
        keys = j + tl.arange(0, KEYS)
        k, k_rest = _load(qkv_ptr + dim, keys, stride, WIDTH, WIDE, REST)
        v, v_rest = _load(qkv_ptr + 2 * dim, keys, stride, WIDTH, WIDE, REST)
        scores = _dot(q, tl.trans(k))
        if REST:
            scores = _dot(q_rest, tl.trans(k_rest), scores)
        p = rounded(tl.exp2(scores * (scale * LOG2_E) - log_sum[:, None]), dtype)
        dv = _dot(tl.trans(p), dy)
        dv_rest = _dot(tl.trans(p), dy_rest) if REST else None
        _store(dqkv_ptr + 2 * dim, keys, stride, dv, dv_rest, WIDTH)
        dp = _dot(dy, tl.trans(v))
        if REST:
            dp = _dot(dy_rest, tl.trans(v_rest), dp)
        ds = rounded(p.to(tl.float32) * (dp - delta[:, None]) * scale, dtype)
        dq = _dot(ds, k, dq)
        if REST:
            dq_rest = _dot(ds, k_rest, dq_rest)
        dk = _dot(tl.trans(ds), q)
        dk_rest = _dot(tl.trans(ds), q_rest) if REST else None
        _store(dqkv_ptr + dim, keys, stride, dk, dk_rest, WIDTH)

    _store(dqkv_ptr, tokens, stride, dq, dq_rest if REST else None, WIDTH)
    _store_sums(partial_ptr, dq, dq_rest if REST else None, WIDTH)
    _store_sums(partial_ptr + dim, dq * 0.0, dq_rest * 0.0 if REST else None, WIDTH)


@custom_op("speed_kernels::attention_backward", mutates_args=())
def _attention_backward(
    dy: Tensor, qkv: Tensor, y: Tensor, log_sum: Tensor
) -> tuple[Tensor, Tensor]:
    """dqkv (B, N, 3 D) and (B, 3 D) partial sums of it."""
    dqkv, partial = _allocate_backward(qkv)
    batch, num_heads, tokens = log_sum.shape
    width = qkv.shape[-1] // (3 * num_heads)
    if batch:
        with torch.cuda.device_of(qkv):
            _attention_backward_kernel[(batch * num_heads,)](
                dy.contiguous(), qkv.contiguous(), y, log_sum, dqkv, partial,
                num_heads, width**-0.5, **tiles(width), TOKENS=tokens, KEYS=KEYS, STAGES=STAGES,
                num_warps=num_warps(tokens),
            )  # fmt: skip
    return dqkv, partial


@_attention_backward.register_fake
def _(dy, qkv, y, log_sum):
    return _allocate_backward(qkv)


def tiles(width: int) -> dict[str, int]:
    """Columns of the two tiles of a head, powers of two of at least 16 or none."""
    wide = 1 << (width.bit_length() - 1)
    rest = width - wide
    part = max(16, 1 << (rest - 1).bit_length()) if rest else 0
    return {"WIDTH": width, "WIDE": wide, "REST": part}


def num_warps(tokens: int) -> int:
    """So many that a thread's share of the tiles fits in its registers, or nearly."""
    return 4 if tokens == 64 else 8


def _allocate_backward(qkv: Tensor) -> tuple[Tensor, Tensor]:
    batch, _, packed = qkv.shape
    partial = torch.empty((batch, packed), dtype=torch.float32, device=qkv.device)
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
