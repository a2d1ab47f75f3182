"""The command line of comparisons."""

from rich.console import Console

from speed_engine.arena.request import FAIR_PRESETS, CompareCommand
from speed_engine.commands.configured import configured


def run(arguments: list[str], console: Console) -> None:
    """``speed-engine compare``."""
    command = configured(
        lambda name, config: CompareCommand(preset=name, config=config),
        arguments,
        "speed-engine compare",
        first=("data.source",),
        presets=FAIR_PRESETS,
    )
    from speed_engine.arena.compare import compare

    compare(command, console)
