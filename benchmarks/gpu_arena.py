"""A comparison of methods on CIFAR-10 at 16 x 16 pixels, by ``speed-engine compare`` on one GPU.

The network, the learning rate and the contestants are those of ``docs/results/cifar16``, which CPU
cores made with 102,400 images a run: here a step has four times as many images, and a run as many
as the time allows. The shards lie in ``shards/cifar16`` and ``shards/cifar16-test``, where the
preset looks for them; ``docs/data.md`` says how they are made.

    pace         a short comparison, as many runs at a time as in the long one: it says what a step
                 takes, and leaves compiled code in the caches
    comparison   three seeds of all contestants, in ``comparisons/cifar16-gpu``

The host holds up the steps of so small a model, hence several runs share the GPU. The runs of the
first seed come first. A comparison that does not end in time is interrupted, and reports the runs
that are complete; its command, which the row holds, continues it.
"""

import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from gpu_rows import Rows
from speed_engine.arena.rehearsal import seconds_per_step

OUT = Path("comparisons/cifar16-gpu")
METHODS = (
    "uniform@linear:epsilon", "speed_paper@linear:epsilon", "flow", "flow_muon",
    "flow+seed_offset=100", "uniform@flow:velocity",
)  # fmt: skip
FILLERS = ("flow+seed_offset=200", "flow+seed_offset=300", "flow+seed_offset=400")
SEEDS, SLOTS, BATCH, EVALUATIONS = 3, len(METHODS) + len(FILLERS), 512, 10
ROUNDS = SEEDS * len(METHODS) // SLOTS
PACE_STEPS = 1_000  # enough that runs which begin at different times mostly overlap
MARGIN = 1.15  # times the pace that was measured
STOPPING = 30  # seconds in which an interrupted comparison stops its runs and writes its report
OPTIONS = (
    "--batch-size", str(BATCH), "--optimizer.learning-rate", "0.016",
    "--evaluation.metrics", "fid", "loss", "--final-solver-steps", "50", "--slots", str(SLOTS),
)  # fmt: skip


def measure(rows: Rows) -> None:
    """Both rows; what is there already would be passed over, and the pace be wrong."""
    if OUT.exists():
        raise SystemExit(f"{OUT} is there already; remove it, or continue what it holds.")
    rows.row("pace", 90, partial(pace, OUT / "pace", rows))
    rows.row("comparison", 90, partial(comparison, OUT, rows))


def pace(out: Path, rows: Rows, options: Sequence[str] = ("--compile", "graphs")) -> dict[str, Any]:
    """What a step takes while all slots are busy, and what a round of runs takes beside steps."""
    begin = time.monotonic()
    contestants = [*METHODS, *FILLERS]
    found = compared(command(out, contestants, 1, PACE_STEPS, 1, options), rows)
    steps = seconds_of_steps(out)
    if not steps:
        raise TimeoutError(f"no run came far enough to have a pace: {found['printed'][-400:]}")
    slowest = max(steps.values())
    beside = time.monotonic() - begin - PACE_STEPS * slowest
    return found | {"step_ms": _in_ms(out), "beside_steps": round(beside, 1)}


def comparison(
    out: Path, rows: Rows, options: Sequence[str] = ("--compile", "graphs")
) -> dict[str, Any]:
    """As many images as fit into the time that is left, by the paces measured before."""
    measured = rows.figures["rows"]["pace"]
    if "beside_steps" not in measured:
        raise RuntimeError("the pace was not measured")
    slowest = max(measured["step_ms"].values()) / 1e3
    steps = steps_that_fit(rows.left() - STOPPING, slowest, measured["beside_steps"])
    found = compared(command(out, METHODS, SEEDS, steps, EVALUATIONS, options), rows)
    return found | {"steps": steps, "images": steps * BATCH, "step_ms": _in_ms(out)}


def steps_that_fit(seconds: float, seconds_per_step: float, beside: float) -> int:
    """The steps of a run, a multiple of the evaluations.

    Args:
        seconds: in which all rounds of runs are to end.
        seconds_per_step: of the slowest contestant.
        beside: seconds of a round that are not spent on steps.

    Raises:
        TimeoutError: there is no time for an evaluation.
    """
    fit = (seconds / ROUNDS - beside) / (MARGIN * seconds_per_step)
    steps = int(fit // EVALUATIONS) * EVALUATIONS
    if steps <= 0:
        raise TimeoutError(
            f"{ROUNDS} rounds of runs take {ROUNDS * beside:.0f} s beside their steps, and "
            f"{seconds:.0f} s are left"
        )
    return steps


def seconds_of_steps(out: Path) -> dict[str, float]:
    """Of every run of a comparison that came far enough, by its folder."""
    found = {}
    for records in sorted((out / "runs").glob("*/*/*/metrics.jsonl")):
        run = records.parent
        if records.read_text().count('"loss"') > 1:
            found[str(run.relative_to(out / "runs"))] = seconds_per_step(run)
    return found


def command(
    out: Path,
    methods: Sequence[str],
    seeds: int,
    steps: int,
    evaluations: int,
    options: Sequence[str],
) -> list[str]:
    """What is run."""
    numbers = {"seeds": seeds, "budget-images": steps * BATCH, "evaluations": evaluations}
    wanted = [text for name, value in numbers.items() for text in (f"--{name}", str(value))]
    begin = [sys.executable, "-m", "speed_engine", "compare", "cifar16"]
    return [*begin, *OPTIONS, *wanted, "--methods", ",".join(methods), "--out", str(out), *options]


def compared(command: Sequence[str], rows: Rows) -> dict[str, Any]:
    """What a comparison printed; it is interrupted where the section's time ends."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # not ignored, as in the background
    begin = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    interrupted = False
    try:
        printed, _ = process.communicate(timeout=max(rows.left() - STOPPING, 1))
    except subprocess.TimeoutExpired:
        interrupted = True
        process.send_signal(signal.SIGINT)
        try:
            printed, _ = process.communicate(timeout=max(rows.left() - 1, 1))
        except subprocess.TimeoutExpired:
            printed = "It did not end after an interrupt."
    finally:
        process.kill()  # its runs stop with it
    if process.returncode and not interrupted:
        raise RuntimeError(printed[-3000:])
    return {
        "command": shlex.join(command),
        "interrupted": interrupted,
        "wall_seconds": round(time.monotonic() - begin, 1),
        "printed": printed[-4000:],
    }


def _in_ms(out: Path) -> dict[str, float]:
    return {run: round(1e3 * seconds, 2) for run, seconds in seconds_of_steps(out).items()}
