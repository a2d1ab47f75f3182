"""The whole training step against its limits and against other people's loops.

Run: ``python benchmarks/bench_train_step.py [--sections NAME ...] [--cases NAME ...] [--again]
[--dry-run]``. Each case of a section writes its own result; run again, what this commit has
measured on this machine is left alone.

    step     on a GPU a ladder from the original DiT step (``original_step.py``) upwards; on a CPU
             the engine eager and compiled beside the loop of diffusers, all float32, each in a
             process of its own, in turn
    loader   the same step fed by shards through the loader, and by one batch again and again
    startup  from the command to the first step, by part, with and without compiled code kept

Reported: milliseconds per step (median and 20 to 80 % range), images/s, model FLOPs as a share of a
GPU's dense bfloat16 peak and of the rate of a large matrix product that takes its turn beside the
steps, peak memory on a GPU, the time of every phase and of every kind of operator.

``--dry-run`` runs every section on tiny models on the CPU, to prove the script.
"""

import argparse
import gc
import os
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any
from unittest.mock import patch

os.environ.setdefault("GOMP_SPINCOUNT", "5000")  # as the command line, before torch is imported

import torch

import diffusers_step
import loader_step
import startup
from harness import Timing, interleaved, matrix_product, measured, write_result
from speed_engine.build import build_model
from speed_engine.config import TrainConfig
from speed_engine.planning.gpus import GPUS
from speed_engine.runtime.memory import keep_freed_memory
from speed_engine.training.engine import Engine
from train_cases import (
    cpu_cases,
    gpu_cases,
    kernels,
    model_inputs,
    synthetic_batch,
    tiny,
    training_flops,
)
from train_phases import phase_times, shares
from train_rungs import CPU_PROVIDERS, ENGINE, LADDER, Step, cpu_provider
from turns import Build, in_turn

PRODUCT = "matrix product"
CPU_PRODUCT_SIZE = 1024
STATES_TOGETHER = 0.35  # of a GPU's memory that rungs may hold between their turns


def main() -> None:
    options = _options()
    device = torch.device("cuda" if torch.cuda.is_available() and not options.dry_run else "cpu")
    torch._dynamo.config.recompile_limit = 64  # one entry per rung  # pyright: ignore
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32, as the original's README advises
    for section in options.sections:
        for name, run in SECTIONS[section](device, options).items():
            benchmark = "_".join(filter(None, [f"train_{section}", _slug(name)]))
            if not (options.again or options.dry_run) and measured(benchmark):
                print(f"{benchmark}: measured at this commit, left alone (--again repeats it)")
                continue
            figures = run()
            if options.dry_run:
                print(f"{benchmark}: dry run, nothing kept")
            else:
                print(write_result(benchmark, figures), flush=True)


