"""Group norm, optionally scaled and shifted per image, and SiLU, as in the blocks of a U-Net.

    forward     x_hat = (x - mean) rstd                    mean, variance over S and a group of C
                a     = weight (1 + scale),  b = bias (1 + scale) + shift
                z     = a x_hat + b,  y = z sigmoid(z)     (without scale and shift they are 0)
    backward    dz    = dy sigmoid(z) (1 + z (1 - sigmoid(z)))
                s1, s2 = sums over S of dz, dz x_hat
                dx    = rstd (a dz - mean(a dz) - x_hat mean(a dz x_hat))       means as above
                dshift = s1,  dscale = weight s2 + bias s1
                dweight, dbias = sums over B of (1 + scale) s2, (1 + scale) s1

Letters: B images, C channels, S positions in space, G groups, J chunks of S.
x is (B, C, S...), stored with S innermost (contiguous) or C innermost (channels last); either is
read as it lies, and the result lies the same way.
Saved for backward: x and per group mean and rstd in float32; z is computed again.
Traffic, in tensors like x: forward reads x twice and writes y; backward reads x and dy twice and
writes dx; besides, 2 J float32 partial sums per image and channel, which a kernel of one program
per image and group adds, so that the result does not depend on scheduling.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.library import custom_op

from speed_kernels.language import runs_kernels, store, tl, triton

TILE, NUM_WARPS = 2048, 8  # elements that a program holds, 8 per thread; not tuned on a GPU
TILES = 8  # along S, that it walks through; not tuned on a GPU
CHANNELS = 64  # at most in a tile where they are innermost: 128 bytes of a 16-bit dtype
PARTIALS = 2048  # sums that a program adds at a time
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # others go through the reference


def group_norm_silu_reference(
    x: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """The definition of ``group_norm_silu`` in plain PyTorch."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    z = torch.group_norm(wide, num_groups, weight.to(wide.dtype), bias.to(wide.dtype), eps)
    if scale is not None and shift is not None:
        per_image = (*scale.shape, *[1] * (x.dim() - 2))
        z = z * (1 + scale.view(per_image)) + shift.view(per_image)
    return torch.nn.functional.silu(z).to(x.dtype)


