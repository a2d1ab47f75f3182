"""The ladder of DiT-XL/2 at 256 images a step, and DiT-S/2, which the host could hold up.

The rows that every change must show come first and take 105 seconds together on an H200 whose
caches are empty; the others follow where there is time.
"""

import gc
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from gpu_rows import Rows
from harness import matrix_product, summary
from original_step import OriginalStep
from speed_engine.build import build_model
from speed_engine.config import TrainConfig
from speed_engine.models.layers.blocks import compiled
from speed_engine.planning.gpus import GPUS
from train_cases import (
    gpu_cases,
    kernels,
    make_engine,
    model_inputs,
    synthetic_batch,
    training_flops,
)

GPU = torch.device("cuda")
STEPS = 12


@dataclass(frozen=True, kw_only=True)
class Rung:
    """How a row trains.

    Attributes:
        seconds: that the row may take, a tenth more than it took on an H200.
    """

    seconds: float
    kernels: bool = True
    how: str = "blocks"  # of torch.compile
    update: str = "separate"
    microbatch: int | None = None
    batch: int = 256
    original: bool = False  # the loop of DiT's authors, under bfloat16 autocast
    model: dict[str, Any] = field(default_factory=dict)  # options of its configuration


BF16 = {"residual_dtype": "bfloat16"}
FASTEST = Rung(seconds=15, model=BF16, update="one_sweep")
XL = {
    "default": Rung(seconds=33),
    "bf16 stream, one sweep": FASTEST,
    "kernels off": Rung(seconds=35, kernels=False),
    "bf16 stream": Rung(seconds=14, model=BF16),
    "microbatch 128": Rung(seconds=15, microbatch=128),
    "recompute 0.5": Rung(seconds=15, model={"checkpointing": 0.5}),
    "original loop, SDPA, batch 64": Rung(seconds=6, original=True, batch=64),
    "default again": Rung(seconds=14),
    "bf16 stream, one sweep, whole": Rung(seconds=59, model=BF16, update="one_sweep", how="on"),
}
SMALL = {
    "whole, CUDA graphs": Rung(seconds=24, how="graphs"),
    "default": Rung(seconds=9),
    "kernels off": Rung(seconds=24, kernels=False),
    "bf16 stream": Rung(seconds=9, model=BF16),
    "original loop, SDPA": Rung(seconds=3, original=True),
    "whole": Rung(seconds=24, how="on"),
    "whole, CUDA graphs, bf16 stream, one sweep": Rung(
        seconds=24, how="graphs", model=BF16, update="one_sweep"
    ),
}
# What every change must show; the rest follows as it is listed.
FIRST = (
    ("XL/2", "default"),
    ("XL/2", "bf16 stream, one sweep"),
    ("XL/2", "kernel table"),
    ("S/2", "whole, CUDA graphs"),
    ("XL/2", "kernels off"),
    ("S/2", "default"),
)


def measure(rows: Rows) -> None:
    ladders = {"XL/2": XL, "S/2": SMALL}
    every = [(size, name) for size, ladder in ladders.items() for name in ladder]
    for size, name in dict.fromkeys((*FIRST, *every)):
        if name == "kernel table":
            rows.row("XL/2: kernel table", 8, partial(kernel_table, FASTEST))
            continue
        rung = ladders[size][name]
        rows.row(f"{size}: {name}", rung.seconds, partial(run, f"DiT-{size}", rung))


def run(case: str, rung: Rung) -> dict[str, Any]:
    """Milliseconds of a step, images per second, use of the GPU's peak, peak of memory."""
    config = _config(case, rung)
    begin = time.perf_counter()
    with kernels(rung.kernels):
        step = build(config, rung)
        built = time.perf_counter() - begin
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        first = time.perf_counter() - begin - built
        step()
        found = timed_steps(step, STEPS)
    images = 1e3 * config.batch_size / found["ms"]["median"]
    flops = _flops(case)
    peak = next(
        (f.bf16_flops for n, f in GPUS.items() if n in torch.cuda.get_device_name().lower()), None
    )
    found |= {
        "images_per_second": round(images, 1),
        "peak_gigabytes": round(torch.cuda.max_memory_allocated() / 1e9, 2),
        "build_seconds": round(built, 1),
        "first_step_seconds": round(first, 1),
        "mfu": peak and round(images * flops / peak, 4),
        "product_tflops": _product(),
    }
    del step
    forget()
    return found


def build(config: TrainConfig, rung: Rung) -> Callable[[], object]:
    batch = synthetic_batch(config, GPU)
    if rung.original:
        with GPU:
            model = build_model(config)
        return partial(OriginalStep(model, config), batch)
    engine = make_engine(config, GPU, forward=partial(compiled, how=rung.how), update=rung.update)
    engine.microbatch_size = rung.microbatch
    return partial(engine.step, batch)


def timed_steps(step: Callable[[], object], count: int) -> dict[str, Any]:
    """Steps one after the other without waiting, each by the device's clock."""
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    torch.cuda.synchronize()
    host = time.perf_counter()
    marks[0].record()
    for mark in marks[1:]:
        step()
        mark.record()
    host = time.perf_counter() - host
    torch.cuda.synchronize()
    times = summary([a.elapsed_time(b) for a, b in zip(marks, marks[1:], strict=False)])
    return {"ms": _rounded(times._asdict()), "host_ms": round(1e3 * host / count, 2)}


def kernel_table(rung: Rung) -> dict[str, Any]:
    """Milliseconds and launches per step of every kernel, by the profiler."""
    step = build(_config("DiT-XL/2", rung), rung)
    found = profiled(step, 70)
    del step
    forget()
    return found


def profiled(step: Callable[[], object], shown: int) -> dict[str, Any]:
    """The device's own time, in which nothing that the host delays counts.

    Args:
        step: is called three times before.
        shown: kernels that are named, those first that take longest.
    """
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as measured:
        for _ in range(2):
            step()
        torch.cuda.synchronize()
    found: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
    for row in measured.key_averages():
        found[row.key[:110]][0] += row.self_device_time_total / 2e3
        found[row.key[:110]][1] += row.count / 2
    ordered = sorted(found.items(), key=lambda row: -row[1][0])
    return {
        "total_ms": round(sum(ms for _, (ms, _) in ordered), 2),
        "kernels": {name: [round(ms, 3), count] for name, (ms, count) in ordered[:shown]},
    }


def forget() -> None:
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()


def _config(case: str, rung: Rung) -> TrainConfig:
    config = gpu_cases()[case]
    return replace(config, batch_size=rung.batch, model=replace(config.model, **rung.model))


def _flops(case: str) -> float:
    config = gpu_cases()[case]
    with torch.device("meta"):
        model = build_model(config)
        return training_flops(model, {n: v.to("meta") for n, v in model_inputs(config).items()})


def _product() -> float:
    call, flops = matrix_product(GPU, 8192)
    return round(flops / timed_steps(call, 10)["ms"]["median"] / 1e9, 1)


def _rounded(times: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 3) for name, value in times.items()}
