"""Learned variance: squared error of the noise and the variational bound of a step, in one pass.

IDDPM (Nichol and Dhariwal 2021, openai/improved-diffusion gaussian_diffusion.py): a second half of
channels, v on the scale of [-1, 1], interpolates the log-variance of the reverse step,

    log variance = (v + 1)/2 log beta + (1 - v)/2 log posterior_variance

and the bound is KL(posterior || reverse step), or at t = 0 the negative log-likelihood of the
pixels, bins of width 2/255 on [-1, 1]. Both means differ by gap times the error of the predicted
noise, so that x0 is read at t = 0 only. The bound trains v alone.

    forward     error_i = epsilon_i - noise_i
                loss    = w mean of error_i^2 + u mean of bits_i
    backward    depsilon_i = dloss w (2 / N) error_i
                dv_i       = dloss u (log beta - log posterior_variance) / (2 N ln 2) slope_i,
                             slope_i = dnats_i / dlog variance

Letters: B images, C channels, N elements per image of the clean data; an answer has 2N, epsilon
then v. A coefficient row is (a_x, a_e, b_x, b_e, w), of which w alone is read; a bound row is
(log posterior_variance, log beta, gap, first, u), first being 1 at t = 0 and 0 elsewhere.
Saved for backward: error and slope in the answer's dtype, each of order one; what scales them
enters in backward, where a compiler fuses it with what follows.
Traffic, in bytes per element of x0, for a bfloat16 answer: forward reads 4, writes 4, and reads x0
at t = 0 only; backward reads 4, writes 4, which are what follows would read and write anyway.
With the noised input (6) a step moves 14.
"""

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.library import custom_op

from speed_kernels.arguments import DTYPES, check_arguments, check_noise
from speed_kernels.language import chunk, multiply, runs_kernels, store, tl, triton
from speed_kernels.philox import BLOCK, noise_of_chunk, normal

BOUND_COLUMNS = 5  # per row
_COLUMNS = tl.constexpr(BOUND_COLUMNS)


