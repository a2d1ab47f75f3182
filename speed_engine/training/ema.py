"""Exponential moving averages (EMA) of the parameters: the models that images are generated from.

    average <- decay(step) average + (1 - decay(step)) parameters        step from 1

Another kind of average is a rule for its decay here and its name in ``DECAYS``.
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from speed_engine.runtime.checks import UserError
from speed_engine.runtime.sharding import local
from speed_engine.training.lerp import lerp_in_one_kernel

EMA = "ema"  # the average that every run has, and that is evaluated while it trains

Decay = Callable[[int], float]
"""Number of an optimizer step, from 1 -> share of the average that is kept in it, in [0, 1)."""


def warming_up(final: float) -> Decay:
    """min(final, (1 + step) / (10 + step)): early averages do not carry the initialisation.

    With a constant 0.9999 it would still weigh 37 % after 10,000 steps.

    Raises:
        UserError: the final decay is outside [0, 1).
    """
    if not 0 <= final < 1:
        raise UserError(f"the decay of an EMA must lie in [0, 1); got {final:g}.")
    return lambda step: min(final, (1 + step) / (10 + step))


def constant(decay: float) -> Decay:
    """The same decay from the first step on, as the paper and DiT have it.

    Raises:
        UserError: it is outside [0, 1).
    """
    warming_up(decay)  # checks
    return lambda step: decay


def power(gamma: float) -> Decay:
    """(1 - 1 / step)**(gamma + 1), whose memory is a share of the run (Karras et al. 2024, EDM2).

    gamma = 6.94 averages over a relative width of 0.10, 16.97 over 0.05. Averages of two gammas,
    kept in several checkpoints, are what post-hoc EMA is reconstructed from.

    Raises:
        UserError: gamma is not positive, or above 10^6, where nothing is averaged.
    """
    if not 0 < gamma <= 1e6:
        raise UserError(
            f"a power-function EMA needs a positive exponent of at most 10^6; got {gamma:g}."
        )
    return lambda step: (1 - 1 / step) ** (gamma + 1)


DECAYS: dict[str, Callable[[float], Decay]] = {
    "ema": warming_up,
    "power": power,
    "constant": constant,
}


def decay_of(average: str) -> Decay:
    """The decay of the EMA named RULE=NUMBER, such as ``power=6.94`` or ``ema=0.9999``.

    Raises:
        UserError: the rule is unknown, or the number is missing or out of range.
    """
    rule, _, number = average.partition("=")
    if rule not in DECAYS:
        known = ", ".join(f"{name}=NUMBER" for name in DECAYS)
        raise UserError(f"optimizer.averages={average!r} is unknown; choose from {known}.")
    try:
        value = float(number)
    except ValueError:
        raise UserError(
            f"optimizer.averages={average!r} needs a number, as in {rule}=0.9 or {rule}=7."
        ) from None
    return DECAYS[rule](value)


def average_group(average: str) -> str:
    """The group of a checkpoint that holds an average: ``ema``, or ``ema:NAME`` of any other."""
    return EMA if average == EMA else f"{EMA}:{average}"


class Ema:
    """A model's average, in float32.

    Args:
        model: whose parameters are followed; buffers are copied once.
        decay: of the average.
    """

    def __init__(self, model: nn.Module, decay: Decay) -> None:
        self.decay = decay
        self.model = copy.deepcopy(model).eval().requires_grad_(False).float()
        self.follow(model)

    def follow(self, model: nn.Module) -> None:
        """Average these parameters; call it when they, or the average's own, were laid out anew."""
        pairs = zip(self.model.parameters(), model.parameters(), strict=True)
        trained = [(average, parameter) for average, parameter in pairs if parameter.requires_grad]
        self.averages = [local(average) for average, _ in trained]
        self._parameters = [local(parameter.detach()) for _, parameter in trained]

    @torch.no_grad()
    def update(self, step: int, finite: Tensor) -> None:
        """Take in the parameters after an optimizer step.

        Args:
            step: its number, from 1.
            finite: () bool on the device, False where the step was skipped and leaves the average
                as it is.
        """
        share = 1 - self.decay(step)
        if self.averages and self.averages[0].is_cuda:
            lerp_in_one_kernel(self.averages, self._parameters, share, (~finite).float())
        else:
            weight = torch.where(finite, share, 0.0)
            torch._foreach_lerp_(self.averages, self._parameters, [weight] * len(self.averages))  # pyright: ignore[reportPrivateImportUsage]