def steps(device: torch.device, options: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    """One measurement per model."""
    ladder = device.type == "cuda" or options.dry_run
    cases = gpu_cases() if ladder else cpu_cases()
    chosen = {name: cases[name] for name in options.cases or cases if name in cases}
    if options.dry_run:
        chosen = {
            name: tiny(config) for name, config in chosen.items() if "unet" in name or "S/2" in name
        }
    one = partial(_dry_ladder if options.dry_run else climb, device=device, options=options)
    if not ladder:
        one = partial(compare, device=device, options=options)
    return {name: partial(one, name, config) for name, config in chosen.items()}


def compare(
    name: str, config: TrainConfig, device: torch.device, options: argparse.Namespace
) -> dict[str, Any]:
    """The providers of a CPU in turn, then phases and operators of ours."""
    calls = 10 if name == "digits" else 1
    builds: dict[str, Build] = {n: partial(cpu_provider, n, config) for n in CPU_PROVIDERS}
    builds[PRODUCT] = _cpu_product
    timings = in_turn(builds, warmup=3, turns=options.repeats or 12, calls=calls)
    rate = 2.0 * CPU_PRODUCT_SIZE**3 / timings.pop(PRODUCT).median * 1e3
    ours = training_flops(build_model(config), model_inputs(config))
    theirs = training_flops(diffusers_step.build(config), diffusers_step.inputs(config))
    flops = {n: theirs if n == "diffusers" else ours for n in CPU_PROVIDERS}
    rows = {n: row(timings[n], config.batch_size, flops[n], rate, None) for n in timings}
    per_flop = {n: timings[n].median / flops[n] for n in timings}
    figures: dict[str, Any] = {
        "case": f"{name}, batch {config.batch_size}, float32",
        "matrix_product_gflops_per_second": round(rate / 1e9, 1),
        "providers": rows,
        "times_as_fast_at_equal_flops": {
            n: round(per_flop[n] / per_flop["compiled"], 3) for n in timings if n != "compiled"
        },
    }
    keep_freed_memory()
    batch = synthetic_batch(config, device)
    for n, rung in ENGINE.items():
        engine = rung.make_engine(config, device)
        for _ in range(2):
            engine.step(batch)
        phases = phase_times(engine, batch, 3 if calls == 1 else 15)
        kept = "eager, memory kept" if n == "eager" else n
        rows[kept]["phases_milliseconds"] = {p: t._asdict() for p, t in phases.items()}
        rows[kept]["operators"] = shares(partial(engine.step, batch), 3)
    show(figures)
    return figures


def _cpu_product() -> Callable[[], object]:
    return matrix_product(torch.device("cpu"), CPU_PRODUCT_SIZE)[0]


def climb(
    name: str, config: TrainConfig, device: torch.device, options: argparse.Namespace
) -> dict[str, Any]:
    """The ladder of one model: rungs in turn if their states fit together, else one by one."""
    flops = training_flops(build_model(config), model_inputs(config))
    parameters = sum(p.numel() for p in build_model(config).parameters())
    together = options.dry_run or (
        20 * parameters * len(LADDER)
        < STATES_TOGETHER * torch.cuda.get_device_properties(device).total_memory
    )
    rows: dict[str, Any] = {}
    alive: dict[str, Step] = {}
    for rung in LADDER:
        built, facts = first_steps(rung, config, device, options.dry_run)
        rows[rung] = facts
        if built is not None:
            alive[rung] = built
        if built is not None and not together:
            _time({rung: built}, rows, flops, device, options)
            alive.clear()
        del built
        _forget(device)
    if together:
        _time(alive, rows, flops, device, options)
    alive.clear()
    _forget(device)
    best = LADDER["+ one sweep"]
    batch = synthetic_batch(config, device, rows["+ one sweep"]["batch"])
    with kernels(best.kernels):
        engine = best.make_engine(config, device)
        for _ in range(3):
            engine.step(batch)
        phases = phase_times(engine, batch, 2 if options.dry_run else 20)
        rows["+ one sweep"]["phases_milliseconds"] = {p: t._asdict() for p, t in phases.items()}
        rows["+ one sweep"]["operators"] = shares(partial(engine.step, batch), 3)
    figures = {"case": name, "parameters": parameters, "interleaved": together, "providers": rows}
    show(figures)
    return figures


def first_steps(
    rung: str, config: TrainConfig, device: torch.device, strict: bool
) -> tuple[Step | None, dict[str, Any]]:
    """A rung's call after three steps, and its batch and memory; half the batch where it must."""
    obstacle = LADDER[rung].obstacle(config)
    if obstacle:
        return None, {"left_out": obstacle}
    size = config.batch_size
    before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
    while size:
        try:
            step = LADDER[rung].build(config, device, synthetic_batch(config, device, size))
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            for _ in range(3):
                step()
            facts: dict[str, Any] = {"batch": size}
            if device.type == "cuda":
                peak = torch.cuda.max_memory_allocated() - before
                facts["peak_memory_gigabytes"] = round(peak / 1e9, 3)
            return step, facts
        except torch.OutOfMemoryError:
            step = None
            size //= 2
        except Exception as error:  # whatever a compiler may raise: the other rungs go on
            if strict:
                raise
            return None, {"left_out": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
        _forget(device)
    return None, {"left_out": "out of memory"}


def _time(
    alive: dict[str, Step],
    rows: dict[str, Any],
    flops: float,
    device: torch.device,
    options: argparse.Namespace,
) -> None:
    """Steps of each rung without waiting between them, one large matrix product in turn."""
    count = 1 if options.dry_run else 4
    product, product_flops = matrix_product(device, 64 if options.dry_run else 8192)
    providers = {name: partial(_repeat, step, count) for name, step in alive.items()}
    repeats = 1 if options.dry_run else options.repeats or 8
    timings = interleaved({**providers, PRODUCT: product}, warmup=1, repeats=repeats)
    rate = product_flops / timings.pop(PRODUCT).median * 1e3
    peak = None
    if device.type == "cuda":
        gpu = torch.cuda.get_device_name().lower()
        peak = next((facts.bf16_flops for name, facts in GPUS.items() if name in gpu), None)
    for name, timing in timings.items():
        once = Timing(*(value / count for value in timing))
        rows[name] |= row(once, rows[name]["batch"], flops, rate, peak)
        rows[name]["matrix_product_tflops_per_second"] = round(rate / 1e12, 1)


def row(
    timing: Timing, batch: int, flops: float, rate: float, peak: float | None
) -> dict[str, Any]:
    """Of one provider: flops per image, rate and peak in FLOPs per second."""
    images = 1e3 * batch / timing.median
    figures = {
        "step_milliseconds": timing._asdict(),
        "images_per_second": round(images, 2),
        "gigaflop_per_image": round(flops / 1e9, 4),
        "share_of_matrix_product": round(images * flops / rate, 4),
    }
    return figures if peak is None else figures | {"mfu": round(images * flops / peak, 4)}


def show(figures: dict[str, Any]) -> None:
    for name, facts in figures["providers"].items():
        if "left_out" in facts:
            print(f"{figures['case']:28} {name:24} left out: {facts['left_out']}")
            continue
        time = facts["step_milliseconds"]
        print(
            f"{figures['case']:28} {name:24} {time['median']:9.2f} ms "
            f"[{time['p20']:.2f}, {time['p80']:.2f}] {facts['images_per_second']:9.1f} images/s, "
            f"{facts['share_of_matrix_product']:.1%} of a matrix product's rate",
            flush=True,
        )
    for name, ratio in figures.get("times_as_fast_at_equal_flops", {}).items():
        print(f"compiled / {name}: {ratio:.2f} times as fast at equal FLOPs")


def _repeat(step: Step, count: int) -> None:
    for _ in range(count):
        step()


def _forget(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _dry_ladder(*arguments: Any, **options: Any) -> dict[str, Any]:
    """On a CPU as on a GPU: under autocast, but with a compiler that takes no time."""
    real = torch.compile
    quick = lambda model, **_: real(model, backend="eager")
    autocast = lambda _: torch.autocast("cpu", dtype=torch.bfloat16)
    with ExitStack() as stack:
        stack.enter_context(patch.object(torch, "compile", quick))
        stack.enter_context(patch.object(Engine, "_autocast", autocast))
        return climb(*arguments, **options)


def _slug(name: str) -> str:
    return name.lower().replace("/", "-")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The whole training step against its limits.")
    parser.add_argument("--sections", nargs="+", default=list(SECTIONS), choices=list(SECTIONS))
    parser.add_argument("--cases", nargs="+", help="models of section step; default all")
    parser.add_argument("--repeats", type=int, help="turns of every provider")
    parser.add_argument("--again", action="store_true", help="measure what is measured already")
    parser.add_argument("--dry-run", action="store_true", help="tiny models on the CPU")
    return parser.parse_args()


SECTIONS: dict[str, Callable[[torch.device, argparse.Namespace], dict[str, Callable[[], Any]]]] = {
    "step": steps,
    "loader": loader_step.cases,
    "startup": startup.cases,
}

if __name__ == "__main__":
    main()
