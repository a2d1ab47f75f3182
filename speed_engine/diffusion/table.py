"""The timestep table: five numbers per timestep carry process, target and weighting to the kernels.

x_in = a_x x0 + a_e noise      target = b_x x0 + b_e noise      loss = w mean((answer - target)**2)
"""

import torch
from torch import Tensor

from speed_engine.diffusion.prediction import PREDICTIONS, Rows, from_epsilon_weight
from speed_engine.diffusion.schedule import NoiseSchedule


class TimestepTable:
    """Rows (a_x, a_e, b_x, b_e, w) of every timestep.

    Args:
        schedule: the process.
        prediction: name of the target, a key of ``PREDICTIONS``.
        epsilon_weight: (T,) weight defined on the epsilon-MSE; converted to this target.

    Raises:
        ValueError: an unknown prediction, or a weight that is negative or not finite.
    """

    def __init__(self, schedule: NoiseSchedule, prediction: str, epsilon_weight: Tensor) -> None:
        if prediction not in PREDICTIONS:
            raise ValueError(
                f"prediction {prediction!r} is unknown; choose from {', '.join(PREDICTIONS)}."
            )
        t = schedule.timesteps
        rows = PREDICTIONS[prediction](schedule.alpha(t), schedule.sigma(t))
        weight = epsilon_weight * from_epsilon_weight(rows)
        if not bool(torch.isfinite(weight).all()) or float(weight.min()) < 0:
            raise ValueError(
                f"loss weights lie in [{float(weight.min()):.3g}, {float(weight.max()):.3g}]; "
                "a negative weight would maximise the error there."
            )
        self.rows = rows
        self.coefficients = torch.stack([*rows, weight], dim=1).float()

    def to(self, device: torch.device) -> "TimestepTable":
        """Moves the table; returns self."""
        self.coefficients = self.coefficients.to(device)
        return self

    def __call__(self, t: Tensor) -> Tensor:
        """(B,) int64 timesteps -> (B, 5) float32 rows."""
        return self.coefficients[t]

    def rows_at(self, t: int) -> Rows:
        """The linear form at one timestep, as float64 scalars; what a solver inverts."""
        return Rows(*(column[t] for column in self.rows))
