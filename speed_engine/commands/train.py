"""``speed-engine train``: train a model, or continue a run."""

from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console

from speed_engine.commands import config_file
from speed_engine.commands.configured import configured
from speed_engine.commands.options import read_options
from speed_engine.config import TrainConfig
from speed_engine.planning.gpus import GpuName


@dataclass(frozen=True, kw_only=True)
class TrainCommand:
    """Train a model; `speed-engine train --resume RUN` continues a run."""

    preset: tyro.conf.Positional[str]
    """The run to start from, whose configuration the options change: a preset, which `speed-engine
    train --help` lists at its end, or a file, FILE.toml or FILE.json, such as the config.json of a
    run."""
    run: Path | None = None
    """Folder of the run; it must not exist yet. By default runs/PRESET-METHOD-SEED."""
    save_config: Path | None = None
    """Write the whole configuration to this file, FILE.toml or FILE.json, and train nothing."""
    dry_run: bool = False
    """Print the memory and the arithmetic that the run would take, and train nothing."""
    gpu: GpuName = "h200"
    """GPU for which --dry-run computes the expected time of a step."""
    config: TrainConfig


@dataclass(frozen=True)
class ResumeCommand:
    """Continue a run exactly where its newest complete checkpoint stands."""

    resume: Path
    """Folder of the run."""
    steps: int | None = None
    """Number of optimizer steps of the whole run, to train longer than the run was set to. By
    default the number stays as it was."""


def run(arguments: list[str], console: Console) -> None:
    """Train as the arguments say."""
    if any(argument.split("=")[0] == "--resume" for argument in arguments):
        if "--help" in arguments or "-h" in arguments:
            arguments = ["--help"]
        command = read_options(ResumeCommand, arguments, "speed-engine train")
        from speed_engine import run as runs

        runs.resume(command.resume, console, command.steps)
        return
    command = configured(
        lambda name, config: TrainCommand(preset=name, config=config),
        arguments,
        "speed-engine train",
        first=("method", "data.source", "steps", "batch_size"),
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
    from speed_engine import run as runs

    runs.start(config, command.run or run_folder(command.preset, config), console)


def run_folder(name: str, config: TrainConfig) -> Path:
    """Where a run of a preset, or of a file of that name, is by default."""
    return Path("runs") / f"{name}-{config.method.replace('+', '-')}-{config.seed}"
