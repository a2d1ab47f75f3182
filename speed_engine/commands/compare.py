"""The command line of comparisons."""

import shlex
import sys

from rich.console import Console

from speed_engine.arena.request import (
    FAIR_PRESETS,
    CompareCommand,
    refuse_what_has_no_effect,
)
from speed_engine.commands.configured import configured


def run(arguments: list[str], console: Console) -> None:
    """``speed-engine compare``."""
    command = configured(
        lambda name, config: CompareCommand(preset=name, config=config),
        arguments,
        "speed-engine compare",
        first=("data.source",),
        presets=FAIR_PRESETS,
        check=refuse_what_has_no_effect,
    )
    from speed_engine.arena.compare import compare

    compare(command, console, shlex.join(["speed-engine", *sys.argv[1:]]))
