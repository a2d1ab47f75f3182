"""Weighted error of a prediction against target = b_x x0 + b_e noise, the noise drawn in place.

Letters: B images, N elements per image. A coefficient row is (a_x, a_e, b_x, b_e, w).
"""

from torch import Tensor

from speed_kernels.philox import normal


def weighted_mse_reference(
    prediction: Tensor, x0: Tensor, coefficients: Tensor, seed: Tensor, ids: Tensor
) -> tuple[Tensor, Tensor]:
    """Per-image loss and error.

    Args:
        prediction: (B, ...) the model's answer, any floating dtype.
        x0: (B, ...) clean data of the same shape.
        coefficients: (B, 5) float32 rows (a_x, a_e, b_x, b_e, w).
        seed: () int64.
        ids: (B,) int64 image counters, those of the noised input.

    Returns:
        (B,) float32 ``w * mean((prediction - target)**2)``, differentiable in the prediction, and
        (B,) float32 ``mean((prediction - target)**2)``, detached.
    """
    flat = x0.flatten(1).float()
    noise = normal(seed, ids, flat.shape[1])
    b_x, b_e, weight = coefficients[:, 2:3], coefficients[:, 3:4], coefficients[:, 4]
    target = b_x * flat + b_e * noise
    squared_error = (prediction.flatten(1).float() - target).square().mean(dim=1)
    return weight * squared_error, squared_error.detach()
