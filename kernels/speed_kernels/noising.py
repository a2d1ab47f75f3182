"""Noised input: x_in = a_x x0 + a_e noise, with the noise drawn in place.

The noise is ``philox.normal(seed, ids)``: the loss draws it again, or reads what
``noised_input_and_noise`` stored; both have the same bits. Fused and reference agree bit for bit.

Letters: B images, N elements per image. A coefficient row is (a_x, a_e, b_x, b_e, w).
Traffic, in bytes per element of a float32 x0 and a bfloat16 x_in: reads 4, writes 2; to store the
noise, float32, writes 4 more, and the loss then reads 4 more.
"""

import torch
from torch import Tensor
from torch.library import custom_op

from speed_kernels.arguments import COEFFICIENTS, DTYPES, check_arguments
from speed_kernels.language import chunk, multiply, runs_kernels, store, tl, triton
from speed_kernels.philox import BLOCK, Stream, consecutive_normals, normal

_COEFFICIENTS, _NOISE = tl.constexpr(COEFFICIENTS), tl.constexpr(int(Stream.NOISE))


def noised_input_reference(
    x0: Tensor, coefficients: Tensor, seed: Tensor, ids: Tensor, dtype: torch.dtype
) -> Tensor:
    """The definition of ``noised_input`` in plain PyTorch."""
    return noised_input_and_noise_reference(x0, coefficients, seed, ids, dtype)[0]


def noised_input_and_noise_reference(
    x0: Tensor, coefficients: Tensor, seed: Tensor, ids: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The definition of ``noised_input_and_noise`` in plain PyTorch."""
    flat = x0.flatten(1).to(torch.promote_types(x0.dtype, torch.float32))
    noise = normal(seed, ids, flat.shape[1])
    a_x, a_e = coefficients[:, 0:1], coefficients[:, 1:2]
    x_in = a_x * flat + a_e * noise.to(flat.dtype)
    return x_in.to(dtype).view(x0.shape), noise.view(x0.shape)


def noised_input(
    x0: Tensor, coefficients: Tensor, seed: Tensor, ids: Tensor, dtype: torch.dtype
) -> Tensor:
    """What the model sees, differentiable in x0.

    Args:
        x0: (B, ...) clean data, any floating dtype. Copied first if not contiguous.
        coefficients: (B, 5) float32 rows (a_x, a_e, b_x, b_e, w).
        seed: () int64.
        ids: (B,) int64 image counters, the address of the noise.
        dtype: of the result; the arithmetic is float32, or float64 if x0 is.

    Returns:
        (B, ...) in ``dtype``.
    """
    check_arguments("noised_input", x0, coefficients, seed, ids)
    if x0.dtype not in DTYPES or dtype not in DTYPES or not runs_kernels(x0):
        return noised_input_reference(x0, coefficients, seed, ids, dtype)
    return _noised_input(x0, coefficients, seed, ids, dtype)


def noised_input_and_noise(
    x0: Tensor, coefficients: Tensor, seed: Tensor, ids: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """``noised_input`` that stores the noise for the loss; arguments as there.

    Returns:
        (B, ...) in ``dtype``, and the noise, (B, ...) float32.
    """
    check_arguments("noised_input_and_noise", x0, coefficients, seed, ids)
    if x0.dtype not in DTYPES or dtype not in DTYPES or not runs_kernels(x0):
        return noised_input_and_noise_reference(x0, coefficients, seed, ids, dtype)
    return _noised_input_and_noise(x0, coefficients, seed, ids, dtype)


# Forward: one program per image and BLOCK elements.


@triton.jit
def _noised_input_kernel(
    x0_ptr, coefficients_ptr, seed_ptr, ids_ptr, x_in_ptr, noise_ptr,
    num_elements, num_chunks,
    BLOCK: tl.constexpr,
):  # fmt: skip
    image, first, offset = chunk(tl.program_id(0), num_elements, num_chunks, BLOCK)
    elements = tl.arange(0, BLOCK)
    mask = first + elements < num_elements
    a_x = tl.load(coefficients_ptr + image * _COEFFICIENTS)
    a_e = tl.load(coefficients_ptr + image * _COEFFICIENTS + 1)

    x0 = tl.load(x0_ptr + offset + elements, mask=mask, other=0.0).to(tl.float32)
    noise = consecutive_normals(tl.load(seed_ptr), first, tl.load(ids_ptr + image), _NOISE, BLOCK)
    x_in = multiply(x0, a_x) + multiply(noise, a_e)
    store(x_in_ptr + offset + elements, x_in, mask=mask)
    if noise_ptr is not None:
        tl.store(noise_ptr + offset + elements, noise, mask=mask)


@custom_op("speed_kernels::noised_input", mutates_args=())
def _noised_input(
    x0: Tensor, coefficients: Tensor, seed: Tensor, ids: Tensor, dtype: torch.dtype
) -> Tensor:
    return _launch(x0, coefficients, seed, ids, dtype, None)


@_noised_input.register_fake
def _(x0, coefficients, seed, ids, dtype):
    return x0.new_empty(x0.shape, dtype=dtype)


@custom_op("speed_kernels::noised_input_and_noise", mutates_args=())
def _noised_input_and_noise(
    x0: Tensor, coefficients: Tensor, seed: Tensor, ids: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    noise = torch.empty(x0.shape, dtype=torch.float32, device=x0.device)
    return _launch(x0, coefficients, seed, ids, dtype, noise), noise


@_noised_input_and_noise.register_fake
def _(x0, coefficients, seed, ids, dtype):
    return x0.new_empty(x0.shape, dtype=dtype), x0.new_empty(x0.shape, dtype=torch.float32)


def _launch(
    x0: Tensor, coefficients: Tensor, seed: Tensor, ids: Tensor, dtype: torch.dtype,
    noise: Tensor | None,
) -> Tensor:  # fmt: skip
    x0, coefficients, ids = x0.contiguous(), coefficients.contiguous(), ids.contiguous()
    x_in = torch.empty_like(x0, dtype=dtype)
    if x0.numel():
        num_elements = x0.shape[1:].numel()
        num_chunks = -(-num_elements // BLOCK)
        with torch.cuda.device_of(x0):
            _noised_input_kernel[(len(x0) * num_chunks,)](
                x0, coefficients, seed, ids, x_in, noise, num_elements, num_chunks, BLOCK=BLOCK
            )
    return x_in


# Autograd.


def _setup_context(ctx, inputs, output):
    x0, coefficients, *_ = inputs
    ctx.dtype = x0.dtype
    ctx.save_for_backward(coefficients)


def _backward(ctx, dx_in):
    (coefficients,) = ctx.saved_tensors
    a_x = coefficients[:, 0].view(-1, *[1] * (dx_in.dim() - 1))
    return (a_x * dx_in).to(ctx.dtype), None, None, None, None


def _setup_context_with_noise(ctx, inputs, output):
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    _setup_context(ctx, inputs, output)


def _backward_with_noise(ctx, dx_in, _dnoise):
    return (None,) * 5 if dx_in is None else _backward(ctx, dx_in)


_noised_input.register_autograd(_backward, setup_context=_setup_context)
_noised_input_and_noise.register_autograd(
    _backward_with_noise, setup_context=_setup_context_with_noise
)
