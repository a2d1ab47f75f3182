"""Noise processes as schedulers of diffusers: their class and configuration, where there is one.

``discrete.from_diffusers`` is the other way.
"""

from typing import Any

from speed_engine.diffusion.discrete import DiscreteSchedule
from speed_engine.diffusion.processes import build_schedule
from speed_engine.runtime.checks import UserError

_TARGETS = {"epsilon": "epsilon", "x0": "sample", "v": "v_prediction"}
_BETAS = {  # process -> diffusers' name, and first and last beta of 1000 timesteps
    "linear": ("linear", 1e-4, 0.02),
    "quadratic": ("scaled_linear", 1e-4, 0.02),
    "scaled_linear": ("scaled_linear", 0.00085, 0.012),
}
_SHIFTS = {"flow": 1.0, "shifted_flow": 3.0}


def scheduler_config(
    name: str, num_timesteps: int, prediction: str | None, clip: bool
) -> dict[str, Any]:
    """The scheduler_config.json of a process and a target: a DDIMScheduler, or a flow's Euler.

    Args:
        name: of the process.
        num_timesteps: of it.
        prediction: what the model predicts; None for the target of the process.
        clip: whether clean images lie in [-1, 1].

    Raises:
        UserError: diffusers has no scheduler that shows a model the same images and times.
    """
    schedule = build_schedule(name, num_timesteps)
    target = prediction or schedule.prediction
    if name in _SHIFTS and target == "velocity":
        return {
            "_class_name": "FlowMatchEulerDiscreteScheduler",
            "num_train_timesteps": 1000,  # the network is given 1000 times the time of the flow
            "shift": _SHIFTS[name],
        }
    if not isinstance(schedule, DiscreteSchedule) or target not in _TARGETS:
        raise UserError(
            f"diffusers has no scheduler for the process {name} with the target {target} that "
            "gives a model the same inputs; it has those of linear, quadratic, scaled_linear and "
            "cosine with epsilon, x0 or v, and of flow and shifted_flow with velocity. Export the "
            "weights with --layout original."
        )
    betas: dict[str, Any] = {"beta_schedule": "squaredcos_cap_v2"}
    if name in _BETAS:
        theirs, first, last = _BETAS[name]
        finer = 1000 / num_timesteps
        betas = {
            "beta_schedule": theirs,
            "beta_start": first * finer,
            "beta_end": last * finer,
        }
    return {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": num_timesteps,
        **betas,
        "prediction_type": _TARGETS[target],
        "clip_sample": clip,
        "set_alpha_to_one": True,
        "timestep_spacing": "leading",
        "steps_offset": 0,
    }
