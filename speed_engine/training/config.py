"""Configuration of the optimizer and the EMAs."""

import math
from dataclasses import dataclass
from typing import Literal

from speed_engine.runtime.checks import check, check_between, check_positive


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """How the parameters are updated, and their exponential moving averages (EMA)."""

    name: str = "adamw"
    """Name of the optimizer; there is adamw."""
    learning_rate: float = 1e-3
    """Learning rate after the warm-up."""
    warmup_steps: int = 100
    """Number of optimizer steps over which the learning rate rises linearly."""
    beta1: float = 0.9
    """Decay of AdamW's first moment, in [0, 1)."""
    momentum_decay: Literal["none", "demon", "geometric"] | None = None
    """How beta1 falls over the run: not at all (none), by demon, which adjusts the learning rate to
    it, or geometrically. The default is what the method does."""
    beta2: float = 0.999
    """Decay of AdamW's second moment, in [0, 1)."""
    weight_decay: float = 0.0
    """Decoupled weight decay of AdamW: in a step a parameter shrinks by this share times the
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
    EDM2. The option --average of other commands selects one."""

    def __post_init__(self) -> None:
        once = len(set(self.averages)) == len(self.averages)
        check("optimizer.averages", self.averages, once, "name each EMA once")
        check_positive("optimizer.learning_rate", self.learning_rate)
        check_between("optimizer.warmup_steps", self.warmup_steps, 0, 10**12)
        decays = 0 <= self.weight_decay < math.inf
        check("optimizer.weight_decay", self.weight_decay, decays, "must be 0 or more, and finite")
        check("optimizer.grad_clip", self.grad_clip, self.grad_clip > 0, "must be positive")
        for name in ("beta1", "beta2", "ema_decay"):
            value = getattr(self, name)
            check(f"optimizer.{name}", value, 0 <= value < 1, "must lie in [0, 1)")
