"""What a comparison is asked for: the options of ``speed-engine compare``, as a value."""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import tyro

from speed_engine.config import TrainConfig, flat
from speed_engine.presets import PRESETS
from speed_engine.runtime.checks import MOST, MOST_TIMESTEPS, UserError, check, check_whole

HELD_OUT = 0.3
MOST_SEEDS = 10_000
# Options of a run that a comparison decides itself: what to use in their place.
REPLACED = {
    "method": "--methods names what is compared",
    "evaluation.every": "--evaluations places them",
    "checkpoint_every": "each run has a checkpoint at its end",
    "keep_checkpoints": "each run has a checkpoint at its end",
}


def _fair(config: TrainConfig) -> TrainConfig:
    """A preset with a part of the data held out, and measured against both parts."""
    return replace(
        config,
        data=config.data if config.data.holds_out else replace(config.data, held_out=HELD_OUT),
        evaluation=replace(config.evaluation, metrics=("fid", "copies", "class_agreement", "loss")),
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
    methods: str | None = None
    """Methods to compare, separated by commas: METHOD[@PROCESS][:PREDICTION][+OPTION=VALUE ...],
    such as speed_paper@linear:v+k=3, or a recipe of `speed-engine train --recipe`. `all` is every
    method, `ablation` is SpeeD without each of its parts. By default uniform and the method of the
    preset or the file. The baselines that speed-ups refer to are added."""
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
    """Number of runs at a time. By default one per GPU, or per CPU core. More runs than GPUs share
    them, which pays for small models, whose steps wait for the host; seconds of training are then
    those of a shared GPU."""
    out: Path | None = None
    """Folder of the comparison. By default comparisons/PRESET."""

    def __post_init__(self) -> None:
        some = bool(self.contestants)
        check("methods", self.methods, some, "name one or more, separated by commas")
        check_whole("seeds", self.seeds, 1, MOST_SEEDS)
        check_whole("evaluations", self.evaluations, 1, MOST)
        if self.budget_images is not None:
            check_whole("budget_images", self.budget_images, 1, MOST)
        if self.budget_seconds is not None:
            limits = 0 < self.budget_seconds <= MOST
            check("budget_seconds", self.budget_seconds, limits, "must be positive, at most 10^12")
        for rate in self.learning_rates:
            check("learning_rates", rate, 0 < rate < math.inf, "must be positive and finite")
        for steps in self.final_solver_steps:
            check_whole("final_solver_steps", steps, 1, MOST_TIMESTEPS)
        if self.slots is not None:
            check_whole("slots", self.slots, 1, MOST_SEEDS)

    @property
    def contestants(self) -> tuple[str, ...]:
        """The names of what is compared, in order; the baselines that are added are not in it."""
        if self.methods is None:
            return tuple(dict.fromkeys(("uniform", self.config.method)))
        return tuple(name.strip() for name in self.methods.split(",") if name.strip())


def refuse_what_has_no_effect(config: TrainConfig, base: TrainConfig) -> None:
    """Options of a run in whose place a comparison has its own.

    Args:
        config: with the options.
        base: without: of the preset or the file.
    """
    given, before = flat(config), flat(base)
    for name, instead in REPLACED.items():
        same = given[name] == before[name]
        check(name, given[name], same, f"has no effect in a comparison; {instead}")


def within_budget(command: CompareCommand) -> TrainConfig:
    """The configuration of every run: its length, and where it is measured.

    Raises:
        UserError: nothing that decides is measured, or the budget is too small.
    """
    config, wanted = command.config, command.budget_images
    evaluation = config.evaluation
    check(
        "evaluation.metrics",
        " ".join(evaluation.metrics),
        "fid" in evaluation.metrics and evaluation.features != "none",
        "a comparison decides by fid, which needs evaluation.features",
    )
    most = config.num_timesteps
    for number in command.final_solver_steps:
        few = number <= most
        check("final_solver_steps", number, few, f"must be at most num_timesteps={most}")
    steps = config.steps if wanted is None else wanted // config.batch_size
    if steps < command.evaluations:
        raise UserError(
            f"{steps} steps of {config.batch_size} images are fewer than the {command.evaluations} "
            "evaluations; raise --budget-images, or lower --evaluations or --batch-size."
        )
    every = steps // command.evaluations
    return replace(
        config,
        steps=every * command.evaluations,  # the last evaluation is that of the final model
        checkpoint_every=every * command.evaluations,
        keep_checkpoints=1,
        evaluation=replace(config.evaluation, every=every),
    )
