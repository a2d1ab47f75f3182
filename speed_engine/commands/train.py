"""``speed-engine train``: train a model, or continue a run."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from speed_engine.commands.configured import configured
from speed_engine.config import TrainConfig
from speed_engine.planning.gpus import GpuName
from speed_engine.presets import PRESETS


@dataclass(frozen=True, kw_only=True)
class TrainCommand:
    """Train a model."""

    preset: tyro.conf.Suppress[str]
    run: Path | None = None
    """Folder of the run, which must not exist yet. The default is runs/PRESET-METHOD-SEED."""
    dry_run: bool = False
    """Train nothing: print what the run would take in memory and arithmetic."""
    gpu: GpuName = "h200"
    """The GPU that --dry-run computes the expected step time for."""
    config: Annotated[TrainConfig, tyro.conf.arg(name="")]


@dataclass(frozen=True)
class ResumeCommand:
    """Continue a run exactly where its newest complete checkpoint stands."""

    resume: Path
    """Folder of the run."""
    steps: int | None = None
    """Optimizer steps of the whole run, to train longer than it was set to."""


def run(arguments: list[str], console: Console) -> None:
    """Train as the arguments say."""
    if any(argument.split("=")[0] == "--resume" for argument in arguments):
        if "--help" in arguments or "-h" in arguments:
            arguments = ["--help"]
        command = tyro.cli(ResumeCommand, args=arguments, prog="speed-engine train")
        from speed_engine import run as runs

        runs.resume(command.resume, console, command.steps)
        return
    presets = {
        name: (text, TrainCommand(preset=name, config=config))
        for name, (text, config) in PRESETS.items()
    }
    command = configured(presets, arguments, "speed-engine train")
    config = command.config
    if command.dry_run:
        from speed_engine.planning import cost

        for name, text in cost.describe(config, command.gpu).items():
            console.print(f"{name:12}{text}", highlight=False, markup=False, soft_wrap=True)
        return
    from speed_engine import run as runs

    method = config.method.replace("+", "-")
    folder = command.run or Path("runs") / f"{command.preset}-{method}-{config.seed}"
    runs.start(config, folder, console)
