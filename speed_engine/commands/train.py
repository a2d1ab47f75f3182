"""``speed-engine train``: train a model, or continue a run."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import tyro
from rich.console import Console

from speed_engine.arena.recipes import RecipeName, values_of
from speed_engine.commands import config_file
from speed_engine.commands.configured import GROUPS, configured
from speed_engine.commands.options import read_options
from speed_engine.config import TrainConfig
from speed_engine.planning.gpus import GpuName
from speed_engine.runtime.checks import UserError


@dataclass(frozen=True, kw_only=True)
class TrainCommand:
    """Train a model; `speed-engine train --resume RUN` continues a run."""

    preset: tyro.conf.Positional[str]
    """The run to start from, whose configuration the options change: a preset, which `speed-engine
    train --help` lists at its end, or a file, FILE.toml or FILE.json, such as the config.json of a
    run."""
    recipe: RecipeName | None = None
    """Sets the process, the method, what the model predicts, the optimizer and the schedule of its
    learning rate, in place of the preset's or the file's; other options change what it sets."""
    run: Path | None = None
    """Folder of the run; it must not exist yet. By default runs/PRESET-METHOD-SEED, or
    runs/PRESET-RECIPE-SEED with --recipe."""
    save_config: Path | None = None
    """Write the whole configuration to this file, FILE.toml or FILE.json, and train nothing."""
    dry_run: bool = False
    """Print the memory and the arithmetic that the run would take, and train nothing."""
    gpu: GpuName = "h200"
    """GPU for which --dry-run computes the expected time of a step."""
    config: TrainConfig


@dataclass(frozen=True, kw_only=True)
class ResumeCommand:
    """Continue a run exactly where its newest complete checkpoint stands.

    Options change what may change: steps, evaluation, records, checkpoints, machine, workers, the
    place of the data, learning rate and clipping. The run folder records the change.
    """

    resume: Path = Path("RUN")
    """Folder of the run."""
    config: TrainConfig = field(default_factory=TrainConfig)


def run(arguments: list[str], console: Console) -> None:
    """Train as the arguments say."""
    if any(argument.split("=")[0] == "--resume" for argument in arguments):
        _resume(arguments, console)
        return
    command = configured(
        lambda name, config: TrainCommand(preset=name, config=config),
        arguments,
        "speed-engine train",
        first=("recipe", "method", "data.source", "steps", "batch_size"),
    )
    config = command.config
    if command.save_config is not None:
        config_file.write(config, command.save_config)
        console.print(
            f"written   {command.save_config}", highlight=False, markup=False, soft_wrap=True
        )
        return
    if command.dry_run:
        from speed_engine.planning import cost

        for name, text in cost.describe(config, command.gpu).items():
            console.print(f"{name:12}{text}", highlight=False, markup=False, soft_wrap=True)
        return
    from speed_engine.run import starting

    place = run_folder(command.preset, config, command.recipe)
    starting.start(config, command.run.expanduser() if command.run else place, console)


def run_folder(name: str, config: TrainConfig, recipe: RecipeName | None = None) -> Path:
    """Where a run of a preset, or of a file of that name, is by default.

    A recipe that is asked for takes the place of its method, which other recipes have, too.
    """
    method = config.method
    if recipe is not None:
        method = recipe if method == values_of(recipe)["method"] else f"{recipe}-{method}"
    return Path("runs") / f"{name}-{method.replace('+', '-')}-{config.seed}"


def _resume(arguments: Sequence[str], console: Console) -> None:
    folder = _resumed(arguments)
    if folder is None and not {"-h", "--help"} & {*arguments}:
        raise UserError("a folder is missing: speed-engine train --resume RUN [options].")
    # Not at the top: it needs torch, which the other helps do without.
    from speed_engine.run import starting
    from speed_engine.run.folder import read_config

    command = ResumeCommand()
    if folder is not None:
        command = ResumeCommand(resume=folder, config=read_config(folder))
    command = read_options(
        command,
        arguments if folder else ["--help"],
        "speed-engine train",
        first=("resume", "steps"),
        groups=GROUPS,
    )
    starting.resume(command.resume.expanduser(), console, changed=command.config)


def _resumed(arguments: Sequence[str]) -> Path | None:
    """The folder that follows ``--resume``; None if an option or nothing does."""
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        name, _, value = argument.partition("=")
        if name == "--resume":
            value = value or following
            return Path(value).expanduser() if value and not value.startswith("-") else None
    return None
