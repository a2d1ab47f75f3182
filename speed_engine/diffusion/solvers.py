"""Solvers: from pure noise back to an image, in a given number of model evaluations.

Each asks the model at the process's own times, from the noisiest down, and ends with its estimate
of the clean image at the last. With alpha and sigma of the process, clean and noise as estimated
from the model's answer, and ' for the next time:

    ddim       state' = alpha' clean + sigma' noise; with eta, a part of the noise is drawn anew
    heun       state' = state + (alpha' - alpha) clean + (sigma' - sigma) noise, both the mean of
               their estimates at either end of the step, which ddim has reached; with churn, noise
               is added before each step
    dpmpp_2m   ddim with clean carried on along its last change in log(alpha / sigma)
    ddpm       state' drawn from the posterior given state and clean

``euler`` is ``ddim``: the same step, by the name it has for flows and in sigma space.

A solver is spelled SOLVER[+OPTION=VALUE ...], as methods are: ``heun+churn=40``, ``ddim+eta=1``.
``start`` is an option of all. It says what they start from: ``unit`` noise, as DiT, DDPM and
diffusers do, or the ``process``'s share of it, sigma times noise at the noisiest time, 0.99998 for
DDPM. In sigma space, where there is no unit, both are sigma times noise.

Letters: B images, C channels; x is what the model sees, a_x x0 + a_e noise: the process's state,
times its input scale.
"""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from speed_engine.diffusion.grammar import Spelling, read_options
from speed_engine.diffusion.prediction import Rows, solve
from speed_engine.diffusion.table import TimestepTable
from speed_engine.runtime import strict
from speed_engine.runtime.checks import UserError, nearest, shortened


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
        start: what a solver begins with.
    """

    predict: Callable[[Tensor, float], Tensor]
    table: TimestepTable
    noise: Callable[[int], Tensor]
    clip: bool
    start: Literal["unit", "process"] = field(default="process", kw_only=True)

    def begin(self, noise: Tensor, t: float) -> Tensor:
        """What the model sees first, from standard normal noise."""
        levels = self.levels(t)
        unit = self.start == "unit" and bool(levels.alpha != 1)
        return levels.scale * (1.0 if unit else levels.sigma) * noise

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


def ddim(problem: Denoising, x: Tensor, num_steps: int, *, eta: float = 0.0) -> Tensor:
    """DDIM (Song et al. 2021), first order; deterministic unless eta is above 0.

    Args:
        problem: what to solve.
        x: (B, C, H, W) standard normal.
        num_steps: model evaluations.
        eta: share of the posterior's standard deviation that is drawn anew, in [0, 1]; 1 is the
            ancestral step.
    """
    times = problem.times(num_steps)
    x = problem.begin(x, times[0])
    clean, noise, _ = problem.estimate(x, times[0])
    for i, t in enumerate(times[1:]):
        rows = problem.table.rows_at(t)
        x = rows.a_x * clean + rows.a_e * noise
        if eta > 0:
            there = problem.levels(t)
            fresh = eta**2 * _variances(problem.levels(times[i]), there)[0]
            kept = (there.sigma.square() - fresh).sqrt()
            drawn = kept * noise + fresh.sqrt() * problem.noise(i)
            x = rows.a_x * clean + there.scale * drawn
        clean, noise, _ = problem.estimate(x, t)
    return clean


def heun(
    problem: Denoising,
    x: Tensor,
    num_steps: int,
    *,
    churn: float = 0.0,
    churn_min: float = 0.0,
    churn_max: float = math.inf,
    churn_noise: float = 1.0,
) -> Tensor:
    """The trapezoidal rule, second order (Karras et al. 2022, Algorithms 1 and 2).

    Theirs in sigma space, the usual one for flows. A step asks the model twice, the last one once:
    n steps take 2 n - 1 evaluations, so that an even ``num_steps`` leaves one unused.

    Args:
        problem: what to solve.
        x: (B, C, H, W) standard normal.
        num_steps: model evaluations.
        churn: S_churn, 0 or more; before a step the noise level rises by churn / n, at most by
            sqrt(2) - 1 of itself. On a process of timesteps it rises to the nearest one.
        churn_min: S_tmin, the least sigma / alpha at which it does.
        churn_max: S_tmax, the largest.
        churn_noise: S_noise, standard deviation of what is added.
    """
    times = problem.times((num_steps + 1) // 2)
    most = min(churn / len(times), 2**0.5 - 1)
    x = problem.begin(x, times[0])
    for i, t in enumerate(times):
        here = problem.levels(t)
        level = float(here.sigma / here.alpha)
        if most > 0 and churn_min <= level <= churn_max:
            t = problem.table.schedule.time_at(level * (1 + most))
            raised = problem.levels(t)
            added = (raised.sigma.square() - (raised.alpha * level).square()).clamp(min=0).sqrt()
            kept = raised.alpha / here.alpha * (x / here.scale)
            x = raised.scale * (kept + added * churn_noise * problem.noise(i))
            here = raised
        clean, noise, _ = problem.estimate(x, t)
        if i + 1 == len(times):
            break
        rows, there = problem.table.rows_at(times[i + 1]), problem.levels(times[i + 1])
        ahead = problem.estimate(rows.a_x * clean + rows.a_e * noise, times[i + 1])
        signal = (there.alpha - here.alpha) * (clean + ahead.clean) / 2
        change = signal + (there.sigma - here.sigma) * (noise + ahead.noise) / 2
        x = there.scale * (x / here.scale + change)
    return clean


def dpmpp_2m(problem: Denoising, x: Tensor, num_steps: int) -> Tensor:
    """DPM-Solver++(2M), second order with one evaluation a step (Lu et al. 2022, Algorithm 2).

    Of first order are the first step and the last one, to the clean image, as in diffusers. A step
    more than twice as deep as the one before carries on as if it were as deep: towards the cleanest
    timestep log(alpha / sigma) leaps, and carrying on that far costs more than it gains.
    """
    times = problem.times(num_steps)
    depths = [_depth(problem.table.rows_at(t)) for t in times]
    x = problem.begin(x, times[0])
    before = problem.estimate(x, times[0]).clean
    carried = clean = before
    for i, t in enumerate(times[1:]):
        here, rows = problem.table.rows_at(times[i]), problem.table.rows_at(t)
        if i > 0:
            leap = float((depths[i + 1] - depths[i]) / (depths[i] - depths[i - 1]))
            carried = clean + (leap if leap <= _LONGEST_LEAP else 1.0) / 2 * (clean - before)
        noise = (x - here.a_x * carried) / here.a_e
        x = rows.a_x * carried + rows.a_e * noise
        before, clean = clean, problem.estimate(x, t).clean
        carried = clean
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


def check_solver(text: str) -> Spelling:
    """A solver with its options, taken apart.

    Raises:
        UserError: an unknown name or option, or a value of another type or out of range.
    """
    spelling = read_options(text, "solver", "heun+churn=40")
    name = spelling.method
    if name not in SOLVERS:
        raise UserError(f"solver {shortened(name)!r} is unknown; choose from {', '.join(SOLVERS)}.")
    known = _options_of(name)
    for option, value in spelling.options.items():
        if option not in known:
            raise UserError(
                f"solver {name!r} has no option {shortened(option)}, the nearest is "
                f"{nearest(option, known)}; it has {', '.join(known)}."
            )
        read = strict.read(known[option], value, f"solver {name!r}: {option}")
        low, high = _RANGES.get(option, (-math.inf, math.inf))
        if option in _RANGES and not low <= read <= high:
            raise UserError(f"solver {name!r}: {option}={read} must lie in [{low:g}, {high:g}].")
    return spelling


def solver_named(text: str) -> Solver:
    """The solver that is spelled so; it starts from unit noise unless it says ``start=process``.

    Raises:
        UserError: as ``check_solver``.
    """
    spelling = check_solver(text)
    given: dict[str, Any] = dict(spelling.options)
    start = given.pop("start", "unit")
    solve = partial(SOLVERS[spelling.method], **given)
    return lambda problem, x, num_steps: solve(replace(problem, start=start), x, num_steps)


_RANGES = {
    "eta": (0.0, 1.0), "churn": (0.0, math.inf), "churn_min": (0.0, math.inf),
    "churn_max": (0.0, math.inf), "churn_noise": (0.0, 10.0),
}  # fmt: skip
_LONGEST_LEAP = 2.0


def _options_of(name: str) -> dict[str, Any]:
    """Types of a solver's options by name."""
    parameters = inspect.signature(SOLVERS[name]).parameters.values()
    own = {of.name: of.annotation for of in parameters if of.kind is of.KEYWORD_ONLY}
    return own | {"start": Literal["unit", "process"]}


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
    x = problem.begin(x, times[0])
    for i, t in enumerate(times[:-1]):
        here, there = problem.levels(t), problem.levels(times[i + 1])
        clean, _, learned = problem.estimate(x, t)
        small, large = _variances(here, there)
        shrink = here.alpha / there.alpha
        share = (there.sigma / here.sigma).square()
        mean = shrink * share * (x / here.scale) + there.alpha * large / here.sigma**2 * clean
        x = there.scale * (mean + variance(small, large, learned).sqrt() * problem.noise(i))
    return problem.estimate(x, times[-1]).clean


def _variances(here: Levels, there: Levels) -> tuple[Tensor, Tensor]:
    """() each, of a step to less noise: the posterior's, and that of the forward step."""
    large = here.sigma.square() - (here.alpha / there.alpha * there.sigma).square()
    return (there.sigma / here.sigma).square() * large, large


def _learned(small: Tensor, large: Tensor, learned: Tensor) -> Tensor:
    if learned.shape[1] == 0:
        return small
    share = (learned + 1) / 2
    return torch.exp(share * large.log() + (1 - share) * small.log())
