"""The timestep table: five numbers per timestep carry process, target and weighting to the kernels.

x_in = a_x x0 + a_e noise      target = b_x x0 + b_e noise      loss = w mean((answer - target)**2)

Letters: B images, T cells.
"""

import torch
from torch import Tensor, nn

from speed_engine.diffusion.prediction import Rows, linear_form
from speed_engine.diffusion.schedule import NoiseSchedule
from speed_engine.runtime.checks import UserError


class TimestepTable(nn.Module):
    """Rows (a_x, a_e, b_x, b_e, w) of any timestep; a closed form in continuous time.

    Args:
        schedule: the process.
        prediction: name of the target, a key of ``PREDICTIONS``.
        weight: (T,) weight of this target's MSE; constant inside a cell.

    Raises:
        UserError: an unknown prediction, or a weight that is negative or not finite.
    """

    coefficients: Tensor

    def __init__(self, schedule: NoiseSchedule, prediction: str, weight: Tensor) -> None:
        super().__init__()
        rows = linear_form(schedule, prediction, schedule.timesteps)
        if not bool(torch.isfinite(weight).all()) or float(weight.min()) < 0:
            raise UserError(
                f"loss weights lie in [{float(weight.min()):.3g}, {float(weight.max()):.3g}]; "
                "a negative weight would maximise the error there."
            )
        self.schedule, self.prediction = schedule, prediction
        coefficients = torch.stack([*rows, weight], dim=1).float()
        self.register_buffer("coefficients", coefficients, persistent=False)

    def forward(self, t: Tensor) -> Tensor:
        """(B,) timesteps -> (B, 5) float32 rows."""
        rows = self.coefficients[self.schedule.cell(t)]
        if self.schedule.discrete:
            return rows
        exact = torch.stack(linear_form(self.schedule, self.prediction, t), dim=1)
        return torch.cat([exact.float(), rows[:, 4:]], dim=1)

    def rows_at(self, t: float) -> Rows:
        """The linear form at one timestep, as float64 scalars; what a solver inverts."""
        time = torch.tensor(t, dtype=self.schedule.timesteps.dtype)
        return linear_form(self.schedule, self.prediction, time)