def hybrid_loss_reference(
    answer: Tensor,
    x0: Tensor,
    coefficients: Tensor,
    bound_rows: Tensor,
    seed: Tensor,
    ids: Tensor,
    noise: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition of ``hybrid_loss`` in plain PyTorch."""
    dtype = torch.promote_types(answer.dtype, torch.float32)
    epsilon, variance = (half.flatten(1).to(dtype) for half in answer.chunk(2, dim=1))
    drawn = normal(seed, ids, epsilon.shape[1]) if noise is None else noise.flatten(1)
    error = epsilon - drawn.to(dtype)
    squared_error = error.square().mean(dim=1)
    nats = bound_reference(error.detach(), variance, x0.flatten(1), bound_rows)
    bits = nats.mean(dim=1) / math.log(2)
    loss = coefficients[:, 4] * squared_error + bound_rows[:, 4] * bits
    return loss, squared_error.detach()


def bound_reference(error: Tensor, variance: Tensor, x0: Tensor, bound_rows: Tensor) -> Tensor:
    """Nats of each element of the bound.

    Args:
        error: (B, N) of the predicted noise, float32 or float64.
        variance: (B, N) v, of that dtype.
        x0: (B, N) clean data, any floating dtype.
        bound_rows: (B, 5) float32.

    Returns:
        (B, N), differentiable.
    """
    posterior, log_beta, gap, first, _ = bound_rows.unsqueeze(2).unbind(1)
    share = (variance + 1) / 2
    log_variance = share * log_beta + (1 - share) * posterior
    offset = gap * error  # of x0's posterior mean from the reverse step's
    divergence = (
        log_variance - posterior - 1
        + torch.exp(posterior - log_variance) + offset.square() * torch.exp(-log_variance)
    ) / 2  # fmt: skip
    return torch.where(first > 0, -_log_likelihood(x0, offset, log_variance), divergence)


def _log_likelihood(x0: Tensor, offset: Tensor, log_variance: Tensor) -> Tensor:
    """(B, N) of pixels under a Gaussian ``offset`` away, integrated over their bins."""
    precision = torch.exp(-log_variance / 2)
    above = _normal_cdf(precision * (offset + 1 / 255))
    below = _normal_cdf(precision * (offset - 1 / 255))
    inside = _safe_log(above - below)
    darkest, brightest = _safe_log(above), _safe_log(1 - below)
    x0 = x0.to(offset.dtype)  # bfloat16 would round the thresholds to -1 and 1
    return torch.where(x0 < -0.999, darkest, torch.where(x0 > 0.999, brightest, inside))


def _normal_cdf(x: Tensor) -> Tensor:
    """The tanh approximation, as published."""
    return (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2


def _safe_log(x: Tensor) -> Tensor:
    return x.clamp(min=1e-12).log()


def hybrid_loss(
    answer: Tensor,
    x0: Tensor,
    coefficients: Tensor,
    bound_rows: Tensor,
    seed: Tensor,
    ids: Tensor,
    noise: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Per-image loss and squared error of a model that learns its variance.

    Args:
        answer: (B, 2C, ...) epsilon, then v; any floating dtype. Copied if not contiguous.
        x0: (B, C, ...) clean data.
        coefficients: (B, 5) float32 rows (a_x, a_e, b_x, b_e, w); the target is the noise.
        bound_rows: (B, 5) float32 rows (log posterior variance, log beta, gap, first, u).
        seed: () int64.
        ids: (B,) int64 image counters, those of the noised input.
        noise: as in ``weighted_mse``.

    Returns:
        (B,) float32 ``w * mean((epsilon - noise)**2) + u * bound``, the bound in bits per element,
        differentiable once, in the answer only and in epsilon only by its first term; and (B,)
        float32 ``mean((epsilon - noise)**2)``, detached. Float64 for a float64 answer.
    """
    check_arguments("hybrid_loss", x0, coefficients, seed, ids)
    wanted = (len(x0), 2 * x0.shape[1], *x0.shape[2:])
    if answer.shape != wanted or answer.device != x0.device:
        raise ValueError(
            f"hybrid_loss: x0 is {tuple(x0.shape)} on {x0.device}, so the answer must be {wanted} "
            f"there, epsilon then v; got {tuple(answer.shape)} on {answer.device}."
        )
    rows = (len(x0), BOUND_COLUMNS)
    if bound_rows.dtype != torch.float32 or bound_rows.shape != rows:
        raise ValueError(
            f"hybrid_loss: bound_rows must be float32 of shape {rows}; got {bound_rows.dtype} of "
            f"shape {tuple(bound_rows.shape)}."
        )
    check_noise("hybrid_loss", x0, noise)
    kernel = answer.dtype in DTYPES and x0.dtype in DTYPES and runs_kernels(x0)
    if not kernel:
        return hybrid_loss_reference(answer, x0, coefficients, bound_rows, seed, ids, noise)
    if torch.is_grad_enabled() and any(
        tensor.requires_grad for tensor in (x0, coefficients, bound_rows)
    ):
        raise ValueError(
            "hybrid_loss: only the answer has a gradient here; detach x0, coefficients and "
            "bound_rows or use hybrid_loss_reference."
        )
    squares, nats, _ = _hybrid_sums(answer, x0, bound_rows, seed, ids, noise)
    count = x0.shape[1:].numel()
    squared_error = squares / count
    bits = nats / count / math.log(2)
    loss = coefficients[:, 4] * squared_error + bound_rows[:, 4] * bits
    return loss, squared_error.detach()


# Forward: one program per image and BLOCK elements of both halves; PyTorch adds the partial sums.


@triton.jit
def _hybrid_kernel(
    answer_ptr, x0_ptr, bound_rows_ptr, seed_ptr, ids_ptr, noise_ptr,
    slopes_ptr, partial_ptr,
    num_elements, num_chunks,
    BLOCK: tl.constexpr,
):  # fmt: skip
    image, first, offset = chunk(tl.program_id(0), num_elements, num_chunks, BLOCK)
    elements = tl.arange(0, BLOCK)
    exists = first + elements < num_elements
    row_ptr = bound_rows_ptr + image * _COLUMNS
    log_posterior, log_beta = tl.load(row_ptr), tl.load(row_ptr + 1)
    gap, is_first = tl.load(row_ptr + 2), tl.load(row_ptr + 3)
    halves = offset + image * num_elements  # an answer has two halves of N
    epsilon_ptr, v_ptr = answer_ptr + halves, answer_ptr + halves + num_elements

    epsilon = tl.load(epsilon_ptr + elements, mask=exists, other=0.0).to(tl.float32)
    noise = noise_of_chunk(noise_ptr, seed_ptr, ids_ptr, image, first, offset, exists, BLOCK)
    error = tl.where(exists, epsilon - noise, 0.0)
    store(slopes_ptr + halves + elements, error, mask=exists)
    tl.store(
        partial_ptr + 2 * tl.program_id(0).to(tl.int64), tl.sum(multiply(error, error), axis=0)
    )

    v = tl.load(v_ptr + elements, mask=exists, other=0.0).to(tl.float32)
    excess = (v + 1.0) * 0.5 * (log_beta - log_posterior)  # over the posterior's log variance
    between = error * gap  # of the two means
    if is_first > 0.0:
        x0 = tl.load(x0_ptr + offset + elements, mask=exists, other=0.0).to(tl.float32)
        nats, slope = _first_step(x0, between, excess + log_posterior)
    else:
        ratio = tl.exp(-excess)
        square = between * between * tl.exp(-log_posterior) * ratio
        nats = (excess - 1.0 + ratio + square) * 0.5
        slope = (1.0 - ratio - square) * 0.5
    store(slopes_ptr + halves + num_elements + elements, slope, mask=exists)
    tl.store(
        partial_ptr + 2 * tl.program_id(0).to(tl.int64) + 1,
        tl.sum(tl.where(exists, nats, 0.0), axis=0),
    )


@triton.jit
def _first_step(x0, between, log_variance):
    """Negative log-likelihood of pixels and its derivative by the log variance."""
    precision = tl.exp(log_variance * -0.5)
    above, above_slope = _cdf(precision * (between + 0.00392156862745098))
    below, below_slope = _cdf(precision * (between - 0.00392156862745098))
    darkest, brightest = x0 < -0.999, x0 > 0.999
    probability = tl.where(darkest, above, tl.where(brightest, 1.0 - below, above - below))
    slope = tl.where(
        darkest, above_slope, tl.where(brightest, 0.0 - below_slope, above_slope - below_slope)
    )
    floored = tl.maximum(probability, 1e-12)
    return 0.0 - tl.log(floored), tl.where(probability < 1e-12, 0.0, 0.0 - slope / floored)


@triton.jit
def _cdf(x):
    """``_normal_cdf`` of precision times a distance, and its derivative by the log variance."""
    square = x * x
    twice = 1.5957691216057308 * x * (1.0 + 0.044715 * square)  # tanh(y) = 2 sigmoid(2 y) - 1
    probability = 1.0 / (1.0 + tl.exp(0.0 - twice))
    density = 1.5957691216057308 * (1.0 + 0.134145 * square) * probability * (1.0 - probability)
    return probability, -0.5 * x * density


@custom_op("speed_kernels::hybrid_sums", mutates_args=())
def _hybrid_sums(
    answer: Tensor,
    x0: Tensor,
    bound_rows: Tensor,
    seed: Tensor,
    ids: Tensor,
    noise: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(B,) sum of squares, (B,) sum of nats, (B, 2C, ...) errors and slopes."""
    answer, x0 = answer.contiguous(), x0.contiguous()
    bound_rows, ids = bound_rows.contiguous(), ids.contiguous()
    noise = None if noise is None else noise.contiguous()
    num_elements = x0.shape[1:].numel()
    num_chunks = -(-num_elements // BLOCK)
    slopes = torch.empty_like(answer)
    partial = torch.empty((len(x0), num_chunks, 2), dtype=torch.float32, device=x0.device)
    if partial.numel():
        with torch.cuda.device_of(x0):
            _hybrid_kernel[(len(x0) * num_chunks,)](
                answer, x0, bound_rows, seed, ids, noise, slopes, partial,
                num_elements, num_chunks,
                BLOCK=BLOCK,
            )  # fmt: skip
    sums = partial.sum(dim=1)
    return sums[:, 0].clone(), sums[:, 1].clone(), slopes


@_hybrid_sums.register_fake
def _(answer, x0, bound_rows, seed, ids, noise):
    squares = answer.new_empty(len(answer), dtype=torch.float32)
    return squares, torch.empty_like(squares), answer.new_empty(answer.shape)


# Opaque, so that a compiler reads the result in the pass over the slopes: computed there, it reads
# so much that Inductor spends a pass of its own.
@custom_op("speed_kernels::scale_of_slopes", mutates_args=())
def _scale_of_slopes(dsquares: Tensor | None, dnats: Tensor | None, bound_rows: Tensor) -> Tensor:
    """(B, 2) factors of error and slope in the gradient."""
    none = torch.zeros_like(bound_rows[:, 0])
    half_range = (bound_rows[:, 1] - bound_rows[:, 0]) / 2
    of_error = none if dsquares is None else 2 * dsquares
    of_v = none if dnats is None else dnats * half_range
    return torch.stack([of_error, of_v], dim=1)


@_scale_of_slopes.register_fake
def _(dsquares, dnats, bound_rows):
    return bound_rows.new_empty((len(bound_rows), 2))


# Autograd.


def _setup_context(ctx, inputs, output):
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[2], inputs[2])


@once_differentiable
def _backward(ctx, dsquares, dnats, _dslopes):
    slopes, bound_rows = ctx.saved_tensors
    scale = _scale_of_slopes(dsquares, dnats, bound_rows).unsqueeze(2)
    size = slopes.shape[1:].numel() // 2
    scaled = scale * slopes.view(-1, 2, size)
    return scaled.to(slopes.dtype).view(slopes.shape), *(None,) * 5


_hybrid_sums.register_autograd(_backward, setup_context=_setup_context)
