"""Adaptive layer norm (adaLN), alone or with the gated residual sum before it.

    forward     x_out   = x + gate branch                      (without a branch, x_out is x)
                x_hat   = (x_out - mean(x_out)) rstd           mean, variance over D
                y       = x_hat (1 + scale) + shift
    backward    g       = dy (1 + scale)
                dx      = dx_out + rstd (g - mean(g) - x_hat mean(g x_hat))
                dbranch = gate dx
                dshift, dscale, dgate = sums over N of dy, dy x_hat, dx branch
    dbias = sum over B and N of dbranch                    see ``deferred_bias``

Letters: B images, N tokens, D width. x, branch, y are (B, N, D); shift, scale, gate (B, D).
Saved for backward: x_out, branch, scale, gate, mean and rstd (B, N) in float32; x_hat is computed
again, which is cheaper than reading it.
Traffic, in (B, N, D) tensors: forward reads x, branch, writes x_out, y; backward reads dy, dx_out,
x_out, branch, writes dx, dbranch; besides, 4 / TOKENS_BACKWARD float32 ones of partial sums.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.library import custom_op

from speed_kernels.deferred_bias import with_bias_gradient
from speed_kernels.language import rounded, runs_kernels, store, tl, triton, two_sums

# A program holds a token in registers, which spill beyond: wider ones go through the reference.
MAX_DIM = 4096
# Tokens of one image that a program walks through, so that it loads the modulation once and writes
# one partial sum; of STAGES of them the memory is read ahead. Tuned on an H200 at DiT-XL/2's width:
# benchmarks/results/nvidia-h200/gpu_tune.json.
TOKENS_FORWARD, TOKENS_BACKWARD = 8, 32
STAGES_FORWARD, STAGES_BACKWARD = 3, 4
READ_AHEAD = 80 * 2**10  # bytes of shared memory that this may take: all have 99 KiB from sm_80 on
ELEMENTS_FORWARD, ELEMENTS_BACKWARD = 16, 8  # per thread
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # others go through the reference


def adaln_reference(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """The definition of ``adaln`` in plain PyTorch."""
    wide = x.to(torch.promote_types(x.dtype, shift.dtype))
    x_hat = torch.nn.functional.layer_norm(wide, x.shape[-1:], eps=eps)
    return (x_hat * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)).to(shift.dtype)


def gated_residual_adaln_reference(
    x: Tensor,
    branch: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """The definition of ``gated_residual_adaln`` in plain PyTorch."""
    x_out = gated_residual_reference(x, branch, gate, bias)
    return x_out, adaln_reference(x_out, shift, scale, eps)


def gated_residual_reference(
    x: Tensor, branch: Tensor, gate: Tensor, bias: Tensor | None = None
) -> Tensor:
    """The first half of ``gated_residual_adaln``."""
    return (x + gate.unsqueeze(1) * with_bias_gradient(branch, bias)).to(x.dtype)


def adaln(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """Normalise each token, then scale and shift it per image; differentiable once.

    Args:
        x: (B, N, D) tokens. Copied first if not contiguous.
        shift: (B, D), added after scaling; rows may be strided, as from ``chunk``.
        scale: (B, D), zero means identity; of shift's dtype.
        eps: added to the variance.

    Returns:
        (B, N, D) in the dtype of ``shift``; statistics are float32 whatever the dtype.
    """
    _check("adaln", x, shift=shift, scale=scale)
    if not _kernel_takes(x, shift):
        return adaln_reference(x, shift, scale, eps)
    return _adaln(x, shift, scale, eps)[0]


def gated_residual_adaln(
    x: Tensor,
    branch: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """Add a gated branch to the residual stream and modulate the sum; differentiable once.

    Args:
        x: (B, N, D) residual stream. Copied first if not contiguous.
        branch: (B, N, D), what attention or feed-forward answered.
        gate: (B, D), factor of the branch.
        shift: (B, D), as in ``adaln``.
        scale: (B, D), as in ``adaln``.
        bias: (D,), what the linear layer before has added to the branch, see ``deferred_bias``.
        eps: added to the variance.

    Returns:
        (B, N, D) the sum in the dtype of ``x``, and (B, N, D) its modulated norm in that of
        ``shift``.
    """
    _check("gated_residual_adaln", x, gate=gate, shift=shift, scale=scale)
    if branch.shape != x.shape or branch.device != x.device:
        raise ValueError(
            f"gated_residual_adaln: branch must match x, {tuple(x.shape)} on {x.device}; got "
            f"{tuple(branch.shape)} on {branch.device}."
        )
    if bias is not None and bias.shape != x.shape[-1:]:
        raise ValueError(
            f"gated_residual_adaln: bias must be ({x.shape[-1]},); got {tuple(bias.shape)}."
        )
    if not _kernel_takes(x, branch, gate, shift):
        return gated_residual_adaln_reference(x, branch, gate, shift, scale, bias, eps)
    x_out, y, *_ = _gated_residual_adaln(x, branch, gate, shift, scale, bias, eps)
    return x_out, y


def _kernel_takes(*tensors: Tensor) -> bool:
    fits = tensors[0].shape[-1] <= MAX_DIM and all(tensor.dtype in DTYPES for tensor in tensors)
    return fits and runs_kernels(tensors[0])


def _check(caller: str, x: Tensor, **modulation: Tensor) -> None:
    if x.dim() != 3 or not x.is_floating_point():
        raise ValueError(
            f"{caller}: x must be (B, N, D) and floating; got {x.dtype} {tuple(x.shape)}."
        )
    batch, _, dim = x.shape
    for name, tensor in modulation.items():
        if tensor.shape != (batch, dim) or tensor.device != x.device:
            raise ValueError(
                f"{caller}: x is {tuple(x.shape)} on {x.device}, so {name} must be {(batch, dim)} "
                f"there; got {tuple(tensor.shape)} on {tensor.device}."
            )
    if modulation["shift"].dtype != modulation["scale"].dtype:
        raise ValueError(
            f"{caller}: shift is {modulation['shift'].dtype} and scale "
            f"{modulation['scale'].dtype}; cast one to the other's."
        )


# Forward: one program per image and TOKENS tokens.


@triton.jit
def _adaln_forward_kernel(
    x_ptr, branch_ptr, gate_ptr, shift_ptr, scale_ptr, x_out_ptr, y_ptr, mean_ptr, rstd_ptr,
    gate_stride, shift_stride, scale_stride, num_tokens, num_chunks, dim, eps,
    HAS_BRANCH: tl.constexpr, TOKENS: tl.constexpr, STAGES: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    image = (tl.program_id(0) // num_chunks).to(tl.int64)
    first = (tl.program_id(0) % num_chunks) * TOKENS
    columns = tl.arange(0, BLOCK_D)
    inside = columns < dim
    shift = tl.load(shift_ptr + image * shift_stride + columns, mask=inside, other=0.0)
    scale = tl.load(scale_ptr + image * scale_stride + columns, mask=inside, other=0.0)
    shift, factor = shift.to(tl.float32), scale.to(tl.float32) + 1.0
    if HAS_BRANCH:
        gate = tl.load(gate_ptr + image * gate_stride + columns, mask=inside, other=0.0)
        gate = gate.to(tl.float32)

    for i in tl.range(0, TOKENS, num_stages=STAGES):
        row = image * num_tokens + first + i
        here = first + i < num_tokens
        mask = inside & here
        x = tl.load(x_ptr + row * dim + columns, mask=mask, other=0.0).to(tl.float32)
        if HAS_BRANCH:
            branch = tl.load(branch_ptr + row * dim + columns, mask=mask, other=0.0)
            x_out = rounded(x + gate * branch.to(tl.float32), x_out_ptr.dtype.element_ty)
            tl.store(x_out_ptr + row * dim + columns, x_out, mask=mask)
            x = x_out.to(tl.float32)  # as the backward will read it

        mean = tl.sum(x, axis=0) / dim
        centered = tl.where(inside, x - mean, 0.0)
        rstd = 1.0 / tl.sqrt(tl.sum(centered * centered, axis=0) / dim + eps)
        store(y_ptr + row * dim + columns, centered * rstd * factor + shift, mask=mask)
        tl.store(mean_ptr + row, mean, mask=here)
        tl.store(rstd_ptr + row, rstd, mask=here)


@custom_op("speed_kernels::adaln", mutates_args=())
def _adaln(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    _, y, mean, rstd = _launch_forward(x, None, None, shift, scale, eps)
    return y, mean, rstd


@_adaln.register_fake
def _(x, shift, scale, eps):
    statistics = x.new_empty(x.shape[:2], dtype=torch.float32)
    return shift.new_empty(x.shape), statistics, torch.empty_like(statistics)


@custom_op("speed_kernels::gated_residual_adaln", mutates_args=())
def _gated_residual_adaln(
    x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return _launch_forward(x, branch, gate, shift, scale, eps)


@_gated_residual_adaln.register_fake
def _(x, branch, gate, shift, scale, bias, eps):
    statistics = x.new_empty(x.shape[:2], dtype=torch.float32)
    y = shift.new_empty(x.shape)
    return x.new_empty(x.shape), y, statistics, torch.empty_like(statistics)


def _launch_forward(
    x: Tensor, branch: Tensor | None, gate: Tensor | None, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, num_tokens, dim = x.shape
    x, shift, scale = x.contiguous(), _dense_rows(shift), _dense_rows(scale)
    has_branch = branch is not None
    branch = x if branch is None else branch.contiguous()  # any pointer will do where none is read
    gate = scale if gate is None else _dense_rows(gate)
    y = torch.empty_like(x, dtype=shift.dtype)
    x_out = torch.empty_like(x) if has_branch else x
    mean = torch.empty((batch, num_tokens), dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    if x.numel():
        num_chunks = -(-num_tokens // TOKENS_FORWARD)
        block_d = triton.next_power_of_2(dim)
        with torch.cuda.device_of(x):
            _adaln_forward_kernel[(batch * num_chunks,)](
                x, branch, gate, shift, scale, x_out, y, mean, rstd,
                gate.stride(0), shift.stride(0), scale.stride(0), num_tokens, num_chunks, dim, eps,
                HAS_BRANCH=has_branch, TOKENS=TOKENS_FORWARD,
                STAGES=stages(STAGES_FORWARD, x, branch, block_d=block_d),
                BLOCK_D=block_d, num_warps=num_warps(block_d, ELEMENTS_FORWARD),
            )  # fmt: skip
    return x_out, y, mean, rstd


# Backward: one program per image and TOKENS tokens, which it reduces to one partial sum; PyTorch
# adds those, so that the result does not depend on scheduling, and a compiler sees the addition.


@triton.jit
def _adaln_backward_kernel(
    dy_ptr, dx_out_ptr, x_out_ptr, branch_ptr, gate_ptr, scale_ptr, mean_ptr, rstd_ptr,
    dx_ptr, dbranch_ptr, partial_ptr,
    gate_stride, scale_stride, num_tokens, num_chunks, dim,
    HAS_BRANCH: tl.constexpr, HAS_DX_OUT: tl.constexpr, SUMS: tl.constexpr,
    TOKENS: tl.constexpr, STAGES: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    image = (tl.program_id(0) // num_chunks).to(tl.int64)
    first = (tl.program_id(0) % num_chunks) * TOKENS
    columns = tl.arange(0, BLOCK_D)
    inside = columns < dim
    scale = tl.load(scale_ptr + image * scale_stride + columns, mask=inside, other=0.0)
    factor = scale.to(tl.float32) + 1.0
    dshift = tl.zeros((BLOCK_D,), dtype=tl.float32)
    dscale = tl.zeros((BLOCK_D,), dtype=tl.float32)
    if HAS_BRANCH:
        gate = tl.load(gate_ptr + image * gate_stride + columns, mask=inside, other=0.0)
        gate = gate.to(tl.float32)
        dgate = tl.zeros((BLOCK_D,), dtype=tl.float32)
    if SUMS > 3:
        dbias = tl.zeros((BLOCK_D,), dtype=tl.float32)

    for i in tl.range(0, TOKENS, num_stages=STAGES):
        row = image * num_tokens + first + i
        here = first + i < num_tokens
        mask = inside & here
        dy = tl.load(dy_ptr + row * dim + columns, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_out_ptr + row * dim + columns, mask=mask, other=0.0).to(tl.float32)
        if HAS_DX_OUT:
            dx_out = tl.load(dx_out_ptr + row * dim + columns, mask=mask, other=0.0)
        if HAS_BRANCH:
            branch = tl.load(branch_ptr + row * dim + columns, mask=mask, other=0.0)
        mean = tl.load(mean_ptr + row, mask=here, other=0.0)
        rstd = tl.load(rstd_ptr + row, mask=here, other=0.0)

        x_hat = tl.where(inside, (x - mean) * rstd, 0.0)
        g = dy * factor
        sum_g, sum_gx = two_sums(g, g * x_hat)
        dx = rstd * (g - sum_g / dim - x_hat * (sum_gx / dim))
        if HAS_DX_OUT:
            dx += dx_out.to(tl.float32)
        store(dx_ptr + row * dim + columns, dx, mask=mask)
        dshift += dy
        dscale += dy * x_hat
        if HAS_BRANCH:
            store(dbranch_ptr + row * dim + columns, gate * dx, mask=mask)
            dgate += dx * branch.to(tl.float32)
        if SUMS > 3:
            dbias += gate * dx

    sums_ptr = partial_ptr + tl.program_id(0).to(tl.int64) * SUMS * dim + columns
    tl.store(sums_ptr, dshift, mask=inside)
    tl.store(sums_ptr + dim, dscale, mask=inside)
    if HAS_BRANCH:
        tl.store(sums_ptr + 2 * dim, dgate, mask=inside)
    if SUMS > 3:
        tl.store(sums_ptr + 3 * dim, dbias, mask=inside)


@custom_op("speed_kernels::adaln_backward", mutates_args=())
def _adaln_backward(
    dy: Tensor, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    """dx and (B, J, 2, D) partial sums of shift and scale over J chunks of N."""
    dx, partial = _dense(x), _partial_sums(x, 2)
    _launch_backward(dy, None, x, None, None, scale, mean, rstd, dx, None, partial)
    return dx, partial


@_adaln_backward.register_fake
def _(dy, x, scale, mean, rstd):
    return _dense(x), _partial_sums(x, 2)


@custom_op("speed_kernels::gated_residual_adaln_backward", mutates_args=())
def _gated_residual_adaln_backward(
    dy: Tensor, dx_out: Tensor | None, x_out: Tensor, branch: Tensor, gate: Tensor, scale: Tensor,
    mean: Tensor, rstd: Tensor, has_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dx, dbranch and (B, J, 3 or 4, D) partial sums of shift, scale, gate and bias."""
    dx, dbranch, partial = _dense(x_out), _dense(branch), _partial_sums(x_out, 3 + has_bias)
    _launch_backward(dy, dx_out, x_out, branch, gate, scale, mean, rstd, dx, dbranch, partial)
    return dx, dbranch, partial


