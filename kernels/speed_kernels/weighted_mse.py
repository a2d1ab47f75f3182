"""Weighted error of a prediction against target = b_x x0 + b_e noise, the noise drawn in place.

    forward     difference_i = prediction_i - (b_x x0_i + b_e noise_i), 0 where the mask drops i
                error        = sum of difference_i^2 / K
                loss         = w error
    backward    dprediction_i = dloss w (2 / K) difference_i

Letters: B images, C channels, S positions (H x W), N = C S elements per image, K of them kept: all
without a mask; an image of which nothing is kept has error 0. A coefficient row is
(a_x, a_e, b_x, b_e, w).
Saved for backward: the difference in the prediction's dtype. It is of order one whatever w and K,
so that half precision holds it; w and K enter in backward, where a compiler fuses the scaling with
what follows. The noise is regenerated, unless the caller stored it.
Traffic, in bytes per element of a bfloat16 prediction: forward reads 2, and of x0 4 (0 where
b_x = 0), writes 2; backward reads 2, writes 2. Stored noise costs 4 more, a mask 1 / C.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.library import custom_op

from speed_kernels.language import chunk, multiply, runs_kernels, store, tl, triton
from speed_kernels.noising import COEFFICIENTS, DTYPES, check_arguments, noise_of_chunk
from speed_kernels.philox import BLOCK, normal

MAX_MASK = 2**31 - BLOCK  # a position and the lanes beside it are 32-bit integers
_COEFFICIENTS = tl.constexpr(COEFFICIENTS)


def weighted_mse_reference(
    prediction: Tensor,
    x0: Tensor,
    coefficients: Tensor,
    seed: Tensor,
    ids: Tensor,
    noise: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition of ``weighted_mse`` in plain PyTorch."""
    dtype = torch.promote_types(prediction.dtype, torch.float32)
    flat = x0.flatten(1).to(dtype)
    noise = (normal(seed, ids, flat.shape[1]) if noise is None else noise.flatten(1)).to(dtype)
    b_x, b_e, weight = coefficients[:, 2:3], coefficients[:, 3:4], coefficients[:, 4]
    target = b_x * flat + b_e * noise
    difference = keep(prediction.flatten(1).to(dtype) - target, mask)
    squared_error = mean_of_kept(difference.square(), mask)
    return weight * squared_error, squared_error.detach()


