"""``speed-engine plan``: what a run would take on many GPUs; nothing is trained."""

from dataclasses import dataclass

import tyro
from rich.console import Console

from speed_engine.arena.recipes import RecipeName
from speed_engine.commands.configured import configured
from speed_engine.config import TrainConfig
from speed_engine.planning.gpus import GpuName


@dataclass(frozen=True, kw_only=True)
class PlanCommand:
    """Print what a run would take on many GPUs; nothing is trained."""

    preset: tyro.conf.Positional[str]
    """The run to start from, whose configuration the options change: a preset, which `speed-engine
    plan --help` lists at its end, or a file, FILE.toml or FILE.json."""
    recipe: RecipeName | None = None
    """Sets the process, the method, what the model predicts, the optimizer and the schedule of its
    learning rate, in place of the preset's or the file's; other options change what it sets."""
    gpus: int = 8
    """Number of GPUs on all nodes together."""
    gpu: GpuName = "h200"
    """Model of the GPUs."""
    per_node: int = 8
    """Number of GPUs in one node."""
    efficiency: float = 0.45
    """Share of a GPU's peak rate that the run is expected to reach, in (0, 1]; measure it on one
    GPU first."""
    config: TrainConfig


def run(arguments: list[str], console: Console) -> None:
    """Print the plan."""
    from speed_engine.planning import cluster

    command = configured(
        lambda name, config: PlanCommand(preset=name, config=config),
        arguments,
        "speed-engine plan",
        first=("recipe", "data.source", "batch_size"),
    )
    lines = cluster.describe(
        command.config, command.gpus, command.gpu, command.per_node, command.efficiency
    )
    for name, text in lines.items():
        console.print(f"{name:10}{text}", highlight=False, markup=False, soft_wrap=True)
