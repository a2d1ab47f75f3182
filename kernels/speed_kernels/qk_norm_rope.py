"""RMS norm and rotary position embedding (RoPE) of queries and keys.

    forward     x_hat = x rstd,  rstd = 1 / sqrt(mean(x^2) + eps)          mean over D
                y     = x_hat weight
                out_1 = y_1 cos_1 - y_2 sin_1,  out_2 = y_2 cos_2 + y_1 sin_2
    backward    dy_1  = dout_1 cos_1 + dout_2 sin_2,  dy_2 = dout_2 cos_2 - dout_1 sin_1
                g     = dy weight
                dx    = rstd (g - x_hat mean(g x_hat))
                dweight = sum over B, H, N of dy x_hat

1 and 2 are the halves of D ("rotate half"); which positions rotate by which angle is the tables'.

Letters: B images, H heads, N tokens, D width of a head. q and k are (B, H, N, D), read where they
are, as in the packed result of a qkv layer; what is written is stored as (B, N, H, D), which
attention takes without a copy.
Saved for backward: q and k themselves; rstd is computed again, which is cheaper than reading it.
Traffic, in (B, H, N, D) tensors: forward reads q and k and writes two; backward reads those and
two gradients and writes two; besides, 2 D float32 partial sums per HEADS x TOKENS_BACKWARD rows.
"""

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.library import custom_op

from speed_kernels.language import runs_kernels, store, tl, triton

# A program holds whole rows in registers, which spill beyond: wider ones go through the reference.
MAX_DIM = 512
TILE = 1024  # elements of either half of the heads of one token that a program holds
# Tokens that a program walks through, so that it loads the weight once and writes one partial sum.
# Not tuned on a GPU.
TOKENS_FORWARD, TOKENS_BACKWARD = 4, 16
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # others go through the reference