@_gated_residual_adaln_backward.register_fake
def _(dy, dx_out, x_out, branch, gate, scale, mean, rstd, has_bias):
    return _dense(x_out), _dense(branch), _partial_sums(x_out, 3 + has_bias)


def _launch_backward(
    dy: Tensor, dx_out: Tensor | None, x_out: Tensor, branch: Tensor | None, gate: Tensor | None,
    scale: Tensor, mean: Tensor, rstd: Tensor,
    dx: Tensor, dbranch: Tensor | None, partial: Tensor,
) -> None:  # fmt: skip
    if not x_out.numel():
        return
    batch, num_tokens, dim = x_out.shape
    _, num_chunks, num_sums, _ = partial.shape
    dy, x_out, scale = dy.contiguous(), x_out.contiguous(), _dense_rows(scale)
    has_branch, has_dx_out = branch is not None, dx_out is not None
    dx_out = dy if dx_out is None else dx_out.contiguous()  # any pointer will do, as above
    branch = dy if branch is None else branch.contiguous()
    gate = scale if gate is None else _dense_rows(gate)
    block_d = triton.next_power_of_2(dim)
    with torch.cuda.device_of(x_out):
        _adaln_backward_kernel[(batch * num_chunks,)](
            dy, dx_out, x_out, branch, gate, scale, mean, rstd,
            dx, dx if dbranch is None else dbranch, partial,
            gate.stride(0), scale.stride(0), num_tokens, num_chunks, dim,
            HAS_BRANCH=has_branch, HAS_DX_OUT=has_dx_out, SUMS=num_sums,
            TOKENS=TOKENS_BACKWARD,
            STAGES=stages(STAGES_BACKWARD, dy, dx_out, x_out, branch, block_d=block_d),
            BLOCK_D=block_d, num_warps=num_warps(block_d, ELEMENTS_BACKWARD),
        )  # fmt: skip


