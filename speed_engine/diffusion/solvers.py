"""Solvers: from pure noise back to an image, in a given number of model evaluations.

Each asks the model at the process's own times, from the noisiest down, and ends with its estimate
of the clean image at the last. With alpha and sigma of the process, clean and noise as estimated
from the model's answer, and ' for the next time:

    ddim       state' = alpha' clean + sigma' noise
    heun       state' = state + (alpha' - alpha) clean + (sigma' - sigma) noise, both the mean of
               their estimates at either end of the step, which ddim has reached
    dpmpp_2m   ddim with clean carried on along its last change in log(alpha / sigma)
    ddpm       state' drawn from the posterior given state and clean

``euler`` is ``ddim``: the same step, by the name it has for flows and in sigma space.

Letters: B images, C channels; x is what the model sees, a_x x0 + a_e noise: the process's state,
times its input scale.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from speed_engine.diffusion.prediction import Rows, solve
from speed_engine.diffusion.table import TimestepTable
from speed_engine.runtime.checks import UserError


class Estimate(NamedTuple):
    """What a model's answer says."""

    clean: Tensor  # (B, C, H, W)
    noise: Tensor  # (B, C, H, W), consistent with the clean image
    learned: Tensor  # (B, C, H, W) v of a learned variance, or (B, 0, H, W)


class Levels(NamedTuple):
    """Of a process at one timestep, each () float64."""

    alpha: Tensor
    sigma: Tensor
    scale: Tensor  # from the process's state to what the model sees


@dataclass(frozen=True, eq=False)
class Denoising:
    """What a solver works with.

    Attributes:
        predict: the model's answer to x (B, C, H, W) at a timestep: (B, C, H, W) of the table's
            prediction, or (B, 2 C, H, W) with v, of a learned variance, behind it.
        table: the linear form of the process and the prediction.
        noise: standard normal, like x, of a step counted from 0; stochastic solvers ask for it.
        clip: keep the estimate of the clean image in [-1, 1], as pixels are.
    """

    predict: Callable[[Tensor, float], Tensor]
    table: TimestepTable
    noise: Callable[[int], Tensor]
    clip: bool

    def estimate(self, x: Tensor, t: float) -> Estimate:
        """Ask the model."""
        rows, channels = self.table.rows_at(t), x.shape[1]
        answer = self.predict(x, t)
        clean = solve(rows, x, answer[:, :channels])[0]
        clean = clean.clamp(-1, 1) if self.clip else clean
        return Estimate(clean, (x - rows.a_x * clean) / rows.a_e, answer[:, channels:])

    def times(self, num_steps: int) -> list[float]:
        """At which a solver asks.

        Raises:
            UserError: more steps than the process has timesteps.
        """
        return self.table.schedule.solver_times(num_steps)

    def levels(self, t: float) -> Levels:
        """Of the process."""
        schedule = self.table.schedule
        time = torch.tensor(t, dtype=schedule.timesteps.dtype)
        return Levels(schedule.alpha(time), schedule.sigma(time), schedule.input_scale(time))


Solver = Callable[[Denoising, Tensor, int], Tensor]
"""The problem, x (B, C, H, W) standard normal, model evaluations -> (B, C, H, W) clean images."""


def ddim(problem: Denoising, x: Tensor, num_steps: int) -> Tensor:
    """Deterministic DDIM (Song et al. 2021, eta = 0), first order."""
    clean, noise = torch.zeros_like(x), x
    for t in problem.times(num_steps):
        rows = problem.table.rows_at(t)
        x = rows.a_x * clean + rows.a_e * noise
        clean, noise, _ = problem.estimate(x, t)
    return clean


