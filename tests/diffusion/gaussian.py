"""Gaussian data, for which the best prediction and the exact solution are known in closed form.

Letters: D = 4 pixels. Images are (B, 1, 2, 2), float64.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from speed_engine.diffusion.processes import build_schedule
from speed_engine.diffusion.solvers import Denoising
from speed_engine.diffusion.table import TimestepTable

D = 4
_FACTOR = 0.3 * torch.randn(D, D, generator=torch.Generator().manual_seed(0)).double()
COVARIANCE = _FACTOR @ _FACTOR.T + 0.05 * torch.eye(D).double()
MEAN = torch.tensor([0.2, -0.3, 0.1, 0.4]).double()
POWER, AXES = torch.linalg.eigh(COVARIANCE)  # from 0.06 to 1.0: not isotropic


def denoised(x: Tensor, signal: Tensor, noise: Tensor) -> Tensor:
    """(B, D) -> (B, D), E[x0 | signal x0 + noise e = x]."""
    gain = signal * POWER / (signal**2 * POWER + noise**2)
    return MEAN + ((x - signal * MEAN) @ AXES * gain) @ AXES.T


def silent(step: int) -> Tensor:
    """For solvers that draw nothing."""
    raise AssertionError("a deterministic solver asked for noise")


@dataclass(frozen=True, eq=False)
class AtTimes(Denoising):
    """At times of somebody else's choosing."""

    chosen: tuple[float, ...] = ()

    def times(self, num_steps: int) -> list[float]:
        """Those, which a caller counts."""
        return list(self.chosen)


def at_times(problem: Denoising, times: Sequence[float]) -> AtTimes:
    """The same problem there."""
    parts = problem.predict, problem.table, problem.noise, problem.clip
    return AtTimes(*parts, tuple(times))


def problem(
    process: str,
    prediction: str | None = None,
    noise: Callable[[int], Tensor] = silent,
    learned: Tensor | None = None,
) -> Denoising:
    """The exact denoiser of a process, answering any prediction."""
    schedule = build_schedule(process)
    table = TimestepTable(schedule, prediction or schedule.prediction, torch.ones(1000))
    return Denoising(exact(table, learned), table, noise, clip=False)


def exact(table: TimestepTable, learned: Tensor | None = None) -> Callable[[Tensor, float], Tensor]:
    """The best answer, and behind it a variance that was learned."""

    def predict(x: Tensor, t: float) -> Tensor:
        rows = table.rows_at(t)
        clean = denoised(x.flatten(1), rows.a_x, rows.a_e).view_as(x)
        answer = rows.b_x * clean + rows.b_e * (x - rows.a_x * clean) / rows.a_e
        return answer if learned is None else torch.cat([answer, learned.expand_as(x)], dim=1)

    return predict


def solution(problem: Denoising, x: Tensor, first: float, last: float) -> Tensor:
    """The probability flow from noise x at the first time to the last, and denoised there."""
    here, there = problem.levels(first), problem.levels(last)
    start = (here.sigma * x.flatten(1) - here.alpha * MEAN) @ AXES
    growth = (there.alpha**2 * POWER + there.sigma**2) / (here.alpha**2 * POWER + here.sigma**2)
    state = there.alpha * MEAN + (start * growth.sqrt()) @ AXES.T
    return denoised(state, there.alpha, there.sigma).view_as(x)


def noises(num_images: int, seed: int = 0) -> Tensor:
    """(B, 1, 2, 2) standard normal."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_images, 1, 2, 2, generator=generator, dtype=torch.float64)


def law(solve: Callable[[Callable[[int], Tensor], Tensor], Tensor], draws: int) -> tuple:
    """Exact mean (D,) and covariance (D, D) of what an affine solver draws.

    ``solve(noise, x)`` sees a zero and one unit vector per row, in x or in one of the ``draws``
    noises: what it answers are the columns of its map.
    """
    num_rows = 1 + D * (1 + draws)

    def unit(block: int) -> Tensor:
        rows = torch.zeros(num_rows, D, dtype=torch.float64)
        rows[1 + D * block : 1 + D * (block + 1)] = torch.eye(D)
        return rows.view(-1, 1, 2, 2)

    drawn = solve(lambda step: unit(1 + step), unit(0)).flatten(1)
    columns = drawn[1:] - drawn[0]
    return drawn[0], columns.T @ columns
