"""Short runs of the contestants, before those that count.

They leave compiled code in the caches: else whoever trains first would pay for what all others find
there, in seconds of training. And they show how many steps each makes in a given time, which must
be known when a run begins, as curricula and decays follow its length.
"""

import math
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from speed_engine.arena.planned import Run, failure, is_complete
from speed_engine.config import TrainConfig
from speed_engine.run.starting import images_that_fit, machine_choices
from speed_engine.runtime.checks import UserError
from speed_engine.runtime.records import read_records

STEPS, INTERVAL = 80, 20  # the first interval warms up and is left out


def compiled_as_chosen(config: TrainConfig) -> TrainConfig:
    """With what the machine makes of ``compile=auto``, which a run of fewer steps may not get."""
    choices = machine_choices(config)
    chosen = choices.compile.value
    in_parts = chosen == "graphs" and images_that_fit(config, choices, resident=0) is not None
    return replace(config, compile="blocks" if in_parts else chosen)


def rehearsal(config: TrainConfig, folder: Path) -> Run:
    """The same steps, fewer, with hardly an evaluation; what is left of one that was interrupted is
    removed, since the break would be in its pace.
    """
    evaluation = replace(
        config.evaluation, every=STEPS, num_images=1, features="none", reference=None,
        metrics=("fid",),
    )  # fmt: skip
    run = Run(
        config=replace(
            config, steps=STEPS, log_every=INTERVAL, checkpoint_every=STEPS, evaluation=evaluation
        ),
        folder=folder,
    )
    if not is_complete(run):
        shutil.rmtree(folder, ignore_errors=True)
    return run


def in_time(
    configs: Mapping[str, TrainConfig], rehearsals: Mapping[str, Run], seconds: float
) -> dict[str, TrainConfig]:
    """The configurations with as many steps as they make in the time, in as many evaluations.

    Args:
        configs: of the contestants.
        rehearsals: of the same, which have ended.
        seconds: of training, per run.

    Raises:
        UserError: a rehearsal failed, or the time is too short for one evaluation.
    """
    for name, run in rehearsals.items():
        if not is_complete(run):
            raise UserError(f"the pace of {name} could not be measured: {failure(run)}.")
    return {
        name: _lasting(name, config, seconds, seconds_per_step(rehearsals[name].folder))
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


def _lasting(name: str, config: TrainConfig, seconds: float, pace: float) -> TrainConfig:
    evaluations = config.steps // config.evaluation.every
    fit = math.floor(seconds / pace)
    every = fit // evaluations
    if every == 0:
        raise UserError(
            f"{name} makes {fit:,} steps in {seconds:g} seconds, and is to be "
            f"evaluated {evaluations} times; raise --budget-seconds or lower --evaluations."
        )
    steps = every * evaluations
    evaluation = replace(config.evaluation, every=every)
    return replace(config, steps=steps, checkpoint_every=steps, evaluation=evaluation)
