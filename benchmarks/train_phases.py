"""Where a training step's time goes: its phases by the clock, its operators by the profiler."""

import time
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from harness import Timing, summary
from speed_engine.data.batch import Batch
from speed_engine.training.engine import Engine

PHASES = ("noised input", "forward", "loss", "backward", "optimizer and average")
# What an operator of PyTorch is for; all others are elementwise work and overhead. The first part
# that names it takes it.
PARTS = {
    "attention": ("attention", "flash", "fmha"),
    "optimizer, clipping, average": ("adamw", "lerp", "vector_norm", "aten::mul_", "lpnorm"),
    "noise": ("speed_kernels::", "noised_input", "weighted_mse", "random_bits"),
    "matrix products": (
        "aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "convolution", "gemm", "nvjet",
        "cutlass",
    ),
}  # fmt: skip
REST = "elementwise and overhead"


class PhaseClock:
    """Marks moments of an engine's step on a CPU."""

    def __init__(self) -> None:
        self.marks: list[float] = []

    def mark(self) -> None:
        self.marks.append(time.perf_counter())

    def around(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """The same call, marked before and after."""

        def run(*args: Any, **kwargs: Any) -> Any:
            self.mark()
            result = call(*args, **kwargs)
            self.mark()
            return result

        return run

    def milliseconds(self) -> list[float]:
        """Between neighbouring marks, which are then forgotten."""
        marks, self.marks = self.marks, []
        return [1e3 * (b - a) for a, b in zip(marks, marks[1:], strict=False)]


def phase_times(engine: Engine, batch: Batch, repeats: int) -> dict[str, Timing]:
    """Of every phase of the engine's own step, after it has been warmed up."""
    clock = PhaseClock()
    forward, steps = engine.forward, []
    engine.forward = clock.around(forward)
    try:
        with patch.object(Tensor, "backward", clock.around(Tensor.backward)):
            for _ in range(repeats):
                clock.mark()
                engine.step(batch)
                clock.mark()
                steps.append(clock.milliseconds())
    finally:
        engine.forward = forward
    columns = zip(*steps, strict=True)
    return {name: summary(list(column)) for name, column in zip(PHASES, columns, strict=True)}


def shares(step: Callable[[], object], steps: int) -> dict[str, float]:
    """Share of the operators' own time by part, of several steps under the profiler."""
    with profile(activities=[ProfilerActivity.CPU]) as measured:
        for _ in range(steps):
            step()
    times = {row.key: row.self_cpu_time_total for row in measured.key_averages()}
    found = dict.fromkeys([*PARTS, REST], 0.0)
    for key, value in times.items():
        found[_part(key)] += value / sum(times.values())
    return {name: round(share, 4) for name, share in found.items()}


def _part(key: str) -> str:
    return next((part for part, words in PARTS.items() if any(w in key for w in words)), REST)
