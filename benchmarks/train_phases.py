"""Where a training step's time goes: its phases by the clock, its operators by the profiler."""

import time
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from harness import Timing, summary
from speed_engine.data.batch import Batch
from speed_engine.training.engine import Engine

PHASES = ("noised input", "forward", "loss", "backward", "optimizer and average")
# What an operator of PyTorch, or a kernel on CUDA, is for; all others are elementwise work and
# overhead. The first part that names it takes it.
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
    """Marks moments of an engine's step, on the device's own clock where it has one."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.marks: list[Any] = []

    def mark(self) -> None:
        if self.on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
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
        if not self.on_gpu:
            return [1e3 * (b - a) for a, b in zip(marks, marks[1:], strict=False)]
        torch.cuda.synchronize()
        return [a.elapsed_time(b) for a, b in zip(marks, marks[1:], strict=False)]


def phase_times(engine: Engine, batch: Batch, repeats: int) -> dict[str, Timing]:
    """Of every phase of the engine's own step, after it has been warmed up."""
    clock = PhaseClock(batch.images.device)
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
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as measured:
        for _ in range(steps):
            step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    rows = measured.key_averages()
    if torch.cuda.is_available():
        on_gpu = [row for row in rows if row.device_type.name == "CUDA"]
        times = {row.key: row.self_device_time_total for row in on_gpu}
    else:
        times = {row.key: row.self_cpu_time_total for row in rows}
    found = dict.fromkeys([*PARTS, REST], 0.0)
    for key, value in times.items():
        found[_part(key)] += value / sum(times.values())
    return {name: round(share, 4) for name, share in found.items()}


def _part(key: str) -> str:
    return next((part for part, words in PARTS.items() if any(w in key for w in words)), REST)
