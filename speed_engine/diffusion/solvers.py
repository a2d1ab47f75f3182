"""Solvers: from pure noise back to an image, in a given number of model evaluations.

Letters: B images; x is the process's state, x_t = alpha(t) x0 + sigma(t) noise.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from speed_engine.diffusion.prediction import solve
from speed_engine.diffusion.schedule import NoiseSchedule
from speed_engine.diffusion.table import TimestepTable


def spaced_timesteps(num_timesteps: int, num_steps: int) -> list[int]:
    """``num_steps`` timesteps from the noisiest down to 0, evenly spaced.

    Raises:
        ValueError: num_steps is outside [1, num_timesteps].
    """
    if not 1 <= num_steps <= num_timesteps:
        raise ValueError(f"{num_steps} solver steps: must lie in [1, {num_timesteps}].")
    spaced = torch.linspace(num_timesteps - 1, 0, num_steps, dtype=torch.float64)
    return [int(t) for t in spaced.round()]


def ddim(
    predict: Callable[[Tensor, int], Tensor],
    schedule: NoiseSchedule,
    table: TimestepTable,
    x: Tensor,
    num_steps: int,
) -> Tensor:
    """Deterministic DDIM (Song et al. 2021, eta = 0) for pixels in [-1, 1].

    Args:
        predict: the model's answer to a state at a timestep, of the table's prediction type.
        schedule: the process.
        table: the linear form of the process and the prediction.
        x: (B, C, H, W) float32 standard normal noise.
        num_steps: model evaluations.

    Returns:
        (B, C, H, W) clean images in [-1, 1].
    """
    clean = torch.zeros_like(x)
    noise = x
    for t in spaced_timesteps(schedule.num_timesteps, num_steps):
        rows = table.rows_at(t)
        x = rows.a_x * clean + rows.a_e * noise
        clean = solve(rows, x, predict(x, t))[0].clamp(-1, 1)
        noise = (x - rows.a_x * clean) / rows.a_e  # consistent with the clamped image
    return clean
