"""Configuration of the optimizer and the EMAs."""

import math
from dataclasses import dataclass
from typing import Literal

from speed_engine.runtime.checks import check, check_between, check_positive


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """How the parameters are updated, and their exponential moving averages (EMA)."""

    name: str = "adamw"
    """Name of the optimizer: adamw, or muon, which trains the matrices inside the model's blocks by
    orthogonal updates and everything else by AdamW."""
    learning_rate: float = 1e-3
    """Learning rate after the warm-up."""
    adamw_learning_rate: float | None = None
    """With muon, learning rate of the parameters that AdamW trains. By default it is
    learning_rate, which means the same for both: updates are scaled to the same size."""
    warmup_steps: int = 100
    """Number of optimizer steps over which the learning rate rises linearly."""
    schedule: Literal["constant", "linear", "cosine", "wsd", "inverse_sqrt"] = "constant"
    """Learning rate after the warm-up: constant; linear or cosine, which fall to zero over the rest
    of the run; wsd, constant until it falls linearly to zero over the last decay_share of the run;
    inverse_sqrt, which falls as 1 / sqrt(step) from reference_steps on."""
    decay_share: float = 0.2
    """Share of the run over which the schedule wsd falls, in (0, 1]."""
    reference_steps: int = 70_000
    """Number of steps from which on the schedule inverse_sqrt falls; EDM2 has 35,000 to 70,000."""
    beta1: float = 0.9
    """Decay of AdamW's first moment, in [0, 1)."""
    momentum_decay: Literal["none", "demon", "geometric"] | None = None
    """How beta1 falls over the run: not at all (none), by demon, which adjusts the learning rate to
    it, or geometrically. The default is what the method does."""
    beta2: float = 0.999
    """Decay of AdamW's second moment, in [0, 1)."""
    muon_momentum: float = 0.95
    """Momentum of Muon, with Nesterov's look ahead, in [0, 1)."""
    weight_decay: float = 0.0
    """Decoupled weight decay: in a step a parameter shrinks by this share times the
    learning rate."""
    grad_clip: float = 1.0
    """Largest norm of the gradient; a larger gradient is scaled down to it, and inf never clips."""
    update: Literal["auto", "separate", "one_sweep"] = "auto"
    """How a step updates the parameters: separate clips, applies the optimizer and updates the
    EMA one after the other; one_sweep does AdamW and the EMA in one pass over memory. auto is
    separate."""
    ema_decay: float = 0.999
    """Decay of the EMA of the parameters per step, in [0, 1)."""
    ema_warmup: bool = True
    """Whether the decay warms up to that value, as (1 + step) / (10 + step), rather than having it
    from the first step on."""
    averages: tuple[str, ...] = ()
    """Further EMAs that checkpoints hold beside the first: ema=DECAY has another decay,
    constant=DECAY one without warm-up, and power=GAMMA the decay (1 - 1 / step)**(GAMMA + 1) of
    EDM2. The option --average of other commands selects one, and makes power-function averages
    of other lengths from two or more that were kept."""

    def __post_init__(self) -> None:
        once = len(set(self.averages)) == len(self.averages)
        check("optimizer.averages", self.averages, once, "name each EMA once")
        check_positive("optimizer.learning_rate", self.learning_rate)
        check_between("optimizer.warmup_steps", self.warmup_steps, 0, 10**12)
        decays = 0 <= self.weight_decay < math.inf
        check("optimizer.weight_decay", self.weight_decay, decays, "must be 0 or more, and finite")
        check("optimizer.grad_clip", self.grad_clip, self.grad_clip > 0, "must be positive")
        rate = self.adamw_learning_rate
        some = rate is None or 0 < rate < math.inf
        check("optimizer.adamw_learning_rate", rate, some, "must be positive and finite")
        share = 0 < self.decay_share <= 1
        check("optimizer.decay_share", self.decay_share, share, "must lie in (0, 1]")
        check_between("optimizer.reference_steps", self.reference_steps, 1, 10**12)
        for name in ("beta1", "beta2", "muon_momentum", "ema_decay"):
            value = getattr(self, name)
            check(f"optimizer.{name}", value, 0 <= value < 1, "must lie in [0, 1)")

    def check_effect(self) -> None:
        """Refuse what has no effect; one layer of a configuration may have it, until the next.

        Raises:
            UserError: a rate of AdamW beside that of Muon, without Muon.
        """
        rate = self.adamw_learning_rate
        apart = rate is None or self.name != "adamw"
        need = "has no effect with optimizer.name=adamw; set optimizer.learning_rate"
        check("optimizer.adamw_learning_rate", rate, apart, need)