def _dense(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _partial_sums(x: Tensor, num_sums: int) -> Tensor:
    """(B, J, num_sums, D) float32, for the backward kernel to fill."""
    batch, num_tokens, dim = x.shape
    shape = batch, -(-num_tokens // TOKENS_BACKWARD), num_sums, dim
    return torch.empty(shape, dtype=torch.float32, device=x.device)


def stages(wanted: int, *row: Tensor, block_d: int) -> int:
    """How many tokens of all these tensors may be in flight at once: of wide ones fewer."""
    size = block_d * sum(tensor.element_size() for tensor in row)
    return 1 + min(wanted - 1, READ_AHEAD // size)


def num_warps(block_d: int, elements: int) -> int:
    """So that a thread has that many elements."""
    return min(max(block_d // (32 * elements), 1), 16)


def _dense_rows(modulation: Tensor) -> Tensor:
    return modulation if modulation.stride(-1) == 1 else modulation.contiguous()


# Autograd.


def _setup_adaln(ctx, inputs, output):
    x, _, scale, _ = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x, scale, mean, rstd)


@once_differentiable
def _backward_of_adaln(ctx, dy, _dmean, _drstd):
    x, scale, mean, rstd = ctx.saved_tensors
    dx, partial = _adaln_backward(dy, x, scale, mean, rstd)
    dshift, dscale = partial.sum(dim=1).to(scale.dtype).unbind(1)
    return dx, dshift, dscale, None


def _setup_gated(ctx, inputs, output):
    _, branch, gate, _, scale, bias, _ = inputs
    x_out, _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)  # the last block's sum has no other use
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(x_out, branch, gate, scale, mean, rstd)


@once_differentiable
def _backward_of_gated(ctx, dx_out, dy, _dmean, _drstd):
    x_out, branch, gate, scale, mean, rstd = ctx.saved_tensors
    if dy is None:
        dy = x_out.new_zeros(x_out.shape, dtype=scale.dtype)
    dx, dbranch, partial = _gated_residual_adaln_backward(
        dy, dx_out, x_out, branch, gate, scale, mean, rstd, ctx.bias_dtype is not None
    )
    dshift, dscale, dgate, *dbias = partial.sum(dim=1).unbind(1)
    dbias = dbias[0].sum(dim=0).to(ctx.bias_dtype) if dbias else None
    modulation = dgate.to(gate.dtype), dshift.to(scale.dtype), dscale.to(scale.dtype)
    return dx, dbranch, *modulation, dbias, None


_adaln.register_autograd(_backward_of_adaln, setup_context=_setup_adaln)
_gated_residual_adaln.register_autograd(_backward_of_gated, setup_context=_setup_gated)
