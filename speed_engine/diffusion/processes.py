"""Every noise process by name."""

from collections.abc import Callable

from speed_engine.diffusion.continuous import (
    Edm,
    MomentumEdm,
    RectifiedFlow,
    VarianceExploding,
    VariancePreserving,
)
from speed_engine.diffusion.discrete import cosine, linear, quadratic, scaled_linear
from speed_engine.diffusion.schedule import NoiseSchedule
from speed_engine.runtime.checks import MOST_TIMESTEPS, UserError, check_whole

SCHEDULES: dict[str, Callable[[int], NoiseSchedule]] = {
    "linear": linear,
    "quadratic": quadratic,
    "cosine": cosine,
    "scaled_linear": scaled_linear,
    "vp": VariancePreserving,
    "ve": VarianceExploding,
    "edm": Edm,
    "fdm": MomentumEdm,
    "flow": RectifiedFlow,
    "shifted_flow": lambda num_timesteps: RectifiedFlow(num_timesteps, 3.0, "shifted_flow"),
}


def build_schedule(name: str, num_timesteps: int = 1000) -> NoiseSchedule:
    """The named process with ``num_timesteps`` timesteps or cells.

    Raises:
        UserError: an unknown name, or a number of timesteps that the process does not allow.
    """
    if not isinstance(name, str) or name not in SCHEDULES:
        raise UserError(f"schedule {name!r} is unknown; choose from {', '.join(SCHEDULES)}.")
    check_whole("num_timesteps", num_timesteps, 2, MOST_TIMESTEPS)
    return SCHEDULES[name](num_timesteps)
