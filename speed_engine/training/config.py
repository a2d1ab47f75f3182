"""Configuration of the optimizer."""

import math
from dataclasses import dataclass
from typing import Literal

from speed_engine.runtime.checks import check, check_between, check_positive


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW, and the average of its iterates (EMA)."""

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
    update: Literal["auto", "separate", "one_sweep", "one_sweep_bf16"] = "auto"
    """Clip, AdamW and average one after the other, or in one sweep that skips updates that are not
    finite; one_sweep_bf16 keeps bfloat16 copies of the weights, too, which need not be cast."""
    ema_decay: float = 0.999
    """Share of the average kept per step, in [0, 1); warms up as (1 + step) / (10 + step)."""

    def __post_init__(self) -> None:
        check_positive("optimizer.learning_rate", self.learning_rate)
        check_between("optimizer.warmup_steps", self.warmup_steps, 0, 10**12)
        decays = 0 <= self.weight_decay < math.inf
        check("optimizer.weight_decay", self.weight_decay, decays, "must be 0 or more, and finite")
        check("optimizer.grad_clip", self.grad_clip, self.grad_clip > 0, "must be positive")
        for name in ("beta1", "beta2", "ema_decay"):
            value = getattr(self, name)
            check(f"optimizer.{name}", value, 0 <= value < 1, "must lie in [0, 1)")
