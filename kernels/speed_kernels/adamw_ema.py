"""AdamW and exponential moving averages (EMA) of its parameters in one sweep, in place.

    g     = gradient min(1, max_norm / (gradient_norm + 1e-6))
    m     = m + (1 - beta1) (g - m)                    v = beta2 v + (1 - beta2) g^2
    p     = (1 - learning_rate weight_decay) p
            - learning_rate / (1 - beta1^step) m / (sqrt(v / (1 - beta2^step)) + eps)
    ema_h = ema_h + (1 - decay_h) (p - ema_h)          for each horizon h

Where the gradient norm is not finite nothing changes, the step counts included; the device decides,
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
_TAIL = tl.constexpr(256)  # elements at a time of a tensor's last, partial tile: one per thread
_ALIGNMENT = 16  # bytes of a wide access


def adamw_ema_reference(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    first_moments: Sequence[Tensor],
    second_moments: Sequence[Tensor],
    averages: Sequence[Sequence[Tensor]],
    steps: Tensor,
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
    finite, scale, step_sizes, root_scales = _device_factors(
        steps, gradient_norm, learning_rate, beta1, beta2, max_norm
    )
    for i, (p, g, m, v) in enumerate(
        zip(parameters, gradients, first_moments, second_moments, strict=True)
    ):
        g, step_size, root_scale = (t.to(p.dtype) for t in (g, step_sizes[i], root_scales[i]))
        g = g * scale.to(p.dtype)
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
    steps: Tensor,
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
        steps: (T,) updates done so far; grow by one unless the update is skipped.
        gradient_norm: () float32 norm over all gradients of all ranks.
        learning_rate: of this step.
        beta1: share of the first moment kept.
        beta2: share of the second moment kept.
        eps: added to the root of the second moment.
        weight_decay: decoupled, in units of the learning rate.
        max_norm: gradients of a larger norm are scaled down to it; inf never scales.
        decays: H shares of the averages kept in this step.
    """
    tensors = {"parameters": parameters, "gradients": gradients}
    tensors |= {"first_moments": first_moments, "second_moments": second_moments}
    tensors |= {f"averages[{h}]": average for h, average in enumerate(averages)}
    _check(tensors, steps, gradient_norm)
    if len(averages) != len(decays):
        raise ValueError(
            f"adamw_ema: {len(averages)} lists of averages but {len(decays)} decays; give one each."
        )
    if not parameters:
        return
    with torch.no_grad():
        if runs_kernels(parameters[0]):
            flat = [tensor for average in averages for tensor in average]
            numbers = [learning_rate, beta1, beta2, eps, weight_decay, max_norm, *decays]
            _adamw_ema(
                list(parameters), list(gradients), list(first_moments), list(second_moments), flat,
                steps, gradient_norm, numbers,
            )  # fmt: skip
        else:
            adamw_ema_reference(
                parameters, gradients, first_moments, second_moments, averages, steps,
                gradient_norm, learning_rate=learning_rate, beta1=beta1, beta2=beta2, eps=eps,
                weight_decay=weight_decay, max_norm=max_norm, decays=decays,
            )  # fmt: skip


def _check(tensors: dict[str, Sequence[Tensor]], steps: Tensor, gradient_norm: Tensor) -> None:
    device, parameters = steps.device, tensors["parameters"]
    for name, group in tensors.items():
        if len(group) != len(parameters):
            raise ValueError(
                f"adamw_ema: {len(parameters)} parameters but {len(group)} {name}; give one each."
            )
        for i, (tensor, parameter) in enumerate(zip(group, parameters, strict=True)):
            good = tensor.dtype == torch.float32 and tensor.is_contiguous()
            if not good or tensor.device != device or tensor.shape != parameter.shape:
                raise ValueError(
                    f"adamw_ema: {name}[{i}] must be contiguous torch.float32 "
                    f"{tuple(parameter.shape)} on {device}; got {tensor.dtype} "
                    f"{tuple(tensor.shape)} on {tensor.device}, strides {tensor.stride()}."
                )
    if steps.shape != (len(parameters),) or gradient_norm.shape != ():
        raise ValueError(
            f"adamw_ema: steps must be ({len(parameters)},) and gradient_norm (); got "
            f"{tuple(steps.shape)} and {tuple(gradient_norm.shape)}."
        )
    if gradient_norm.device != device:
        raise ValueError(
            f"adamw_ema: gradient_norm is on {gradient_norm.device}, steps on {device}."
        )