def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Normalise each group of channels, scale and shift, apply SiLU; differentiable once.

    Args:
        x: (B, C, S...), contiguous or channels last. Copied first if neither.
        num_groups: G, divides C.
        weight: (C,) scale; may be float32 beside a narrower x.
        bias: (C,) added after scaling.
        scale: (B, C), zero means identity; rows may be strided, as from ``chunk``.
        shift: (B, C), given if and only if scale is.
        eps: added to the variance.

    Returns:
        Like ``x``, in its dtype and memory format; computed in float32 whatever the dtype.
    """
    _check(x, num_groups, weight, bias, scale, shift)
    if x.dtype not in DTYPES or not runs_kernels(x):
        return group_norm_silu_reference(x, num_groups, weight, bias, scale, shift, eps)
    return _group_norm_silu(x, num_groups, weight, bias, scale, shift, eps)[0]


def _check(
    x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, scale: Tensor | None,
    shift: Tensor | None,
) -> None:  # fmt: skip
    if x.dim() < 3 or not x.is_floating_point():
        raise ValueError(
            "group_norm_silu: x must be (B, C, S...), at least one S, and floating; got "
            f"{x.dtype} {tuple(x.shape)}."
        )
    batch, channels = x.shape[:2]
    if num_groups < 1 or channels % num_groups:
        raise ValueError(
            f"group_norm_silu: num_groups={num_groups} does not divide the {channels} channels."
        )
    if (scale is None) != (shift is None):
        raise ValueError("group_norm_silu: give both scale and shift, or neither.")
    needed = {"weight": (weight, (channels,)), "bias": (bias, (channels,))}
    if scale is not None and shift is not None:
        needed |= {"scale": (scale, (batch, channels)), "shift": (shift, (batch, channels))}
    for name, (tensor, shape) in needed.items():
        if tensor.shape != shape or tensor.device != x.device or not tensor.is_floating_point():
            raise ValueError(
                f"group_norm_silu: x is {tuple(x.shape)} on {x.device}, so {name} must be {shape}, "
                f"floating, there; got {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}."
            )
    if weight.dtype != bias.dtype:
        raise ValueError(
            f"group_norm_silu: weight is {weight.dtype} and bias {bias.dtype}; cast one of them."
        )


# Tiles: a program takes BLOCK_C channels of one image and TILES times BLOCK_S positions of them.


@triton.jit
def _place(
    channels, positions, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, TILES: tl.constexpr
):  # fmt: skip
    """Program -> image, chunk, first position, (BLOCK_C,) channels; int64: x can pass 2**31."""
    blocks, chunks = tl.cdiv(channels, BLOCK_C), tl.cdiv(positions, TILES * BLOCK_S)
    rows, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    columns = (block * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    chunk = (rows % chunks).to(tl.int64)
    return (rows // chunks).to(tl.int64), chunk, chunk * (TILES * BLOCK_S), columns


@triton.jit
def _offsets(columns, rows, channels, positions, CHANNELS_LAST: tl.constexpr):
    """(BLOCK_S, BLOCK_C) offsets in one image, and which of them are inside."""
    mask = (rows < positions)[:, None] & (columns < channels)[None, :]
    if CHANNELS_LAST:
        return rows[:, None] * channels + columns[None, :], mask
    else:
        return rows[:, None] + columns[None, :] * positions, mask


@triton.jit
def _affine(
    weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_stride, shift_stride,
    image, columns, inside, HAS_SCALE: tl.constexpr,
):  # fmt: skip
    """a, b of z = a x_hat + b, per channel."""
    a = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    if HAS_SCALE:
        scale = tl.load(scale_ptr + image * scale_stride + columns, mask=inside, other=0.0)
        shift = tl.load(shift_ptr + image * shift_stride + columns, mask=inside, other=0.0)
        factor = scale.to(tl.float32) + 1.0
        a, b = a * factor, b * factor + shift.to(tl.float32)
    return a, b


@triton.jit
def _per_channel(values_ptr, image, columns, inside, channels, num_groups):
    """(B, G) values of the channels' groups."""
    group = columns // (channels // num_groups)
    return tl.load(values_ptr + image * num_groups + group, mask=inside, other=0.0)


@triton.jit
def _slope(z, dy):
    """dz where y = SiLU(z)."""
    sigmoid = 1.0 / (1.0 + tl.exp(-z))
    return dy * sigmoid * (1.0 + z * (1.0 - sigmoid))


# Forward: mean and squared deviation of each channel's chunks, of each group, then y.


@triton.jit
def _group_norm_moments_kernel(
    x_ptr, partial_ptr, channels, positions,
    CHANNELS_LAST: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    image, chunk, begin, columns = _place(channels, positions, BLOCK_S, BLOCK_C, TILES)
    inside = columns < channels
    x_ptr += image * channels * positions
    # Sums of differences from a value of the channel, which do not cancel where its mean is large.
    first, _ = _offsets(columns, begin + tl.arange(0, 1), channels, positions, CHANNELS_LAST)
    pivot = tl.load(x_ptr + first, mask=inside[None, :], other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK_S, BLOCK_C), dtype=tl.float32)
    squares = tl.zeros((BLOCK_S, BLOCK_C), dtype=tl.float32)
    for i in range(TILES):
        if begin + i * BLOCK_S < positions:
            rows = begin + i * BLOCK_S + tl.arange(0, BLOCK_S)
            offsets, mask = _offsets(columns, rows, channels, positions, CHANNELS_LAST)
            x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
            difference = tl.where(mask, x - pivot, 0.0)
            total += difference
            squares += difference * difference

    count = tl.minimum(positions - begin, TILES * BLOCK_S).to(tl.float32)
    mean = tl.sum(total, axis=0) / count
    deviation = tl.maximum(tl.sum(squares, axis=0) - mean * mean * count, 0.0)
    sums = partial_ptr + (image * tl.cdiv(positions, TILES * BLOCK_S) + chunk) * 2 * channels
    tl.store(sums + columns, tl.sum(pivot, axis=0) + mean, mask=inside)
    tl.store(sums + channels + columns, deviation, mask=inside)


