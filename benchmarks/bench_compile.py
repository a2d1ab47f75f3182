"""Does torch.compile pay for a training run here, its compile time included?

Run: ``python benchmarks/bench_compile.py``. Times whole optimizer steps of the digits preset, eager
and compiled, in turn; prints how many steps it takes until compiling has paid for itself, without
and with compiled code from an earlier run in Inductor's cache.

``--depths`` measures instead how the first step's cost grows with the number of blocks, compiled as
a whole and block by block, each in a process and with a cache of its own. Processor seconds, the
compiler's included, hold on a busy machine, too.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from harness import interleaved, write_result
from speed_engine.models.config import DiTConfig
from speed_engine.models.layers.blocks import compiled
from speed_engine.presets import PRESETS
from speed_engine.runtime.machine import torch_device
from speed_engine.runtime.memory import keep_freed_memory
from train_cases import make_engine, synthetic_batch

FIRST_STEP = "--first-step"  # HOW DEPTH, of this script: print the seconds of one first step
DEPTHS = (2, 8, 28)


def main() -> None:
    if FIRST_STEP in sys.argv:
        how, depth = sys.argv[-2:]
        print(json.dumps(first_step(how, int(depth))[1]))
    elif "--depths" in sys.argv:
        by_depth()
    else:
        digits()


def by_depth() -> None:
    """The first step's seconds for models of growing depth."""
    figures = {
        how: {depth: first_step_elsewhere(how, depth) for depth in DEPTHS}
        for how in ("off", "on", "blocks")
    }
    path = write_result(
        "compile_by_depth",
        {"case": "first optimizer step, width 64, batch 128, cold cache", "seconds": figures},
    )
    for how, depths in figures.items():
        for depth, seconds in depths.items():
            print(f"{how:7} {depth:3} blocks  {seconds['processor']:7.1f} s of processor time")
    print(path)


def first_step_elsewhere(how: str, depth: int, cache: str | None = None) -> dict[str, float]:
    """In a process of its own; without ``cache``, with an empty one."""
    with tempfile.TemporaryDirectory() as empty:
        done = subprocess.run(
            [sys.executable, __file__, FIRST_STEP, how, str(depth)],
            env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache or empty},
            capture_output=True,
            text=True,
            check=True,
        )
    return json.loads(done.stdout)


def digits() -> None:
    """Steps of the digits preset until compiling has paid."""
    keep_freed_memory()  # as the trainer does
    _, config = PRESETS["digits"]
    assert isinstance(config.model, DiTConfig)
    depth = config.model.depth
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        eager, first_eager = first_step("off", depth)
        fast, first_compiled = first_step("on", depth)
        cached_seconds = first_step_elsewhere("on", depth, cache)["wall"]
        eager_seconds, cold_seconds = first_eager["wall"], first_compiled["wall"]
        timings = interleaved({"eager": eager, "compiled": fast})
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


def first_step(how: str, depth: int) -> tuple[Callable, dict[str, float]]:
    """A step of the digits preset with so many blocks, and the seconds that its first call took."""
    _, config = PRESETS["digits"]
    assert isinstance(config.model, DiTConfig)
    config = replace(config, model=replace(config.model, depth=depth))
    device = torch_device(config.device)
    batch = synthetic_batch(config, device)
    engine = make_engine(config, device, forward=partial(compiled, how=how))
    step = partial(engine.step, batch)
    begin, processor = time.perf_counter(), processor_seconds()
    float(step().loss)
    seconds = {
        "wall": time.perf_counter() - begin,
        "processor": processor_seconds() - processor,
    }
    return step, seconds


def processor_seconds() -> float:
    """Of this process and those it has waited for, such as the compiler."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


if __name__ == "__main__":
    main()
