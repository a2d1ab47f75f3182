"""AdamW and exponential moving averages (EMA) of its parameters in one sweep, in place.

    g     = gradient min(1, max_norm / gradient_norm)
    m     = m + (1 - beta1) (g - m)                    v = beta2 v + (1 - beta2) g^2
    p     = (1 - learning_rate weight_decay) p
            - learning_rate / (1 - beta1^step) m / (sqrt(v / (1 - beta2^step)) + eps)
    ema_h = ema_h + (1 - decay_h) (p - ema_h)          for each horizon h

Where the gradient norm is not finite nothing changes, the step count included; the device decides,
so that the host never waits for the norm.

Letters: T tensors of any shapes, H horizons. All float32.
Traffic per parameter: reads g, p, m, v and H averages, writes all but g: 28 + 8 H bytes.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.library import custom_op

from speed_kernels.language import runs_kernels, tl, triton

BLOCK = 2048  # elements of one tensor per program of 8 warps; not tuned on a GPU
_ALIGNMENT = 16  # bytes of a wide access


def adamw_ema_reference(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    first_moments: Sequence[Tensor],
    second_moments: Sequence[Tensor],
    averages: Sequence[Sequence[Tensor]],
    step: Tensor,
    gradient_norm: Tensor,
    *,
    learning_rate: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    max_norm: float,
    decays: Sequence[float],
) -> None:
    """The definition of ``adamw_ema`` in plain PyTorch."""
    finite, scale, step_size, root_scale = _device_factors(
        step, gradient_norm, learning_rate, beta1, beta2, max_norm, parameters[0].dtype
    )
    for i, (p, g, m, v) in enumerate(
        zip(parameters, gradients, first_moments, second_moments, strict=True)
    ):
        g = g * scale
        first = m + (1 - beta1) * (g - m)
        second = beta2 * v + (1 - beta2) * g * g
        value = p * (1 - learning_rate * weight_decay)
        value = value - step_size * first / (second.sqrt() * root_scale + eps)
        results = [(p, value), (m, first), (v, second)]
        for average, decay in zip(averages, decays, strict=True):
            results.append((average[i], average[i] + (1 - decay) * (value - average[i])))
        for tensor, result in results:
            tensor.copy_(torch.where(finite, result, tensor))


def adamw_ema(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    first_moments: Sequence[Tensor],
    second_moments: Sequence[Tensor],
    averages: Sequence[Sequence[Tensor]],
    step: Tensor,
    gradient_norm: Tensor,
    *,
    learning_rate: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    max_norm: float,
    decays: Sequence[float],
) -> None:
    """One update of parameters, moments, averages and step count, in place.

    Args:
        parameters: T float32 tensors; local shards of distributed ones.
        gradients: T of the same shapes, not scaled.
        first_moments: T, zero at the start.
        second_moments: T, zero at the start.
        averages: H lists of T.
        step: () int64, updates done so far; grows by one unless the update is skipped.
        gradient_norm: () float32 norm over all gradients of all ranks.
        learning_rate: of this step.
        beta1: share of the first moment kept.
        beta2: share of the second moment kept.
        eps: added to the root of the second moment.
        weight_decay: decoupled, in units of the learning rate.
        max_norm: gradients of a larger norm are scaled down to it; inf never scales.
        decays: H shares of the averages kept in this step.
    """
    _check(
        parameters, gradients, first_moments, second_moments, averages, decays, step, gradient_norm
    )
    flat = [tensor for average in averages for tensor in average]
    numbers = [learning_rate, beta1, beta2, eps, weight_decay, max_norm, *decays]
    arguments = (*map(list, (parameters, gradients, first_moments, second_moments)), flat)
    if parameters and runs_kernels(parameters[0]):
        with torch.no_grad():
            _adamw_ema(*arguments, step, gradient_norm, numbers)
    elif parameters:
        with torch.no_grad():
            adamw_ema_reference(
                parameters, gradients, first_moments, second_moments, averages, step, gradient_norm,
                learning_rate=learning_rate, beta1=beta1, beta2=beta2, eps=eps,
                weight_decay=weight_decay, max_norm=max_norm, decays=decays,
            )  # fmt: skip


def _check(parameters, gradients, first, second, averages, decays, step, gradient_norm) -> None:
    if len(averages) != len(decays):
        raise ValueError(
            f"adamw_ema: {len(averages)} lists of averages but {len(decays)} decays; give one each."
        )
    groups = {"gradients": gradients, "first_moments": first, "second_moments": second}
    groups |= {f"averages[{h}]": average for h, average in enumerate(averages)}
    for name, group in groups.items():
        if len(group) != len(parameters):
            raise ValueError(
                f"adamw_ema: {len(parameters)} parameters but {len(group)} {name}; give one each."
            )
    for name, group in {"parameters": parameters, **groups}.items():
        for i, (tensor, parameter) in enumerate(zip(group, parameters, strict=True)):
            good = tensor.dtype == torch.float32 and tensor.is_contiguous()
            if not good or tensor.shape != parameter.shape or tensor.device != step.device:
                raise ValueError(
                    f"adamw_ema: {name}[{i}] must be contiguous float32 {tuple(parameter.shape)} "
                    f"on {step.device}; got {tensor.dtype} {tuple(tensor.shape)} on "
                    f"{tensor.device}, strides {tensor.stride()}."
                )
    if step.dtype != torch.int64 or step.shape != () or gradient_norm.shape != ():
        raise ValueError(
            f"adamw_ema: step must be () int64 and gradient_norm (); got {step.dtype} "
            f"{tuple(step.shape)} and {tuple(gradient_norm.shape)}."
        )
    if gradient_norm.device != step.device:
        raise ValueError(
            f"adamw_ema: gradient_norm is on {gradient_norm.device}, step on {step.device}."
        )


def _device_factors(
    step: Tensor, norm: Tensor, learning_rate: float, beta1: float, beta2: float, max_norm: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """() each, without a synchronisation: update at all?, gradient scale, step size, 1 / root."""
    finite = norm.isfinite()
    step += finite
    count = step.double().clamp(min=1)
    scale = (max_norm / norm.double()).clamp(max=1)
    step_size = learning_rate / (1 - beta1**count)
    root_scale = (1 - beta2**count).rsqrt()
    return finite, scale.to(dtype), step_size.to(dtype), root_scale.to(dtype)


# Update: one program per tile of one tensor, found through a table of addresses.


@triton.jit
def _column(row_ptr, COLUMN: tl.constexpr, ALIGNMENT: tl.constexpr):
    address = tl.load(row_ptr + COLUMN).to(tl.pointer_type(tl.float32))
    return tl.multiple_of(address, ALIGNMENT)  # unknown otherwise, which makes every access scalar


@triton.jit
def _update_tile(
    row_ptr, factors_ptr, start, size,
    rest1, beta2, rest2, eps, kept,
    HORIZONS: tl.constexpr, ALIGNMENT: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    elements = start + tl.arange(0, BLOCK)
    if MASKED:
        mask = elements < size
    else:
        mask = tl.full((BLOCK,), True, tl.int1)
    p_ptr, g_ptr = _column(row_ptr, 0, ALIGNMENT), _column(row_ptr, 1, ALIGNMENT)
    m_ptr, v_ptr = _column(row_ptr, 2, ALIGNMENT), _column(row_ptr, 3, ALIGNMENT)
    scale, step_size = tl.load(factors_ptr + 1), tl.load(factors_ptr + 2)
    root_scale = tl.load(factors_ptr + 3)

    p = tl.load(p_ptr + elements, mask=mask, other=0.0)
    g = tl.load(g_ptr + elements, mask=mask, other=0.0) * scale
    m = tl.load(m_ptr + elements, mask=mask, other=0.0)
    v = tl.load(v_ptr + elements, mask=mask, other=0.0)
    m = m + rest1 * (g - m)
    v = beta2 * v + rest2 * g * g
    p = p * kept - step_size * m / (tl.sqrt(v) * root_scale + eps)
    tl.store(p_ptr + elements, p, mask=mask)
    tl.store(m_ptr + elements, m, mask=mask)
    tl.store(v_ptr + elements, v, mask=mask)
    for h in tl.static_range(HORIZONS):
        average_ptr = _column(row_ptr, 4 + h, ALIGNMENT)
        average = tl.load(average_ptr + elements, mask=mask, other=0.0)
        average += tl.load(factors_ptr + 4 + h) * (p - average)
        tl.store(average_ptr + elements, average, mask=mask)


@triton.jit
def _adamw_ema_kernel(
    addresses_ptr, sizes_ptr, tensor_ptr, tile_ptr, factors_ptr,
    rest1, beta2, rest2, eps, kept,
    HORIZONS: tl.constexpr, ALIGNMENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    tensor = tl.load(tensor_ptr + tl.program_id(0)).to(tl.int64)
    start = tl.load(tile_ptr + tl.program_id(0)).to(tl.int64) * BLOCK
    size = tl.load(sizes_ptr + tensor)
    row_ptr = addresses_ptr + tensor * (4 + HORIZONS)
    if tl.load(factors_ptr) != 0.0:
        if start + BLOCK <= size:  # without a mask, whose end is no multiple of 16 as far as known
            _update_tile(
                row_ptr, factors_ptr, start, size, rest1, beta2, rest2, eps, kept,
                HORIZONS, ALIGNMENT, False, BLOCK,
            )  # fmt: skip
        else:
            _update_tile(
                row_ptr, factors_ptr, start, size, rest1, beta2, rest2, eps, kept,
                HORIZONS, ALIGNMENT, True, BLOCK,
            )  # fmt: skip


@custom_op(
    "speed_kernels::adamw_ema",
    mutates_args=("parameters", "first_moments", "second_moments", "averages", "step"),
)
def _adamw_ema(
    parameters: list[Tensor],
    gradients: list[Tensor],
    first_moments: list[Tensor],
    second_moments: list[Tensor],
    averages: list[Tensor],
    step: Tensor,
    gradient_norm: Tensor,
    numbers: list[float],
) -> None:
    learning_rate, beta1, beta2, eps, weight_decay, max_norm, *decays = numbers
    device, count, horizons = step.device, len(parameters), len(decays)
    on_device = _device_factors(
        step, gradient_norm, learning_rate, beta1, beta2, max_norm, torch.float32
    )
    rests = _constants(tuple(1 - decay for decay in decays), torch.float32, device)
    factors = torch.cat([torch.stack(on_device), rests])

    by_horizon = [averages[h * count : (h + 1) * count] for h in range(horizons)]
    columns = (parameters, gradients, first_moments, second_moments, *by_horizon)
    table = tuple(t.data_ptr() for row in zip(*columns, strict=True) for t in row)
    aligned = all(address % _ALIGNMENT == 0 for address in table)
    sizes, tensors, tiles = _tiles(tuple(p.numel() for p in parameters), device)
    if len(tiles):
        with torch.cuda.device_of(step):
            _adamw_ema_kernel[(len(tiles),)](
                _constants(table, torch.int64, device), sizes, tensors, tiles, factors,
                1 - beta1, beta2, 1 - beta2, eps, 1 - learning_rate * weight_decay,
                HORIZONS=horizons, ALIGNMENT=_ALIGNMENT if aligned else 4, BLOCK=BLOCK, num_warps=8,
            )  # fmt: skip


@_adamw_ema.register_fake
def _(parameters, gradients, first_moments, second_moments, averages, step, gradient_norm, numbers):
    return None


@lru_cache(maxsize=8)
def _tiles(sizes: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """(T,) int64 sizes and, per program, int32 its tensor and its tile in there."""
    counts = torch.tensor([math.ceil(size / BLOCK) for size in sizes])
    tensors = torch.repeat_interleave(torch.arange(len(sizes)), counts)
    first = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    tiles = torch.arange(len(tensors)) - first
    return torch.tensor(sizes).to(device), tensors.int().to(device), tiles.int().to(device)


@lru_cache(maxsize=8)
def _constants(values: tuple, dtype: torch.dtype, device: torch.device) -> Tensor:
    """On the device without the host waiting, and again where the values have not changed."""
    tensor = torch.tensor(values, dtype=dtype)
    if device.type != "cuda":
        return tensor
    if torch.cuda.is_current_stream_capturing():  # the copy would be replayed from freed memory
        raise RuntimeError(
            "adamw_ema: a captured update needs one before it with the same tensors and decays."
        )
    return tensor.pin_memory().to(device, non_blocking=True)