@triton.jit
def _group_norm_statistics_kernel(
    partial_ptr, mean_ptr, rstd_ptr, channels, num_groups, positions, chunk_size, eps,
    NUM_CHUNKS: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    image, group = (tl.program_id(0) // num_groups).to(tl.int64), tl.program_id(0) % num_groups
    width = channels // num_groups
    columns = group * width + tl.arange(0, BLOCK_C)
    inside = (tl.arange(0, BLOCK_C) < width)[None, :]
    partial_ptr += image * NUM_CHUNKS * 2 * channels + columns[None, :]
    count = tl.full((), positions, tl.float32) * width
    total = tl.zeros((BLOCK_J, BLOCK_C), dtype=tl.float32)
    for j in range(0, NUM_CHUNKS, BLOCK_J):
        chunks = (j + tl.arange(0, BLOCK_J))[:, None]
        share = tl.minimum(positions - chunks * chunk_size, chunk_size).to(tl.float32) / count
        mask = (chunks < NUM_CHUNKS) & inside
        sums = partial_ptr + chunks.to(tl.int64) * 2 * channels
        total += share * tl.load(sums, mask=mask, other=0.0)
    mean = tl.sum(tl.sum(total, axis=1), axis=0)

    deviation = tl.zeros((BLOCK_J, BLOCK_C), dtype=tl.float32)
    for j in range(0, NUM_CHUNKS, BLOCK_J):
        chunks = (j + tl.arange(0, BLOCK_J))[:, None]
        share = tl.minimum(positions - chunks * chunk_size, chunk_size).to(tl.float32) / count
        mask = (chunks < NUM_CHUNKS) & inside
        sums = partial_ptr + chunks.to(tl.int64) * 2 * channels
        distance = tl.load(sums, mask=mask, other=0.0) - mean
        inner = tl.load(sums + channels, mask=mask, other=0.0)
        deviation += tl.where(mask, inner / count + share * distance * distance, 0.0)
    variance = tl.sum(tl.sum(deviation, axis=1), axis=0)
    tl.store(mean_ptr + tl.program_id(0), mean)
    tl.store(rstd_ptr + tl.program_id(0), 1.0 / tl.sqrt(variance + eps))


@triton.jit
def _group_norm_forward_kernel(
    x_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr,
    scale_stride, shift_stride, y_ptr, channels, num_groups, positions,
    HAS_SCALE: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    image, _, begin, columns = _place(channels, positions, BLOCK_S, BLOCK_C, TILES)
    inside = columns < channels
    x_ptr += image * channels * positions
    y_ptr += image * channels * positions
    mean = _per_channel(mean_ptr, image, columns, inside, channels, num_groups)[None, :]
    rstd = _per_channel(rstd_ptr, image, columns, inside, channels, num_groups)[None, :]
    a, b = _affine(
        weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_stride, shift_stride,
        image, columns, inside, HAS_SCALE,
    )  # fmt: skip
    for i in range(TILES):
        if begin + i * BLOCK_S < positions:
            rows = begin + i * BLOCK_S + tl.arange(0, BLOCK_S)
            offsets, mask = _offsets(columns, rows, channels, positions, CHANNELS_LAST)
            x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
            z = (x - mean) * rstd * a[None, :] + b[None, :]
            store(y_ptr + offsets, z / (1.0 + tl.exp(-z)), mask=mask)


@custom_op("speed_kernels::group_norm_silu", mutates_args=())
def _group_norm_silu(
    x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, scale: Tensor | None,
    shift: Tensor | None, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    x = _dense(x)
    batch, channels = x.shape[:2]
    y = torch.empty_like(x)
    mean = torch.empty((batch, num_groups), dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    if x.numel():
        positions = x[0, 0].numel()
        tile, chunk_size = tiles(channels, positions, _channels_last(x))
        num_chunks = -(-positions // chunk_size)
        programs = batch * num_chunks * -(-channels // tile["BLOCK_C"])
        partial = torch.empty(
            (batch, num_chunks, 2, channels), dtype=torch.float32, device=x.device
        )
        with torch.cuda.device_of(x):
            _group_norm_moments_kernel[(programs,)](x, partial, channels, positions, **tile)
            _group_norm_statistics_kernel[(batch * num_groups,)](
                partial, mean, rstd, channels, num_groups, positions, chunk_size, eps,
                **partials(num_chunks, channels // num_groups),
            )  # fmt: skip
            _group_norm_forward_kernel[(programs,)](
                x, mean, rstd, *_modulation(weight, bias, scale, shift), y, channels, num_groups,
                positions, HAS_SCALE=scale is not None, **tile,
            )  # fmt: skip
    return y, mean, rstd


@_group_norm_silu.register_fake
def _(x, num_groups, weight, bias, scale, shift, eps):
    mean = x.new_empty((x.shape[0], num_groups), dtype=torch.float32)
    return torch.empty_like(_dense(x)), mean, torch.empty_like(mean)


# Backward: sums of each channel's chunks, of each channel and group, then dx.


@triton.jit
def _group_norm_backward_sums_kernel(
    dy_ptr, x_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr,
    scale_stride, shift_stride, partial_ptr, channels, num_groups, positions,
    HAS_SCALE: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    image, chunk, begin, columns = _place(channels, positions, BLOCK_S, BLOCK_C, TILES)
    inside = columns < channels
    x_ptr += image * channels * positions
    dy_ptr += image * channels * positions
    mean = _per_channel(mean_ptr, image, columns, inside, channels, num_groups)[None, :]
    rstd = _per_channel(rstd_ptr, image, columns, inside, channels, num_groups)[None, :]
    a, b = _affine(
        weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_stride, shift_stride,
        image, columns, inside, HAS_SCALE,
    )  # fmt: skip
    s1 = tl.zeros((BLOCK_S, BLOCK_C), dtype=tl.float32)
    s2 = tl.zeros((BLOCK_S, BLOCK_C), dtype=tl.float32)
    for i in range(TILES):
        if begin + i * BLOCK_S < positions:
            rows = begin + i * BLOCK_S + tl.arange(0, BLOCK_S)
            offsets, mask = _offsets(columns, rows, channels, positions, CHANNELS_LAST)
            x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
            dy = tl.load(dy_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
            x_hat = (x - mean) * rstd
            dz = _slope(x_hat * a[None, :] + b[None, :], dy)  # zero outside, as dy is
            s1 += dz
            s2 += dz * x_hat

    sums = partial_ptr + (image * tl.cdiv(positions, TILES * BLOCK_S) + chunk) * 2 * channels
    tl.store(sums + columns, tl.sum(s1, axis=0), mask=inside)
    tl.store(sums + channels + columns, tl.sum(s2, axis=0), mask=inside)


@triton.jit
def _group_norm_backward_statistics_kernel(
    partial_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_stride, shift_stride,
    daffine_ptr, dmodulation_ptr, mean_g_ptr, mean_gx_ptr, batch, channels, num_groups, positions,
    HAS_SCALE: tl.constexpr, NUM_CHUNKS: tl.constexpr, BLOCK_J: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    image, group = (tl.program_id(0) // num_groups).to(tl.int64), tl.program_id(0) % num_groups
    width = channels // num_groups
    columns = group * width + tl.arange(0, BLOCK_C)
    inside = tl.arange(0, BLOCK_C) < width
    partial_ptr += image * NUM_CHUNKS * 2 * channels + columns[None, :]
    s1 = tl.zeros((BLOCK_J, BLOCK_C), dtype=tl.float32)
    s2 = tl.zeros((BLOCK_J, BLOCK_C), dtype=tl.float32)
    for j in range(0, NUM_CHUNKS, BLOCK_J):
        chunks = (j + tl.arange(0, BLOCK_J))[:, None]
        mask = (chunks < NUM_CHUNKS) & inside[None, :]
        sums = partial_ptr + chunks.to(tl.int64) * 2 * channels
        s1 += tl.load(sums, mask=mask, other=0.0)
        s2 += tl.load(sums + channels, mask=mask, other=0.0)
    s1, s2 = tl.sum(s1, axis=0), tl.sum(s2, axis=0)

    a, _ = _affine(
        weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_stride, shift_stride,
        image, columns, inside, HAS_SCALE,
    )  # fmt: skip
    count = tl.full((), positions, tl.float32) * width
    tl.store(mean_g_ptr + tl.program_id(0), tl.sum(a * s1, axis=0) / count)
    tl.store(mean_gx_ptr + tl.program_id(0), tl.sum(a * s2, axis=0) / count)
    second = tl.full((), batch, tl.int64) * channels  # of two (B, C)
    dmodulation_ptr += image * channels + columns
    daffine_ptr += image * channels + columns
    if HAS_SCALE:
        weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
        bias = tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
        tl.store(dmodulation_ptr, weight * s2 + bias * s1, mask=inside)
        tl.store(dmodulation_ptr + second, s1, mask=inside)
        scale = tl.load(scale_ptr + image * scale_stride + columns, mask=inside, other=0.0)
        factor = scale.to(tl.float32) + 1.0
        s1, s2 = s1 * factor, s2 * factor
    tl.store(daffine_ptr, s2, mask=inside)
    tl.store(daffine_ptr + second, s1, mask=inside)


@triton.jit
def _group_norm_backward_kernel(
    dy_ptr, x_ptr, mean_ptr, rstd_ptr, mean_g_ptr, mean_gx_ptr, weight_ptr, bias_ptr, scale_ptr,
    shift_ptr, scale_stride, shift_stride, dx_ptr, channels, num_groups, positions,
    HAS_SCALE: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    image, _, begin, columns = _place(channels, positions, BLOCK_S, BLOCK_C, TILES)
    inside = columns < channels
    x_ptr += image * channels * positions
    dy_ptr += image * channels * positions
    dx_ptr += image * channels * positions
    mean = _per_channel(mean_ptr, image, columns, inside, channels, num_groups)[None, :]
    rstd = _per_channel(rstd_ptr, image, columns, inside, channels, num_groups)[None, :]
    mean_g = _per_channel(mean_g_ptr, image, columns, inside, channels, num_groups)[None, :]
    mean_gx = _per_channel(mean_gx_ptr, image, columns, inside, channels, num_groups)[None, :]
    a, b = _affine(
        weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_stride, shift_stride,
        image, columns, inside, HAS_SCALE,
    )  # fmt: skip
    for i in range(TILES):
        if begin + i * BLOCK_S < positions:
            rows = begin + i * BLOCK_S + tl.arange(0, BLOCK_S)
            offsets, mask = _offsets(columns, rows, channels, positions, CHANNELS_LAST)
            x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
            dy = tl.load(dy_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
            x_hat = (x - mean) * rstd
            g = a[None, :] * _slope(x_hat * a[None, :] + b[None, :], dy)
            store(dx_ptr + offsets, rstd * (g - mean_g - x_hat * mean_gx), mask=mask)


@custom_op("speed_kernels::group_norm_silu_backward", mutates_args=())
def _group_norm_silu_backward(
    dy: Tensor, x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, scale: Tensor | None,
    shift: Tensor | None, mean: Tensor, rstd: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dx, dweight, dbias, and (2, B, C) dscale, dshift, of length 0 where there is no scale."""
    x = _dense(x)
    dy = _innermost_channels(dy) if _channels_last(x) else dy.contiguous()
    batch, channels = x.shape[:2]
    dx = torch.empty_like(x)
    has_scale = scale is not None
    allocate = torch.empty if x.numel() else torch.zeros
    daffine, dmodulation = (
        allocate((rows, batch, channels), dtype=torch.float32, device=x.device)
        for rows in (2, 2 if has_scale else 0)
    )
    if x.numel():
        positions = x[0, 0].numel()
        tile, chunk_size = tiles(channels, positions, _channels_last(x))
        num_chunks = -(-positions // chunk_size)
        programs = batch * num_chunks * -(-channels // tile["BLOCK_C"])
        partial = torch.empty(
            (batch, num_chunks, 2, channels), dtype=torch.float32, device=x.device
        )
        means = torch.empty((2, batch, num_groups), dtype=torch.float32, device=x.device)
        modulation = _modulation(weight, bias, scale, shift)
        with torch.cuda.device_of(x):
            _group_norm_backward_sums_kernel[(programs,)](
                dy, x, mean, rstd, *modulation, partial, channels, num_groups, positions,
                HAS_SCALE=has_scale, **tile,
            )  # fmt: skip
            _group_norm_backward_statistics_kernel[(batch * num_groups,)](
                partial, *modulation, daffine, dmodulation, means[0], means[1], batch, channels,
                num_groups, positions, HAS_SCALE=has_scale,
                **partials(num_chunks, channels // num_groups),
            )  # fmt: skip
            _group_norm_backward_kernel[(programs,)](
                dy, x, mean, rstd, means[0], means[1], *modulation, dx, channels, num_groups,
                positions, HAS_SCALE=has_scale, **tile,
            )  # fmt: skip
    dweight, dbias = (per_image.sum(dim=0).to(weight.dtype) for per_image in daffine)
    return dx, dweight, dbias, dmodulation


@_group_norm_silu_backward.register_fake
def _(dy, x, num_groups, weight, bias, scale, shift, mean, rstd):
    rows = (0 if scale is None else 2, *x.shape[:2])
    return (
        torch.empty_like(_dense(x)), weight.new_empty(weight.shape), bias.new_empty(bias.shape),
        x.new_empty(rows, dtype=torch.float32),
    )  # fmt: skip


def tiles(channels: int, positions: int, channels_last: bool) -> tuple[dict[str, int], int]:
    """Shape of a program's tiles and its warps, and how many positions it walks through."""
    block_c = triton.next_power_of_2(channels)
    block_s = triton.next_power_of_2(positions)
    if channels_last:
        block_c = min(block_c, CHANNELS)
        block_s = min(block_s, TILE // block_c)
    else:
        block_s = min(block_s, TILE // 2)
        block_c = min(block_c, TILE // block_s)
    tile = {"CHANNELS_LAST": channels_last, "BLOCK_S": block_s, "BLOCK_C": block_c, "TILES": TILES}
    return tile | {"num_warps": NUM_WARPS}, TILES * block_s


def partials(num_chunks: int, width: int) -> dict[str, int]:
    """Shape of the tiles in which a program adds a group's partial sums."""
    block_c = triton.next_power_of_2(width)
    block_j = min(triton.next_power_of_2(num_chunks), max(PARTIALS // block_c, 1))
    return {"NUM_CHUNKS": num_chunks, "BLOCK_J": block_j, "BLOCK_C": block_c}


def _modulation(
    weight: Tensor, bias: Tensor, scale: Tensor | None, shift: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, int, int]:
    weight, bias = weight.contiguous(), bias.contiguous()
    if scale is None or shift is None:  # any pointer will do where none is read
        return weight, bias, weight, bias, 0, 0
    scale, shift = (t if t.stride(-1) == 1 else t.contiguous() for t in (scale, shift))
    return weight, bias, scale, shift, scale.stride(0), shift.stride(0)


def _channels_last(x: Tensor) -> bool:
    return not x.is_contiguous() and x.movedim(1, -1).is_contiguous()


def _innermost_channels(x: Tensor) -> Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def _dense(x: Tensor) -> Tensor:
    return x if _channels_last(x) else x.contiguous()


# Autograd.


def _setup(ctx, inputs, output):
    x, num_groups, weight, bias, scale, shift, _ = inputs
    _, mean, rstd = output
    ctx.num_groups = num_groups
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x, weight, bias, scale, shift, mean, rstd)


@once_differentiable
def _backward(ctx, dy, _dmean, _drstd):
    x, *rest = ctx.saved_tensors
    scale, shift = rest[2:4]
    dx, dweight, dbias, dmodulation = _group_norm_silu_backward(dy, x, ctx.num_groups, *rest)
    if scale is None:
        return dx, None, dweight, dbias, None, None, None
    dscale, dshift = dmodulation[0].to(scale.dtype), dmodulation[1].to(shift.dtype)
    return dx, None, dweight, dbias, dscale, dshift, None


_group_norm_silu.register_autograd(_backward, setup_context=_setup)
