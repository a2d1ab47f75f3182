"""Solvers: from pure noise back to an image, in a given number of model evaluations.

Letters: B images; x is what the model sees, a_x x0 + a_e noise: the process's state, scaled.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from speed_engine.diffusion.prediction import solve
from speed_engine.diffusion.schedule import NoiseSchedule
from speed_engine.diffusion.table import TimestepTable


def ddim(
    predict: Callable[[Tensor, float], Tensor],
    schedule: NoiseSchedule,
    table: TimestepTable,
    x: Tensor,
    num_steps: int,
    clip: bool = True,
) -> Tensor:
    """Deterministic DDIM (Song et al. 2021, eta = 0).

    In alpha and sigma it is one solver for every process: Euler's for flows and in sigma space.

    Args:
        predict: the model's answer to x at a timestep, of the table's prediction type.
        schedule: the process.
        table: the linear form of the process and the prediction.
        x: (B, C, H, W) float32 standard normal noise.
        num_steps: model evaluations.
        clip: keep the estimate of the clean image in [-1, 1], as pixels are.

    Returns:
        (B, C, H, W) clean images.
    """
    clean = torch.zeros_like(x)
    noise = x
    for t in schedule.solver_times(num_steps):
        rows = table.rows_at(t)
        x = rows.a_x * clean + rows.a_e * noise
        clean = solve(rows, x, predict(x, t))[0]
        clean = clean.clamp(-1, 1) if clip else clean
        noise = (x - rows.a_x * clean) / rows.a_e  # consistent with the clamped image
    return clean
