"""Timing protocol shared by every benchmark.

Providers run in turn, call by call, so that a change of clock or a neighbour's load meets all of
them alike. Reported are the median and the 20 to 80 % range of milliseconds per call. Results are
JSON files under ``results/``, one per benchmark and machine, with what is needed to repeat them.
Writing one prints every figure's ratio to the committed one (``regression.py``).
"""

import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

import regression
from speed_engine.runtime.environment import CHANGED, describe

RESULTS = Path(__file__).parent / "results"


class Timing(NamedTuple):
    """Milliseconds per call, where nothing else is said."""

    median: float
    p20: float
    p80: float


def interleaved(
    providers: dict[str, Callable[[], object]], warmup: int = 5, repeats: int = 50
) -> dict[str, Timing]:
    """Time each provider ``repeats`` times, one call of each in turn."""
    once = _time_cuda if torch.cuda.is_available() else _time_cpu
    for call in providers.values():
        for _ in range(warmup):
            call()
    samples: dict[str, list[float]] = {name: [] for name in providers}
    for _ in range(repeats):
        for name, call in providers.items():
            samples[name].append(once(call))
    return {name: summary(values) for name, values in samples.items()}


def write_result(benchmark: str, figures: dict[str, Any]) -> Path:
    """Store figures with the command, the machine and the versions they were measured with."""
    facts = facts_of_run()
    path = result_path(benchmark)
    path.parent.mkdir(parents=True, exist_ok=True)
    before = regression.committed(path)
    path.write_text(json.dumps({"environment": facts, **figures}, indent=1) + "\n")
    for line in regression.compared(before, json.loads(path.read_text())):
        print(line)
    return path


def facts_of_run() -> dict[str, Any]:
    """Command, machine and versions; with a GPU its clocks, driver and power limit."""
    facts = describe([Path(sys.argv[0]).name, *sys.argv[1:]])
    if torch.cuda.is_available() and shutil.which("nvidia-smi"):
        facts["gpu"] = _gpu_facts()
    return facts


def _gpu_facts() -> dict[str, str]:
    """As nvidia-smi has them."""
    names = (
        "name", "driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.limit",
        "temperature.gpu",
    )  # fmt: skip
    asked = subprocess.run(
        ["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader"],
        capture_output=True,
        text=True,
    )
    return dict(zip(names, asked.stdout.strip().split(", "), strict=False))


def result_path(benchmark: str) -> Path:
    """Where this machine's figures of a benchmark are kept."""
    name = machine_name("cuda" if torch.cuda.is_available() else "cpu")
    return RESULTS / name / f"{benchmark}.json"


def measured(benchmark: str) -> bool:
    """Whether this commit, without changes, was measured on this kind of machine already."""
    path = result_path(benchmark)
    if not path.exists():
        return False
    commit = json.loads(path.read_text())["environment"]["git_commit"]
    changed = commit is None or commit.endswith(CHANGED)
    return not changed and commit == describe([])["git_commit"]


def matrix_product(device: torch.device, size: int) -> tuple[Callable[[], object], float]:
    """A call of one large product, bfloat16 on CUDA and float32 elsewhere, and its FLOPs.

    The rate that a model's arithmetic could reach, measured beside it.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return lambda: a @ b, 2.0 * size**3


def _time_cuda(call: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def _time_cpu(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - begin)


def summary(values: list[float]) -> Timing:
    """Of measurements of any unit."""
    ordered, fifth = sorted(values), len(values) // 5
    p20, p80 = ordered[fifth], ordered[-1 - fifth]
    return Timing(statistics.median(ordered), p20, p80)


def machine_name(device: str) -> str:
    """The folder of a machine's measurements."""
    hardware = f"{platform.machine()} {os.cpu_count()} cores"
    if device == "cuda":
        hardware = torch.cuda.get_device_name()
    return re.sub(r"[^a-z0-9]+", "-", hardware.lower()).strip("-")
