"""The command line of comparisons."""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from speed_engine.commands.configured import configured
from speed_engine.config import TrainConfig
from speed_engine.presets import PRESETS
from speed_engine.runtime.checks import UserError

HELD_OUT = 0.3


@dataclass(frozen=True, kw_only=True)
class CompareCommand:
    """Train contestants at equal budget, with several seeds each, and write a report.

    Called again with the same --out, it goes on where it stopped.
    """

    preset: tyro.conf.Suppress[str]
    config: Annotated[TrainConfig, tyro.conf.arg(name="")]
    methods: str = "uniform,speed_paper"
    """Contestants, separated by commas: METHOD[@PROCESS][:PREDICTION][+OPTION=VALUE ...], such as
    speed_paper@linear:v+k=3; `all` is every method, `ablation` the parts of SpeeD one by one.
    The baselines that speed-ups are given against join by themselves."""
    seeds: int = 5
    """Seeds that count, from --seed on; each is one run of every contestant."""
    budget_images: int | None = None
    """Images that every run trains on; default steps times batch-size of the preset."""
    budget_seconds: float | None = None
    """Seconds of training in place of images: every run trains on as many as it is expected to in
    that time, which short runs measure beforehand."""
    evaluations: int = 10
    """Measurements in a run, at equal numbers of images."""
    learning_rates: tuple[float, ...] = ()
    """Grid; each contestant takes its best. One run of each rules out those that are far off, the
    others run with every seed. Default: the preset's own, for all."""
    final_solver_steps: tuple[int, ...] = (8, 50)
    """Also measure the final models with so many evaluations of the model per image."""
    slots: int | None = None
    """Runs at a time; default one per GPU, or per CPU core."""
    out: Path | None = None
    """Folder of the comparison; default comparisons/PRESET."""


def run(arguments: list[str], console: Console) -> None:
    """``speed-engine compare``."""
    presets = {
        name: (text, CompareCommand(preset=name, config=_fair(config)))
        for name, (text, config) in PRESETS.items()
        if config.evaluation.features != "none"
    }
    command = configured(presets, arguments, "speed-engine compare")
    from speed_engine.arena.compare import Comparison, Plan
    from speed_engine.arena.report import write_report

    plan = Plan(
        config=_within_budget(command),
        contestants=tuple(name.strip() for name in command.methods.split(",") if name.strip()),
        seeds=command.seeds,
        learning_rates=command.learning_rates,
        solver_steps=command.final_solver_steps,
        budget_seconds=command.budget_seconds,
    )
    out = command.out or Path("comparisons") / command.preset
    slots, threads = _slots(command)
    Comparison(plan, out, slots, threads, console).run()
    console.print(f"report    {write_report(out)}", highlight=False, soft_wrap=True)


def _fair(config: TrainConfig) -> TrainConfig:
    """A preset with a part of the data held out, and measured against both parts."""
    return replace(
        config,
        data=replace(config.data, held_out=HELD_OUT),
        evaluation=replace(config.evaluation, metrics=("fid", "copies")),
    )


def _within_budget(command: CompareCommand) -> TrainConfig:
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


def _slots(command: CompareCommand) -> tuple[int, int]:
    """(runs at a time, CPU threads of each)."""
    import torch

    cores = len(os.sched_getaffinity(0))
    gpus = torch.cuda.device_count() if command.config.device != "cpu" else 0
    slots = command.slots or gpus or cores
    if slots < 1 or (gpus and slots > gpus):
        raise UserError(f"slots={slots}: needed is at least 1, and at most the {gpus} GPUs here.")
    return slots, max(1, cores // slots)