def qk_norm_rope_reference(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """The definition of ``qk_norm_rope`` in plain PyTorch."""
    cos, sin = (table.unsqueeze(1) if table.dim() == 3 else table for table in (cos, sin))

    def rotated(x: Tensor, weight: Tensor) -> Tensor:
        y = x.to(torch.promote_types(x.dtype, torch.float32))
        y = torch.nn.functional.rms_norm(y, y.shape[-1:], eps=eps) * weight
        first, second = y.chunk(2, dim=-1)
        return (y * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)

    return rotated(q, q_weight), rotated(k, k_weight)


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """Normalise each head's query and key, then rotate them by position; differentiable once.

    Args:
        q: (B, H, N, D) queries, D even. Copied first if their last stride is not 1.
        k: (B, H, N, D) keys, likewise.
        q_weight: (D,) scale of normalised queries; may be float32 beside narrower queries.
        k_weight: (D,) scale of normalised keys.
        cos: (N, D) float32, of the angle by which each position turns each element; (B, N, D)
            where tokens stand at other positions in every image.
        sin: float32 of the same shape, likewise.
        eps: added to the mean square.

    Returns:
        Two (B, H, N, D) in the dtype of ``q``; computed in float32 whatever the dtype.
    """
    _check(q, k, q_weight, k_weight, cos, sin)
    if q.dtype not in DTYPES or q.shape[-1] > MAX_DIM or not runs_kernels(q):
        return qk_norm_rope_reference(q, k, q_weight, k_weight, cos, sin, eps)
    return _qk_norm_rope(q, k, q_weight, k_weight, cos, sin, eps)


def _check(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor):
    if q.dim() != 4 or not q.is_floating_point() or q.shape[-1] % 2 or not q.shape[-1]:
        raise ValueError(
            "qk_norm_rope: q must be (B, H, N, D) and floating, D even; got "
            f"{q.dtype} {tuple(q.shape)}."
        )
    if (k.shape, k.dtype, k.device) != (q.shape, q.dtype, q.device):
        raise ValueError(
            f"qk_norm_rope: k must match q, {q.dtype} {tuple(q.shape)} on {q.device}; got "
            f"{k.dtype} {tuple(k.shape)} on {k.device}."
        )
    batch, _, num_tokens, dim = q.shape
    for name, weight in {"q_weight": q_weight, "k_weight": k_weight}.items():
        if weight.shape != (dim,) or weight.device != q.device or not weight.is_floating_point():
            raise ValueError(
                f"qk_norm_rope: {name} must be ({dim},), floating, on {q.device}; got "
                f"{weight.dtype} {tuple(weight.shape)} on {weight.device}."
            )
    shape = (batch, num_tokens, dim) if cos.dim() == 3 else (num_tokens, dim)
    for name, table in {"cos": cos, "sin": sin}.items():
        good = table.dtype == torch.float32 and not table.requires_grad
        if not good or table.shape != shape or table.device != q.device:
            raise ValueError(
                f"qk_norm_rope: {name} must be float32 {shape} on {q.device}, without "
                f"gradient; got {table.dtype} {tuple(table.shape)} on {table.device}, "
                f"requires_grad={table.requires_grad}."
            )


@triton.jit
def _place(num_heads, num_tokens, HEADS: tl.constexpr, TOKENS: tl.constexpr):
    """Program -> image, first token, (HEADS,) heads. All int64: B * H * N * D can pass 2**31."""
    head_blocks = tl.cdiv(num_heads, HEADS)
    rows, block = tl.program_id(0) // head_blocks, tl.program_id(0) % head_blocks
    chunks = tl.cdiv(num_tokens, TOKENS)
    heads = (block * HEADS + tl.arange(0, HEADS)).to(tl.int64)
    return (rows // chunks).to(tl.int64), (rows % chunks).to(tl.int64) * TOKENS, heads


@triton.jit
def _halves(pointers, mask, HALF: tl.constexpr):
    first = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    return first, tl.load(pointers + HALF, mask=mask, other=0.0).to(tl.float32)


# Forward: one program per image, TOKENS tokens and HEADS heads, for q or for k.


@triton.jit
def _forward_rows(
    x_ptr, weight_ptr, cos_ptr, sin_ptr, out_ptr,
    image_stride, head_stride, token_stride, num_heads, num_tokens, eps,
    UNIT: tl.constexpr, DIM: tl.constexpr, HEADS: tl.constexpr, TOKENS: tl.constexpr,
    BLOCK: tl.constexpr, PER_IMAGE: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = DIM // 2
    image, begin, heads = _place(num_heads, num_tokens, HEADS, TOKENS)
    columns = tl.arange(0, BLOCK)
    inside = columns < HALF
    mask = (heads < num_heads)[:, None] & inside[None, :]
    x_ptr += image * image_stride * UNIT
    if PER_IMAGE:
        cos_ptr += image * num_tokens * DIM
        sin_ptr += image * num_tokens * DIM
    w1, w2 = _halves(weight_ptr + columns, inside, HALF)
    for i in range(TOKENS):
        token = begin + i
        if token < num_tokens:
            rows = token * token_stride * UNIT + heads * head_stride * UNIT
            x1, x2 = _halves(x_ptr + rows[:, None] + columns[None, :], mask, HALF)
            c1, c2 = _halves(cos_ptr + token * DIM + columns, inside, HALF)
            s1, s2 = _halves(sin_ptr + token * DIM + columns, inside, HALF)

            mean_square = (tl.sum(x1 * x1, axis=1) + tl.sum(x2 * x2, axis=1)) / DIM
            rstd = (1.0 / tl.sqrt(mean_square + eps))[:, None]
            y1, y2 = x1 * rstd * w1[None, :], x2 * rstd * w2[None, :]
            rows = ((image * num_tokens + token) * num_heads + heads) * DIM
            out = out_ptr + rows[:, None] + columns[None, :]
            store(out, y1 * c1[None, :] - y2 * s1[None, :], mask=mask)
            store(out + HALF, y2 * c2[None, :] + y1 * s2[None, :], mask=mask)


@triton.jit
def _qk_norm_rope_forward_kernel(
    q_ptr, k_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, q_out_ptr, k_out_ptr,
    q_image, q_head, q_token, k_image, k_head, k_token, num_heads, num_tokens, eps,
    UNIT: tl.constexpr, DIM: tl.constexpr, HEADS: tl.constexpr, TOKENS: tl.constexpr,
    BLOCK: tl.constexpr, PER_IMAGE: tl.constexpr,
):  # fmt: skip
    if tl.program_id(1) == 0:
        _forward_rows(
            q_ptr, q_weight_ptr, cos_ptr, sin_ptr, q_out_ptr, q_image, q_head, q_token,
            num_heads, num_tokens, eps, UNIT, DIM, HEADS, TOKENS, BLOCK, PER_IMAGE,
        )  # fmt: skip
    else:
        _forward_rows(
            k_ptr, k_weight_ptr, cos_ptr, sin_ptr, k_out_ptr, k_image, k_head, k_token,
            num_heads, num_tokens, eps, UNIT, DIM, HEADS, TOKENS, BLOCK, PER_IMAGE,
        )  # fmt: skip


@custom_op("speed_kernels::qk_norm_rope", mutates_args=())
def _qk_norm_rope(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    q, k = _dense_rows(q), _dense_rows(k)
    q_out, k_out = _token_major(q), _token_major(q)
    if q.numel():
        unit, strides = _strides(q, k)
        programs, blocks = _launch(q, TOKENS_FORWARD)
        with torch.cuda.device_of(q):
            _qk_norm_rope_forward_kernel[(programs, 2)](
                q, k, q_weight.contiguous(), k_weight.contiguous(), cos.contiguous(),
                sin.contiguous(), q_out, k_out, *strides, q.shape[1], q.shape[2], eps,
                UNIT=unit, TOKENS=TOKENS_FORWARD, PER_IMAGE=cos.dim() == 3, **blocks,
            )  # fmt: skip
    return q_out, k_out


@_qk_norm_rope.register_fake
def _(q, k, q_weight, k_weight, cos, sin, eps):
    return _token_major(q), _token_major(q)


# Backward: one program as in the forward, which it reduces to one partial sum of the weight's
# gradient; PyTorch adds those, so that the result does not depend on scheduling.


@triton.jit
def _backward_rows(
    dout_ptr, x_ptr, weight_ptr, cos_ptr, sin_ptr, dx_ptr, partial_ptr,
    dout_image, dout_head, dout_token, x_image, x_head, x_token, num_heads, num_tokens, eps,
    UNIT: tl.constexpr, DIM: tl.constexpr, HEADS: tl.constexpr, TOKENS: tl.constexpr,
    BLOCK: tl.constexpr, PER_IMAGE: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = DIM // 2
    image, begin, heads = _place(num_heads, num_tokens, HEADS, TOKENS)
    columns = tl.arange(0, BLOCK)
    inside = columns < HALF
    mask = (heads < num_heads)[:, None] & inside[None, :]
    x_ptr += image * x_image * UNIT
    dout_ptr += image * dout_image * UNIT
    if PER_IMAGE:
        cos_ptr += image * num_tokens * DIM
        sin_ptr += image * num_tokens * DIM
    w1, w2 = _halves(weight_ptr + columns, inside, HALF)
    dw1 = tl.zeros((HEADS, BLOCK), dtype=tl.float32)
    dw2 = tl.zeros((HEADS, BLOCK), dtype=tl.float32)
    for i in range(TOKENS):
        token = begin + i
        if token < num_tokens:
            rows = token * x_token * UNIT + heads * x_head * UNIT
            x1, x2 = _halves(x_ptr + rows[:, None] + columns[None, :], mask, HALF)
            rows = token * dout_token * UNIT + heads * dout_head * UNIT
            d1, d2 = _halves(dout_ptr + rows[:, None] + columns[None, :], mask, HALF)
            c1, c2 = _halves(cos_ptr + token * DIM + columns, inside, HALF)
            s1, s2 = _halves(sin_ptr + token * DIM + columns, inside, HALF)

            mean_square = (tl.sum(x1 * x1, axis=1) + tl.sum(x2 * x2, axis=1)) / DIM
            rstd = (1.0 / tl.sqrt(mean_square + eps))[:, None]
            x1, x2 = x1 * rstd, x2 * rstd
            dy1 = d1 * c1[None, :] + d2 * s2[None, :]
            dy2 = d2 * c2[None, :] - d1 * s1[None, :]
            dw1 += dy1 * x1
            dw2 += dy2 * x2
            g1, g2 = dy1 * w1[None, :], dy2 * w2[None, :]
            mean_gx = ((tl.sum(g1 * x1, axis=1) + tl.sum(g2 * x2, axis=1)) / DIM)[:, None]
            rows = ((image * num_tokens + token) * num_heads + heads) * DIM
            dx = dx_ptr + rows[:, None] + columns[None, :]
            store(dx, rstd * (g1 - x1 * mean_gx), mask=mask)
            store(dx + HALF, rstd * (g2 - x2 * mean_gx), mask=mask)

    sums = partial_ptr + tl.program_id(0).to(tl.int64) * DIM + columns
    tl.store(sums, tl.sum(dw1, axis=0), mask=inside)
    tl.store(sums + HALF, tl.sum(dw2, axis=0), mask=inside)


@triton.jit
def _qk_norm_rope_backward_kernel(
    dq_out_ptr, dk_out_ptr, q_ptr, k_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr,
    dq_ptr, dk_ptr, dq_partial_ptr, dk_partial_ptr,
    dq_out_image, dq_out_head, dq_out_token, dk_out_image, dk_out_head, dk_out_token,
    q_image, q_head, q_token, k_image, k_head, k_token, num_heads, num_tokens, eps,
    UNIT: tl.constexpr, DIM: tl.constexpr, HEADS: tl.constexpr, TOKENS: tl.constexpr,
    BLOCK: tl.constexpr, PER_IMAGE: tl.constexpr,
):  # fmt: skip
    if tl.program_id(1) == 0:
        _backward_rows(
            dq_out_ptr, q_ptr, q_weight_ptr, cos_ptr, sin_ptr, dq_ptr, dq_partial_ptr,
            dq_out_image, dq_out_head, dq_out_token, q_image, q_head, q_token,
            num_heads, num_tokens, eps, UNIT, DIM, HEADS, TOKENS, BLOCK, PER_IMAGE,
        )  # fmt: skip
    else:
        _backward_rows(
            dk_out_ptr, k_ptr, k_weight_ptr, cos_ptr, sin_ptr, dk_ptr, dk_partial_ptr,
            dk_out_image, dk_out_head, dk_out_token, k_image, k_head, k_token,
            num_heads, num_tokens, eps, UNIT, DIM, HEADS, TOKENS, BLOCK, PER_IMAGE,
        )  # fmt: skip


@custom_op("speed_kernels::qk_norm_rope_backward", mutates_args=())
def _qk_norm_rope_backward(
    dq_out: Tensor, dk_out: Tensor, q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor,
    cos: Tensor, sin: Tensor, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dq_out, dk_out, q, k = (_dense_rows(tensor) for tensor in (dq_out, dk_out, q, k))
    dq, dk = _token_major(q), _token_major(q)
    programs, blocks = _launch(q, TOKENS_BACKWARD)
    partial = torch.empty((2, programs, q.shape[-1]), dtype=torch.float32, device=q.device)
    if q.numel():
        unit, strides = _strides(dq_out, dk_out, q, k)
        with torch.cuda.device_of(q):
            _qk_norm_rope_backward_kernel[(programs, 2)](
                dq_out, dk_out, q, k, q_weight.contiguous(), k_weight.contiguous(),
                cos.contiguous(), sin.contiguous(), dq, dk, partial[0], partial[1], *strides,
                q.shape[1], q.shape[2], eps, UNIT=unit, TOKENS=TOKENS_BACKWARD,
                PER_IMAGE=cos.dim() == 3, **blocks,
            )  # fmt: skip
    sums = partial.sum(dim=1)
    return dq, dk, sums[0].to(q_weight.dtype, copy=True), sums[1].to(k_weight.dtype, copy=True)


@_qk_norm_rope_backward.register_fake
def _(dq_out, dk_out, q, k, q_weight, k_weight, cos, sin, eps):
    weights = (weight.new_empty(weight.shape) for weight in (q_weight, k_weight))
    return _token_major(q), _token_major(q), *weights


def blocks(num_heads: int, dim: int) -> dict[str, int]:
    """Heads and columns of a half that a program holds, and its warps: one wide access per thread.

    The second half of a row is as aligned as D / 2 is even: 8 elements of a 16-bit dtype at D = 64,
    4 at D = 72.
    """
    block = triton.next_power_of_2(dim // 2)
    heads = min(triton.next_power_of_2(num_heads), max(TILE // block, 1))
    per_thread = max(math.gcd(8, dim // 2), 4)
    num_warps = min(max(heads * block // (32 * per_thread), 1), 8)
    return {"DIM": dim, "HEADS": heads, "BLOCK": block, "num_warps": num_warps}


def _launch(q: Tensor, tokens: int) -> tuple[int, dict[str, int]]:
    """Programs for q or for k, and their shape."""
    batch, num_heads, num_tokens, dim = q.shape
    if not q.numel():
        return 0, {}
    shape = blocks(num_heads, dim)
    return batch * -(-num_tokens // tokens) * -(-num_heads // shape["HEADS"]), shape


def _strides(*tensors: Tensor) -> tuple[int, list[int]]:
    """Image, head and token strides in a unit that the compiler knows, for wide accesses."""
    strides = [stride for tensor in tensors for stride in tensor.stride()[:3]]
    unit = math.gcd(8, *strides)
    return unit, [stride // unit for stride in strides]


def _token_major(q: Tensor) -> Tensor:
    batch, num_heads, num_tokens, dim = q.shape
    shape = (batch, num_tokens, num_heads, dim)
    return torch.empty(shape, dtype=q.dtype, device=q.device).transpose(1, 2)


def _dense_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


# Autograd.


def _setup(ctx, inputs, output):
    *tensors, eps = inputs
    ctx.eps = eps
    ctx.save_for_backward(*tensors)


@once_differentiable
def _backward(ctx, dq_out, dk_out):
    return *_qk_norm_rope_backward(dq_out, dk_out, *ctx.saved_tensors, ctx.eps), None, None, None


_qk_norm_rope.register_autograd(_backward, setup_context=_setup)
