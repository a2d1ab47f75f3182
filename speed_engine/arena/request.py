"""What a comparison is asked for: the options of ``speed-engine compare``, as a value."""

from dataclasses import dataclass, replace
from pathlib import Path

import tyro

from speed_engine.config import TrainConfig
from speed_engine.presets import PRESETS
from speed_engine.runtime.checks import UserError

HELD_OUT = 0.3


def _fair(config: TrainConfig) -> TrainConfig:
    """A preset with a part of the data held out, and measured against both parts."""
    return replace(
        config,
        data=config.data if config.data.holds_out else replace(config.data, held_out=HELD_OUT),
        evaluation=replace(config.evaluation, metrics=("fid", "copies", "loss")),
    )


FAIR_PRESETS = {
    name: (text, _fair(config))
    for name, (text, config) in PRESETS.items()
    if config.evaluation.features != "none"
}


@dataclass(frozen=True, kw_only=True)
class CompareCommand:
    """Train methods at equal budget, with several seeds each, and write a report.

    The same command with the same --out continues where it stopped. The report needs the extra
    `plots`.
    """

    preset: tyro.conf.Positional[str]
    """The run to start from, whose configuration the options change: a preset, which `speed-engine
    compare --help` lists at its end, or a file, FILE.toml or FILE.json, which says itself how many
    images it holds out and what is measured."""
    config: TrainConfig
    methods: str = "uniform,speed_paper"
    """Methods to compare, separated by commas: METHOD[@PROCESS][:PREDICTION][+OPTION=VALUE ...],
    such as speed_paper@linear:v+k=3, or a recipe of `speed-engine train --recipe`. `all` is every
    method, `ablation` is SpeeD without each of its parts. The baselines that speed-ups refer to are
    added."""
    seeds: int = 5
    """Number of seeds, from --seed on; every method has one run with each of them."""
    budget_images: int | None = None
    """Number of images that every run trains on. By default the steps times the batch size of the
    preset."""
    budget_seconds: float | None = None
    """Seconds of training that replace the budget of images: short runs measure each method's
    speed first, and every run trains on as many images as its method is expected to reach in
    that time."""
    evaluations: int = 10
    """Number of evaluations in a run, at equal distances in images."""
    learning_rates: tuple[float, ...] = ()
    """Learning rates of which each method uses its best. One run with each rate rules out those
    that are far off, and the others run with every seed. By default all methods use the learning
    rate of the preset."""
    final_solver_steps: tuple[int, ...] = (8, 50)
    """Numbers of model evaluations per image with which the final models are measured, too."""
    slots: int | None = None
    """Number of runs at a time. By default one per GPU, or per CPU core."""
    out: Path | None = None
    """Folder of the comparison. By default comparisons/PRESET."""


def within_budget(command: CompareCommand) -> TrainConfig:
    """The configuration of every run: its length, and where it is measured."""
    config, wanted = command.config, command.budget_images
    steps = config.steps if wanted is None else wanted // config.batch_size
    if steps < command.evaluations or command.seeds < 1 or command.evaluations < 1:
        raise UserError(
            f"{steps} steps of {config.batch_size} images, {command.evaluations} evaluations, "
            f"{command.seeds} seeds: needed are one seed or more, one evaluation or more, and a "
            "step or more for each; raise --budget-images."
        )
    every = steps // command.evaluations
    return replace(
        config,
        steps=every * command.evaluations,  # the last evaluation is that of the final model
        checkpoint_every=every * command.evaluations,
        keep_checkpoints=1,
        evaluation=replace(config.evaluation, every=every),
    )