def weighted_mse(
    prediction: Tensor,
    x0: Tensor,
    coefficients: Tensor,
    seed: Tensor,
    ids: Tensor,
    noise: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Per-image loss and error.

    Args:
        prediction: (B, ...) the model's answer, any floating dtype. Copied if not contiguous.
        x0: (B, C, ...) clean data of the same shape.
        coefficients: (B, 5) float32 rows (a_x, a_e, b_x, b_e, w).
        seed: () int64.
        ids: (B,) int64 image counters, those of the noised input.
        noise: (B, C, ...) float32 as ``noised_input_and_noise`` stored it; None draws it again.
        mask: bool, True where an element counts: of the shape of x0, or of one of its channels,
            (B, 1, ...) or (B, ...), for all of them. None keeps everything.

    Returns:
        (B,) float32 ``w * mean((prediction - target)**2)`` over what is kept, differentiable once,
        in the prediction only, and (B,) float32 ``mean((prediction - target)**2)``, detached; both
        0 where nothing is kept. Float64 for a float64 prediction.
    """
    check_arguments("weighted_mse", x0, coefficients, seed, ids)
    if prediction.shape != x0.shape or prediction.device != x0.device:
        raise ValueError(
            f"weighted_mse: the prediction must match x0, {tuple(x0.shape)} on {x0.device}; got "
            f"{tuple(prediction.shape)} on {prediction.device}."
        )
    check_noise_and_mask("weighted_mse", x0, noise, mask)
    kernel = prediction.dtype in DTYPES and x0.dtype in DTYPES and runs_kernels(x0)
    if not kernel:
        return weighted_mse_reference(prediction, x0, coefficients, seed, ids, noise, mask)
    if torch.is_grad_enabled() and (x0.requires_grad or coefficients.requires_grad):
        raise ValueError(
            "weighted_mse: only the prediction has a gradient here; detach x0 and coefficients or "
            "use weighted_mse_reference."
        )
    total, _ = _squared_error(prediction, x0, coefficients, seed, ids, noise, mask)
    squared_error = total / num_kept(x0, mask)
    return coefficients[:, 4] * squared_error, squared_error.detach()


# Masks.


def check_noise_and_mask(
    caller: str, x0: Tensor, noise: Tensor | None, mask: Tensor | None
) -> None:
    """Refuse, before any launch, what the kernels would read wrongly."""
    if noise is not None:
        same = noise.shape == x0.shape and noise.device == x0.device
        if not same or noise.dtype != torch.float32:
            raise ValueError(
                f"{caller}: stored noise must be float32 {tuple(x0.shape)} on {x0.device}, as "
                f"noised_input_and_noise returns it; got {noise.dtype} {tuple(noise.shape)} on "
                f"{noise.device}."
            )
    if mask is None:
        return
    one_channel = (len(x0), 1, *x0.shape[2:])
    shapes = [tuple(x0.shape), one_channel, (len(x0), *x0.shape[2:])]
    if mask.dtype != torch.bool or tuple(mask.shape) not in shapes or mask.device != x0.device:
        raise ValueError(
            f"{caller}: a mask must be bool, on {x0.device}, of one of the shapes {shapes}; got "
            f"{mask.dtype} {tuple(mask.shape)} on {mask.device}."
        )
    if mask.shape[1:].numel() > MAX_MASK:
        raise ValueError(
            f"{caller}: a mask has at most {MAX_MASK} elements per image; got "
            f"{mask.shape[1:].numel()}. Split the images."
        )


def keep(values: Tensor, mask: Tensor | None) -> Tensor:
    """(B, N) with zeros where the mask drops an element, so that nothing there has a gradient."""
    return values if mask is None else torch.where(_spread(mask, values), values, 0.0)


def mean_of_kept(values: Tensor, mask: Tensor | None) -> Tensor:
    """(B, N), zero where dropped -> (B,), zero where nothing is kept."""
    if mask is None:
        return values.mean(dim=1)
    return values.sum(dim=1) / num_kept(values, mask)


def num_kept(x0: Tensor, mask: Tensor | None) -> Tensor | int:
    """K of each image as (B,) float32, at least 1 so that it can divide; N without a mask."""
    if mask is None:
        return x0.shape[1:].numel()
    flat = _flat(mask)
    channels = x0.shape[1:].numel() // max(flat.shape[1], 1)
    return (flat.sum(dim=1) * channels).clamp(min=1).to(torch.float32)


def _spread(mask: Tensor, values: Tensor) -> Tensor:
    """(B, C, S), (B, 1, S) or (B, S) -> (B, N) like values."""
    flat = _flat(mask)
    return flat.repeat(1, values.shape[1] // max(flat.shape[1], 1))


def _flat(mask: Tensor) -> Tensor:
    """(B, positions), also of a mask (B,)."""
    return mask.reshape(len(mask), mask.shape[1:].numel())


# Forward: one program per image and BLOCK elements; PyTorch adds their partial sums, so that the
# result does not depend on scheduling.


@triton.jit
def kept_of_chunk(mask_ptr, image, first, num_elements, num_positions, BLOCK: tl.constexpr):
    """(BLOCK,) which elements count; a mask of one channel serves them all in turn."""
    elements = tl.arange(0, BLOCK)
    exists = first + elements < num_elements
    if mask_ptr is None:
        return exists
    else:
        position = ((first % num_positions).to(tl.int32) + elements) % num_positions
        return tl.load(mask_ptr + image * num_positions + position, mask=exists, other=0) != 0


@triton.jit
def _squared_error_kernel(
    prediction_ptr, x0_ptr, coefficients_ptr, seed_ptr, ids_ptr, noise_ptr, mask_ptr,
    difference_ptr, partial_ptr,
    num_elements, num_chunks, num_positions,
    BLOCK: tl.constexpr,
):  # fmt: skip
    image, first, offset = chunk(tl.program_id(0), num_elements, num_chunks, BLOCK)
    elements = tl.arange(0, BLOCK)
    exists = first + elements < num_elements  # loads are masked by this: it is 16 bytes at a time
    kept = kept_of_chunk(mask_ptr, image, first, num_elements, num_positions, BLOCK)
    b_x = tl.load(coefficients_ptr + image * _COEFFICIENTS + 2)
    b_e = tl.load(coefficients_ptr + image * _COEFFICIENTS + 3)

    prediction = tl.load(prediction_ptr + offset + elements, mask=exists, other=0.0).to(tl.float32)
    x0 = tl.zeros((BLOCK,), tl.float32)
    if b_x != 0.0:
        x0 = tl.load(x0_ptr + offset + elements, mask=exists, other=0.0).to(tl.float32)
    noise = noise_of_chunk(noise_ptr, seed_ptr, ids_ptr, image, first, offset, exists, BLOCK)
    target = multiply(x0, b_x) + multiply(noise, b_e)
    difference = tl.where(kept, prediction - target, 0.0)

    store(difference_ptr + offset + elements, difference, mask=exists)
    tl.store(partial_ptr + tl.program_id(0), tl.sum(multiply(difference, difference), axis=0))


@custom_op("speed_kernels::squared_error", mutates_args=())
def _squared_error(
    prediction: Tensor,
    x0: Tensor,
    coefficients: Tensor,
    seed: Tensor,
    ids: Tensor,
    noise: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(B,) sum of squares, (B, ...) difference."""
    prediction, x0 = prediction.contiguous(), x0.contiguous()
    coefficients, ids = coefficients.contiguous(), ids.contiguous()
    noise, mask, num_positions = dense(noise, mask)
    num_elements = prediction.shape[1:].numel()
    num_chunks = -(-num_elements // BLOCK)
    difference = torch.empty_like(prediction)
    partial = torch.empty((len(x0), num_chunks), dtype=torch.float32, device=x0.device)
    if partial.numel():
        with torch.cuda.device_of(x0):
            _squared_error_kernel[(partial.numel(),)](
                prediction, x0, coefficients, seed, ids, noise, mask, difference, partial,
                num_elements, num_chunks, num_positions,
                BLOCK=BLOCK,
            )  # fmt: skip
    return partial.sum(dim=1), difference


def dense(noise: Tensor | None, mask: Tensor | None) -> tuple[Tensor | None, Tensor | None, int]:
    """Both as the kernels read them, and the elements per image of the mask."""
    noise = None if noise is None else noise.contiguous()
    if mask is None:
        return noise, None, 1
    return noise, mask.contiguous().view(torch.uint8), mask.shape[1:].numel()


@_squared_error.register_fake
def _(prediction, x0, coefficients, seed, ids, noise, mask):
    error = prediction.new_empty(len(prediction), dtype=torch.float32)
    return error, prediction.new_empty(prediction.shape)


# Autograd.


def _setup_context(ctx, inputs, output):
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1])


@once_differentiable
def _backward(ctx, dtotal, _ddifference):
    if dtotal is None:
        return (None,) * 7
    (difference,) = ctx.saved_tensors
    scale = (2 * dtotal).view(-1, *[1] * (difference.dim() - 1))
    return (scale * difference).to(difference.dtype), *(None,) * 6


_squared_error.register_autograd(_backward, setup_context=_setup_context)
