"""Does torch.compile pay for a training run here, its compile time included?

Run: ``python benchmarks/bench_compile.py``. Times whole optimizer steps of the digits preset, eager
and compiled, in turn; prints how many steps it takes until compiling has paid for itself, without
and with compiled code from an earlier run in Inductor's cache.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import torch

from harness import interleaved, write_result
from speed_engine.assemble import build_model, build_objective, build_process
from speed_engine.data.loader import Batch
from speed_engine.ema import Ema
from speed_engine.engine import Engine
from speed_engine.environment import torch_device
from speed_engine.optim import adamw, linear_warmup
from speed_engine.presets import PRESETS

FIRST_STEP = "--first-step"  # of this script: print the seconds of one first compiled step


def main() -> None:
    _, config = PRESETS["digits"]
    if FIRST_STEP in sys.argv:
        print(first_step(compiled=True)[1])
        return
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        eager, eager_seconds = first_step(compiled=False)
        compiled, cold_seconds = first_step(compiled=True)
        again = subprocess.run(
            [sys.executable, __file__, FIRST_STEP], capture_output=True, text=True, check=True
        )
        cached_seconds = float(again.stdout)
        timings = interleaved({"eager": eager, "compiled": compiled})
    saved = (timings["eager"].median - timings["compiled"].median) / 1e3
    pays = {
        name: round((seconds - eager_seconds) / saved) if saved > 0 else None
        for name, seconds in (("cold", cold_seconds), ("cached", cached_seconds))
    }
    figures = {
        "case": f"digits preset, batch {config.batch_size}, whole optimizer step",
        "first_step_seconds": {
            "eager": eager_seconds,
            "compiled cold": cold_seconds,
            "compiled cached": cached_seconds,
        },
        "step_milliseconds": {name: timing._asdict() for name, timing in timings.items()},
        "steps_until_compiling_pays": pays,
        "steps_of_the_preset": config.steps,
    }
    path = write_result("compile", figures)
    for name, timing in timings.items():
        print(f"{name:9} {timing.median:7.2f} ms [{timing.p20:.2f}, {timing.p80:.2f}]")
    print(f"first step {eager_seconds:.1f} s, compiled {cold_seconds:.1f} s, ", end="")
    print(f"{cached_seconds:.1f} s with a cache")
    print(f"compiling pays after {pays['cold']} steps, {pays['cached']} with a cache; {path}")


def first_step(compiled: bool) -> tuple[Callable[[], object], float]:
    """A step of the digits preset, and the seconds that its first call took."""
    _, config = PRESETS["digits"]
    device = torch_device(config)
    size = config.batch_size
    batch = Batch(
        torch.rand(size, *config.data.image_shape, device=device) * 2 - 1,
        {"labels": torch.arange(size, device=device) % config.data.num_classes},
        torch.arange(size, device=device),
    )
    step = make_step(config, device, compiled, batch)
    begin = time.perf_counter()
    float(step().loss)
    return step, time.perf_counter() - begin


def make_step(config, device: torch.device, compiled: bool, batch: Batch) -> Callable:
    model = build_model(config).to(device)
    engine = Engine(
        model,
        build_objective(config, build_process(config), model).to(device),
        adamw(model, learning_rate=1e-3, beta1=0.9, beta2=0.999, weight_decay=0),
        Ema(model, 0.999),
        learning_rate=linear_warmup(1e-3, 1),
        grad_clip=1.0,
        forward=torch.compile(model) if compiled else model,
    )
    return lambda: engine.step(batch)


if __name__ == "__main__":
    main()
