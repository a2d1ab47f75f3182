"""The variational bound of one diffusion step with learned variance, in bits per element.

IDDPM (Nichol and Dhariwal 2021, openai/improved-diffusion gaussian_diffusion.py): a second half of
channels, v on the scale of [-1, 1], interpolates the log-variance of the reverse step,

    log variance = (v + 1)/2 log beta + (1 - v)/2 log posterior_variance

and the bound is KL(posterior || reverse step), or at t = 0 the negative log-likelihood of the
pixels, bins of width 2/255 on [-1, 1]. Both means differ by gap times the error of the predicted
noise, which is drawn in place and gets no gradient here.

Letters: B images, N elements per image. A bound row is (log posterior_variance, log beta, gap,
first), first being 1 at t = 0 and 0 elsewhere.
"""

import math

import torch
from torch import Tensor

from speed_kernels.philox import normal


def variational_bound_reference(
    prediction: Tensor, variance: Tensor, x0: Tensor, bound_rows: Tensor, seed: Tensor, ids: Tensor
) -> Tensor:
    """Per-image bound.

    Args:
        prediction: (B, ...) predicted noise, any floating dtype.
        variance: (B, ...) v, any floating dtype.
        x0: (B, ...) clean data of the same shape.
        bound_rows: (B, 4) float32 rows (log posterior_variance, log beta, gap, first).
        seed: () int64.
        ids: (B,) int64 image counters, those of the noised input.

    Returns:
        (B,) float32 bits per element, differentiable in ``variance`` only.
    """
    flat = x0.flatten(1).float()
    error = prediction.detach().flatten(1).float() - normal(seed, ids, flat.shape[1])
    posterior, log_beta, gap, first = bound_rows.unsqueeze(2).unbind(1)
    share = (variance.flatten(1).float() + 1) / 2
    log_variance = share * log_beta + (1 - share) * posterior
    offset = gap * error  # of x0's posterior mean from the reverse step's
    divergence = (
        log_variance - posterior - 1
        + torch.exp(posterior - log_variance) + offset.square() * torch.exp(-log_variance)
    ) / 2  # fmt: skip
    nats = torch.where(first > 0, -_log_likelihood(flat, offset, log_variance), divergence)
    return nats.mean(dim=1) / math.log(2)


def _log_likelihood(x0: Tensor, offset: Tensor, log_variance: Tensor) -> Tensor:
    """(B, N) of pixels under a Gaussian ``offset`` away, integrated over their bins."""
    precision = torch.exp(-log_variance / 2)
    above = _normal_cdf(precision * (offset + 1 / 255))
    below = _normal_cdf(precision * (offset - 1 / 255))
    inside = _safe_log(above - below)
    darkest, brightest = _safe_log(above), _safe_log(1 - below)
    return torch.where(x0 < -0.999, darkest, torch.where(x0 > 0.999, brightest, inside))


def _normal_cdf(x: Tensor) -> Tensor:
    """The tanh approximation, as published."""
    return (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2


def _safe_log(x: Tensor) -> Tensor:
    return x.clamp(min=1e-12).log()
