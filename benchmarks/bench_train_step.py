"""The whole training step against its limits and against other people's loops.

Run: ``python benchmarks/bench_train_step.py [--sections NAME ...] [--cases NAME ...] [--again]
[--dry-run]``. Each case of a section writes its own result; run again, what this commit has
measured on this machine is left alone.

    step     on a CPU the engine, eager and compiled, beside the loop of diffusers, all float32,
             each in a process of its own, in turn; ``gpu.py`` has the steps on a GPU
    loader   the same step fed by shards through the loader, and by one batch again and again
    startup  from the command to the first step, by part, with and without compiled code kept

Reported: milliseconds per step (median and 20 to 80 % range), images/s, model FLOPs as a share of
the rate of a large matrix product that takes its turn beside the steps, the time of every phase and
of every kind of operator.

``--dry-run`` runs every section on tiny models on the CPU, to prove the script.
"""

import argparse
import os
from collections.abc import Callable
from functools import partial
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "5000")  # as the command line, before torch is imported

import torch

import diffusers_step
import loader_step
import startup
from harness import Timing, matrix_product, measured, write_result
from speed_engine.build import build_model
from speed_engine.config import TrainConfig
from speed_engine.runtime.memory import keep_freed_memory
from train_cases import cpu_cases, model_inputs, synthetic_batch, tiny, training_flops
from train_phases import phase_times, shares
from train_providers import CPU_PROVIDERS, HOW, cpu_provider, engine_of
from turns import Build, in_turn

PRODUCT = "matrix product"
CPU_PRODUCT_SIZE = 1024


def main() -> None:
    options = _options()
    device = torch.device("cuda" if torch.cuda.is_available() and not options.dry_run else "cpu")
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
    """One measurement per model; none on a GPU."""
    if device.type == "cuda":
        print("section step is of a CPU; python benchmarks/gpu.py xl measures steps on a GPU")
        return {}
    cases = cpu_cases()
    chosen = {name: cases[name] for name in options.cases or cases}
    if options.dry_run:
        chosen = {name: tiny(config) for name, config in chosen.items() if name != "digits"}
    return {name: partial(compare, name, config, options) for name, config in chosen.items()}


def compare(name: str, config: TrainConfig, options: argparse.Namespace) -> dict[str, Any]:
    """The providers of a CPU in turn, then phases and operators of ours."""
    calls = 10 if name in ("digits", "cifar16") else 1
    builds: dict[str, Build] = {n: partial(cpu_provider, n, config) for n in CPU_PROVIDERS}
    builds[PRODUCT] = _cpu_product
    turns = 1 if options.dry_run else options.repeats or 12
    timings = in_turn(builds, warmup=3, turns=turns, calls=calls)
    rate = 2.0 * CPU_PRODUCT_SIZE**3 / timings.pop(PRODUCT).median * 1e3
    ours = training_flops(build_model(config), model_inputs(config))
    theirs = training_flops(diffusers_step.build(config), diffusers_step.inputs(config))
    flops = {n: theirs if n == "diffusers" else ours for n in CPU_PROVIDERS}
    rows = {n: row(timings[n], config.batch_size, flops[n], rate) for n in timings}
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
    device = torch.device("cpu")
    batch = synthetic_batch(config, device)
    for n in HOW:
        engine = engine_of(n, config, device)
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


def row(timing: Timing, batch: int, flops: float, rate: float) -> dict[str, Any]:
    """Of one provider: flops per image, rate in FLOPs per second."""
    images = 1e3 * batch / timing.median
    return {
        "step_milliseconds": timing._asdict(),
        "images_per_second": round(images, 2),
        "gigaflop_per_image": round(flops / 1e9, 4),
        "share_of_matrix_product": round(images * flops / rate, 4),
    }


def show(figures: dict[str, Any]) -> None:
    for name, facts in figures["providers"].items():
        time = facts["step_milliseconds"]
        print(
            f"{figures['case']:28} {name:24} {time['median']:9.2f} ms "
            f"[{time['p20']:.2f}, {time['p80']:.2f}] {facts['images_per_second']:9.1f} images/s, "
            f"{facts['share_of_matrix_product']:.1%} of a matrix product's rate",
            flush=True,
        )
    for name, ratio in figures["times_as_fast_at_equal_flops"].items():
        print(f"compiled / {name}: {ratio:.2f} times as fast at equal FLOPs")


def _slug(name: str) -> str:
    return name.lower().replace("/", "-")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The whole training step against its limits.")
    parser.add_argument("--sections", nargs="+", default=list(SECTIONS), choices=list(SECTIONS))
    parser.add_argument(
        "--cases", nargs="+", choices=list(cpu_cases()), help="models of section step; default all"
    )
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