def heun(problem: Denoising, x: Tensor, num_steps: int) -> Tensor:
    """The trapezoidal rule, second order (Karras et al. 2022, Algorithm 1).

    Theirs in sigma space, the usual one for flows. A step asks the model twice, the last one once:
    n steps take 2 n - 1 evaluations, so that an even ``num_steps`` leaves one unused.
    """
    times = problem.times((num_steps + 1) // 2)
    here = problem.levels(times[0])
    x = problem.table.rows_at(times[0]).a_e * x
    clean, noise, _ = problem.estimate(x, times[0])
    for t in times[1:]:
        rows, there = problem.table.rows_at(t), problem.levels(t)
        ahead = problem.estimate(rows.a_x * clean + rows.a_e * noise, t)
        signal = (there.alpha - here.alpha) * (clean + ahead.clean) / 2
        change = signal + (there.sigma - here.sigma) * (noise + ahead.noise) / 2
        x, here = there.scale * (x / here.scale + change), there
        clean, noise, _ = problem.estimate(x, t)
    return clean


def dpmpp_2m(problem: Denoising, x: Tensor, num_steps: int) -> Tensor:
    """DPM-Solver++(2M), second order with one evaluation a step (Lu et al. 2022, Algorithm 2).

    The first step and the last one are of first order, as its authors do for few steps: towards the
    cleanest timestep log(alpha / sigma) leaps, and carrying on that far costs more than it gains.
    """
    carried, noise, clean = torch.zeros_like(x), x, torch.zeros_like(x)
    times = problem.times(num_steps)
    depths = [_depth(problem.table.rows_at(t)) for t in times]
    for i, t in enumerate(times):
        rows, before = problem.table.rows_at(t), clean
        x = rows.a_x * carried + rows.a_e * noise
        clean = carried = problem.estimate(x, t).clean
        if 0 < i < len(times) - 2:
            ahead, behind = depths[i + 1] - depths[i], depths[i] - depths[i - 1]
            carried = clean + ahead / (2 * behind) * (clean - before)
        noise = (x - rows.a_x * carried) / rows.a_e
    return clean


def ddpm(problem: Denoising, x: Tensor, num_steps: int) -> Tensor:
    """Ancestral sampling (Ho et al. 2020).

    The variance of a step is the posterior's, "fixed small", or what the model learned between that
    and "fixed large" (Nichol and Dhariwal 2021, Eq. 15). Between any two times the betas are those
    of the process on the times that are asked, as they respace them.
    """
    return _ancestral(problem, x, num_steps, _learned)


def ddpm_large(problem: Denoising, x: Tensor, num_steps: int) -> Tensor:
    """Ancestral sampling with the variance of the forward step, "fixed large", beta for DDPM."""
    return _ancestral(problem, x, num_steps, lambda small, large, learned: large)


SOLVERS: dict[str, Solver] = {
    "ddim": ddim,
    "euler": ddim,
    "heun": heun,
    "dpmpp_2m": dpmpp_2m,
    "ddpm": ddpm,
    "ddpm_large": ddpm_large,
}


def solver_named(name: str) -> Solver:
    """A solver.

    Raises:
        UserError: an unknown name.
    """
    if name not in SOLVERS:
        raise UserError(f"solver {name!r} is unknown; choose from {', '.join(SOLVERS)}.")
    return SOLVERS[name]


def _depth(rows: Rows) -> Tensor:
    """() log(alpha / sigma)."""
    return (rows.a_x / rows.a_e).log()


def _ancestral(
    problem: Denoising,
    x: Tensor,
    num_steps: int,
    variance: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Tensor:
    """``variance`` of a step, from the posterior's (), the forward step's () and v (B, C, H, W)."""
    times = problem.times(num_steps)
    x = problem.table.rows_at(times[0]).a_e * x
    for i, t in enumerate(times[:-1]):
        here, there = problem.levels(t), problem.levels(times[i + 1])
        clean, _, learned = problem.estimate(x, t)
        shrink = here.alpha / there.alpha
        large = here.sigma.square() - (shrink * there.sigma).square()
        share = (there.sigma / here.sigma).square()
        mean = shrink * share * (x / here.scale) + there.alpha * large / here.sigma**2 * clean
        spread = variance(share * large, large, learned).sqrt()
        x = there.scale * (mean + spread * problem.noise(i))
    return problem.estimate(x, times[-1]).clean


def _learned(small: Tensor, large: Tensor, learned: Tensor) -> Tensor:
    if learned.shape[1] == 0:
        return small
    share = (learned + 1) / 2
    return torch.exp(share * large.log() + (1 - share) * small.log())
