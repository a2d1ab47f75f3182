"""The learning rate and the momentum over the steps of a run.

    learning rate(step) = peak  min(1, step / warm-up)  schedule(step)

A schedule that falls ends at its last step with the smallest rate that is not zero. It needs the
length of the run: a resumed run that is made longer follows the schedule of the new length from
there on, so that its rate may rise once.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

Factor = Callable[[int], float]
"""Number of an optimizer step, from 1 -> factor of the learning rate, in (0, 1]."""


def _left(step: int, start: int, steps: int) -> float:
    """The share that is left, before a step, of those after ``start``; 1 up to there."""
    return min(1.0, (steps - step + 1) / max(steps - start, 1))


def constant(steps: int, warmup_steps: int, **options: float) -> Factor:
    """1 throughout."""
    return lambda step: 1.0


def linear(steps: int, warmup_steps: int, **options: float) -> Factor:
    """From 1 after the warm-up to 0 after the last step (Defazio et al. 2023)."""
    return lambda step: _left(step, warmup_steps, steps)


def cosine(steps: int, warmup_steps: int, **options: float) -> Factor:
    """Half a cosine from 1 after the warm-up to 0 after the last step (SGDR, 2017)."""
    return lambda step: math.sin(math.pi / 2 * _left(step, warmup_steps, steps)) ** 2


def warmup_stable_decay(
    steps: int, warmup_steps: int, *, decay_share: float, **options: float
) -> Factor:
    """1, then linearly to 0 over the last ``decay_share`` of the run (Hu et al. 2024, MiniCPM).

    Until the decay begins it does not depend on the length of the run.
    """
    start = max(warmup_steps, steps - math.ceil(decay_share * steps))
    return lambda step: _left(step, start, steps)


def inverse_square_root(
    steps: int, warmup_steps: int, *, reference_steps: int, **options: float
) -> Factor:
    """1 / sqrt(max(step / reference, 1)) (Karras et al. 2024, EDM2), whatever the length."""
    return lambda step: min(1.0, (reference_steps / step) ** 0.5)


SCHEDULES: dict[str, Callable[..., Factor]] = {
    "constant": constant,
    "linear": linear,
    "cosine": cosine,
    "wsd": warmup_stable_decay,
    "inverse_sqrt": inverse_square_root,
}


def linear_warmup(learning_rate: float, warmup_steps: int) -> Callable[[int], float]:
    """Step number, from 1 -> learning rate: a linear rise, then constant."""
    return lambda step: learning_rate * min(1.0, step / max(warmup_steps, 1))


class Momentum(NamedTuple):
    """Both are functions of the step number, from 1."""

    beta1: Callable[[int], float]
    compensation: Callable[[int], float]  # factor of the learning rate


def steady(beta1: float, steps: int) -> Momentum:
    """The same momentum throughout."""
    return Momentum(lambda step: beta1, lambda step: 1.0)


def demon(beta1: float, steps: int) -> Momentum:
    """MDLRC: momentum decays to zero over the run, the learning rate is compensated.

    beta_t = b (1 - p) / ((1 - b) + b (1 - p)), p = share of the run (Chen et al. 2019, Demon), and
    lr_t = lr (1 - b) / (1 - beta_t) = lr (1 - b p), which keeps the weight lr (1 - beta) of each
    new gradient. The most consistent reading of arXiv 2404.07946; no code of its authors is public.
    """

    def decayed(step: int) -> float:
        left = beta1 * (1 - (step - 1) / steps)
        return left / ((1 - beta1) + left)

    return Momentum(decayed, lambda step: 1 - beta1 * (step - 1) / steps)


def geometric(beta1: float, steps: int) -> Momentum:
    """MDLRC as a third party has it: beta_t = max(b 0.9995**t, 0.4), no compensation."""
    floor = min(beta1, 0.4)
    return Momentum(lambda step: max(beta1 * 0.9995 ** (step - 1), floor), lambda step: 1.0)


MOMENTUM_DECAYS: dict[str, Callable[[float, int], Momentum]] = {
    "none": steady,
    "demon": demon,
    "geometric": geometric,
}
