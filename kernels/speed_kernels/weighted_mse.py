"""Weighted error of a prediction against target = b_x x0 + b_e noise, the noise drawn in place.

    forward     difference_i = prediction_i - (b_x x0_i + b_e noise_i)
                error        = sum of difference_i^2 / N
                loss         = w error
    backward    dprediction_i = dloss w (2 / N) difference_i

Letters: B images, N elements per image. A coefficient row is (a_x, a_e, b_x, b_e, w).
Saved for backward: the difference in the prediction's dtype. It is of order one whatever w and N,
so that half precision holds it; w and N enter in backward, where a compiler fuses the scaling with
what follows. The noise is regenerated, unless the caller stored it.
Traffic, in bytes per element of a bfloat16 prediction: forward reads 2, and of x0 4 (0 where
b_x = 0), writes 2; backward reads 2, writes 2. Stored noise costs 4 more.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.library import custom_op

from speed_kernels.arguments import COEFFICIENTS, DTYPES, check_arguments, check_noise
from speed_kernels.language import chunk, multiply, runs_kernels, store, tl, triton
from speed_kernels.philox import BLOCK, noise_of_chunk, normal

_COEFFICIENTS = tl.constexpr(COEFFICIENTS)


def weighted_mse_reference(
    prediction: Tensor,
    x0: Tensor,
    coefficients: Tensor,
    seed: Tensor,
    ids: Tensor,
    noise: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition of ``weighted_mse`` in plain PyTorch."""
    dtype = torch.promote_types(prediction.dtype, torch.float32)
    flat = x0.flatten(1).to(dtype)
    noise = (normal(seed, ids, flat.shape[1]) if noise is None else noise.flatten(1)).to(dtype)
    b_x, b_e, weight = coefficients[:, 2:3], coefficients[:, 3:4], coefficients[:, 4]
    target = b_x * flat + b_e * noise
    squared_error = (prediction.flatten(1).to(dtype) - target).square().mean(dim=1)
    return weight * squared_error, squared_error.detach()


def weighted_mse(
    prediction: Tensor,
    x0: Tensor,
    coefficients: Tensor,
    seed: Tensor,
    ids: Tensor,
    noise: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Per-image loss and error.

    Args:
        prediction: (B, ...) the model's answer, any floating dtype. Copied if not contiguous.
        x0: (B, C, ...) clean data of the same shape.
        coefficients: (B, 5) float32 rows (a_x, a_e, b_x, b_e, w).
        seed: () int64.
        ids: (B,) int64 image counters, those of the noised input.
        noise: (B, C, ...) float32 as ``noised_input_and_noise`` stored it; None draws it again.

    Returns:
        (B,) float32 ``w * mean((prediction - target)**2)``, differentiable once, in the prediction
        only, and (B,) float32 ``mean((prediction - target)**2)``, detached. Float64 for a float64
        prediction.
    """
    check_arguments("weighted_mse", x0, coefficients, seed, ids)
    if prediction.shape != x0.shape or prediction.device != x0.device:
        raise ValueError(
            f"weighted_mse: the prediction must match x0, {tuple(x0.shape)} on {x0.device}; got "
            f"{tuple(prediction.shape)} on {prediction.device}."
        )
    check_noise("weighted_mse", x0, noise)
    kernel = prediction.dtype in DTYPES and x0.dtype in DTYPES and runs_kernels(x0)
    if not kernel:
        return weighted_mse_reference(prediction, x0, coefficients, seed, ids, noise)
    if torch.is_grad_enabled() and (x0.requires_grad or coefficients.requires_grad):
        raise ValueError(
            "weighted_mse: only the prediction has a gradient here; detach x0 and coefficients or "
            "use weighted_mse_reference."
        )
    total, _ = _squared_error(prediction, x0, coefficients, seed, ids, noise)
    squared_error = total / x0.shape[1:].numel()
    return coefficients[:, 4] * squared_error, squared_error.detach()


# Forward: one program per image and BLOCK elements; PyTorch adds their partial sums, so that the
# result does not depend on scheduling.


@triton.jit
def _squared_error_kernel(
    prediction_ptr, x0_ptr, coefficients_ptr, seed_ptr, ids_ptr, noise_ptr,
    difference_ptr, partial_ptr,
    num_elements, num_chunks,
    BLOCK: tl.constexpr,
):  # fmt: skip
    image, first, offset = chunk(tl.program_id(0), num_elements, num_chunks, BLOCK)
    elements = tl.arange(0, BLOCK)
    exists = first + elements < num_elements
    b_x = tl.load(coefficients_ptr + image * _COEFFICIENTS + 2)
    b_e = tl.load(coefficients_ptr + image * _COEFFICIENTS + 3)

    prediction = tl.load(prediction_ptr + offset + elements, mask=exists, other=0.0).to(tl.float32)
    x0 = tl.zeros((BLOCK,), tl.float32)
    if b_x != 0.0:
        x0 = tl.load(x0_ptr + offset + elements, mask=exists, other=0.0).to(tl.float32)
    noise = noise_of_chunk(noise_ptr, seed_ptr, ids_ptr, image, first, offset, exists, BLOCK)
    target = multiply(x0, b_x) + multiply(noise, b_e)
    difference = tl.where(exists, prediction - target, 0.0)

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
) -> tuple[Tensor, Tensor]:
    """(B,) sum of squares, (B, ...) difference."""
    prediction, x0 = prediction.contiguous(), x0.contiguous()
    coefficients, ids = coefficients.contiguous(), ids.contiguous()
    noise = None if noise is None else noise.contiguous()
    num_elements = prediction.shape[1:].numel()
    num_chunks = -(-num_elements // BLOCK)
    difference = torch.empty_like(prediction)
    partial = torch.empty((len(x0), num_chunks), dtype=torch.float32, device=x0.device)
    if partial.numel():
        with torch.cuda.device_of(x0):
            _squared_error_kernel[(partial.numel(),)](
                prediction, x0, coefficients, seed, ids, noise, difference, partial,
                num_elements, num_chunks,
                BLOCK=BLOCK,
            )  # fmt: skip
    return partial.sum(dim=1), difference


@_squared_error.register_fake
def _(prediction, x0, coefficients, seed, ids, noise):
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
        return (None,) * 6
    (difference,) = ctx.saved_tensors
    scale = (2 * dtotal).view(-1, *[1] * (difference.dim() - 1))
    return (scale * difference).to(difference.dtype), *(None,) * 5


_squared_error.register_autograd(_backward, setup_context=_setup_context)
