"""How many steps each contestant makes in a given time, measured beforehand.

The length of a run must be known when it begins: curricula and decays follow it.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from speed_engine.arena.planned import Run, failure, is_complete
from speed_engine.config import TrainConfig
from speed_engine.runtime.checks import UserError
from speed_engine.runtime.records import read_records

STEPS, INTERVAL = 60, 20  # the first interval warms up and is left out


def in_time(
    configs: Mapping[str, TrainConfig],
    seconds: float,
    folders: Mapping[str, Path],
    run_all: Callable[[Sequence[Run]], None],
) -> dict[str, TrainConfig]:
    """The configurations with as many steps as they make in the time, whole evaluations.

    Args:
        configs: of the contestants.
        seconds: of training, per run.
        folders: of the short runs that are timed.
        run_all: completes runs, as many at a time as will be in the comparison.

    Raises:
        UserError: a run failed, or the time is too short for one evaluation.
    """
    runs = {
        name: Run(config=_short(config), folder=folders[name]) for name, config in configs.items()
    }
    run_all(list(runs.values()))
    for name, run in runs.items():
        if not is_complete(run):
            raise UserError(f"the pace of {name} could not be measured: {failure(run)}.")
    return {
        name: _lasting(name, config, seconds, seconds_per_step(runs[name].folder))
        for name, config in configs.items()
    }


def seconds_per_step(run: Path) -> float:
    """Median over the intervals of a short run."""
    records = [record for record in read_records(run) if "loss" in record]
    paces = [
        (after["seconds"] - before["seconds"]) / (after["step"] - before["step"])
        for before, after in zip(records, records[1:], strict=False)
    ]
    return sorted(paces)[len(paces) // 2]


def _short(config: TrainConfig) -> TrainConfig:
    """The same steps, fewer, with hardly an evaluation."""
    evaluation = replace(config.evaluation, every=STEPS, num_images=1, features="none")
    return replace(
        config, steps=STEPS, log_every=INTERVAL, checkpoint_every=STEPS, evaluation=evaluation
    )


def _lasting(name: str, config: TrainConfig, seconds: float, pace: float) -> TrainConfig:
    every = config.evaluation.every
    steps = math.floor(seconds / pace / every) * every
    if steps == 0:
        raise UserError(
            f"{name} makes {seconds / pace:.0f} steps in {seconds:g} seconds, and is evaluated "
            f"every {every} steps only; raise --budget-seconds or --evaluations."
        )
    return replace(config, steps=steps, checkpoint_every=steps)
