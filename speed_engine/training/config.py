"""Configuration of the optimizer and the averages."""

import math
from dataclasses import dataclass
from typing import Literal

from speed_engine.runtime.checks import check, check_between, check_positive


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """What updates the parameters, and the averages of them (EMA)."""

    name: str = "adamw"
    """The optimizer: adamw."""
    learning_rate: float = 1e-3
    """Step size after warm-up."""
    warmup_steps: int = 100
    """Optimizer steps over which the step size rises linearly."""
    beta1: float = 0.9
    """Decay of the first moment, in [0, 1)."""
    momentum_decay: Literal["none", "demon", "geometric"] | None = None
    """How beta1 falls over the run; demon compensates the rate; by default as the method does."""
    beta2: float = 0.999
    """Decay of the second moment, in [0, 1)."""
    weight_decay: float = 0.0
    """Decoupled decay per step, in units of the learning rate."""
    grad_clip: float = 1.0
    """Largest gradient norm; inf never clips."""
    update: Literal["auto", "separate", "one_sweep"] = "auto"
    """Clip, optimizer and averages one after the other, or AdamW with both in one sweep over
    memory."""
    ema_decay: float = 0.999
    """Share of the average kept per step, in [0, 1)."""
    ema_warmup: bool = True
    """The share rises to that as (1 + step) / (10 + step); False has it from the first step on."""
    averages: tuple[str, ...] = ()
    """Further averages, kept in checkpoints beside that one: ema=DECAY, of another decay,
    constant=DECAY, without warm-up, and power=GAMMA, whose decay is (1 - 1 / step)**(GAMMA + 1)
    (EDM2). --average generates from one."""

    def __post_init__(self) -> None:
        once = len(set(self.averages)) == len(self.averages)
        check("optimizer.averages", self.averages, once, "name each average once")
        check_positive("optimizer.learning_rate", self.learning_rate)
        check_between("optimizer.warmup_steps", self.warmup_steps, 0, 10**12)
        decays = 0 <= self.weight_decay < math.inf
        check("optimizer.weight_decay", self.weight_decay, decays, "must be 0 or more, and finite")
        check("optimizer.grad_clip", self.grad_clip, self.grad_clip > 0, "must be positive")
        for name in ("beta1", "beta2", "ema_decay"):
            value = getattr(self, name)
            check(f"optimizer.{name}", value, 0 <= value < 1, "must lie in [0, 1)")