def _device_factors(
    steps: Tensor, norm: Tensor, learning_rate: float, beta1: float, beta2: float, max_norm: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Without a synchronisation, (): update at all?, gradient scale; (T,): step size, 1 / root."""
    finite = norm.isfinite()
    steps += finite
    count = steps.double().clamp(min=1)
    scale = (max_norm / (norm.double() + 1e-6)).clamp(max=1)
    step_size = learning_rate / (1 - beta1**count)
    return finite, scale, step_size, (1 - beta2**count).rsqrt()


# Update: one program per tile of one tensor, found through a table of addresses.


@triton.jit
def _column(row_ptr, COLUMN: tl.constexpr, ALIGNMENT: tl.constexpr):
    address = tl.load(row_ptr + COLUMN).to(tl.pointer_type(tl.float32))
    return tl.multiple_of(address, ALIGNMENT)  # unknown otherwise, which makes every access scalar


@triton.jit
def _update_tile(
    row_ptr, factors_ptr, step_size, root_scale, start, size,
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
    scale = tl.load(factors_ptr + 1)

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
        average += tl.load(factors_ptr + 2 + h) * (p - average)
        tl.store(average_ptr + elements, average, mask=mask)


@triton.jit
def _adamw_ema_kernel(
    addresses_ptr, sizes_ptr, tensor_ptr, tile_ptr, factors_ptr, num_tensors,
    rest1, beta2, rest2, eps, kept,
    HORIZONS: tl.constexpr, ALIGNMENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    tensor = tl.load(tensor_ptr + tl.program_id(0)).to(tl.int64)
    start = tl.load(tile_ptr + tl.program_id(0)).to(tl.int64) * BLOCK
    size = tl.load(sizes_ptr + tensor)
    row_ptr = addresses_ptr + tensor * (4 + HORIZONS)
    step_size = tl.load(factors_ptr + 2 + HORIZONS + tensor)
    root_scale = tl.load(factors_ptr + 2 + HORIZONS + num_tensors + tensor)
    if tl.load(factors_ptr) != 0.0:
        if start + BLOCK <= size:  # without a mask, whose end is no multiple of 16 as far as known
            _update_tile(
                row_ptr, factors_ptr, step_size, root_scale, start, size,
                rest1, beta2, rest2, eps, kept, HORIZONS, ALIGNMENT, False, BLOCK,
            )  # fmt: skip
        else:
            for i in range(BLOCK // _TAIL):
                if start + i * _TAIL < size:
                    _update_tile(
                        row_ptr, factors_ptr, step_size, root_scale, start + i * _TAIL, size,
                        rest1, beta2, rest2, eps, kept, HORIZONS, ALIGNMENT, True, _TAIL,
                    )  # fmt: skip


@custom_op(
    "speed_kernels::adamw_ema",
    mutates_args=("parameters", "first_moments", "second_moments", "averages", "steps"),
)
def _adamw_ema(
    parameters: list[Tensor],
    gradients: list[Tensor],
    first_moments: list[Tensor],
    second_moments: list[Tensor],
    averages: list[Tensor],
    steps: Tensor,
    gradient_norm: Tensor,
    numbers: list[float],
) -> None:
    learning_rate, beta1, beta2, eps, weight_decay, max_norm, *decays = numbers
    device, count, horizons = steps.device, len(parameters), len(decays)
    finite, scale, *by_tensor = _device_factors(
        steps, gradient_norm, learning_rate, beta1, beta2, max_norm
    )
    rests = _constants(tuple(1 - decay for decay in decays), torch.float32, device)
    factors = torch.cat([torch.stack([finite, scale]), rests, *by_tensor]).float()

    columns = [parameters, gradients, first_moments, second_moments]
    columns += [averages[h * count : (h + 1) * count] for h in range(horizons)]
    table = tuple(t.data_ptr() for row in zip(*columns, strict=True) for t in row)
    aligned = all(address % _ALIGNMENT == 0 for address in table)
    sizes, tensors, tiles = _tiles(tuple(p.numel() for p in parameters), device)
    if len(tiles):
        with torch.cuda.device_of(steps):
            _adamw_ema_kernel[(len(tiles),)](
                _constants(table, torch.int64, device), sizes, tensors, tiles, factors, count,
                1 - beta1, beta2, 1 - beta2, eps, 1 - learning_rate * weight_decay,
                HORIZONS=horizons, ALIGNMENT=_ALIGNMENT if aligned else 2, BLOCK=BLOCK, num_warps=8,
            )  # fmt: skip


@_adamw_ema.register_fake
def _(
    parameters, gradients, first_moments, second_moments, averages, steps, gradient_norm, numbers
):  # fmt: skip
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
