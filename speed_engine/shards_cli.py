"""``speed-engine shards COMMAND``: prepare, index and verify data."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console

USAGE = """\
usage: speed-engine shards COMMAND ...

  index FOLDER             make a data set of the tars in a folder, whoever wrote them

Each command explains its options with --help.
"""


@dataclass(frozen=True)
class IndexCommand:
    """Make a data set of the tars in a folder, whoever wrote them; reads each once."""

    folder: tyro.conf.Positional[Path]
    """Holds the tars; their indices and dataset.json are written beside them."""
    workers: int = os.cpu_count() or 1
    """Processes."""
    metadata: Path | None = None
    """JSON file of facts about the whole, such as {"latent_scale": 0.18215}."""


def main(arguments: list[str], console: Console) -> None:
    """Run one command.

    Raises:
        ValueError: an unknown command, a damaged shard, or an unfit argument.
        OSError: a folder cannot be read or written.
    """
    commands: dict[str, Callable[[list[str], Console], None]] = {"index": _index}
    if not arguments or arguments[0] in ("-h", "--help"):
        console.print(USAGE, end="", markup=False, highlight=False)
    elif arguments[0] not in commands:
        raise ValueError(
            f"unknown command 'shards {arguments[0]}'; choose from {', '.join(commands)}."
        )
    else:
        commands[arguments[0]](arguments[1:], console)


def _index(arguments: list[str], console: Console) -> None:
    from speed_engine.data.shards import index_folder

    command = tyro.cli(IndexCommand, args=arguments, prog="speed-engine shards index")
    metadata = json.loads(command.metadata.read_text()) if command.metadata else None
    dataset = index_folder(command.folder, command.workers, metadata)
    samples = sum(shard.samples for shard in dataset.shards)
    console.print(
        f"{samples:,} samples in {len(dataset.shards):,} shards of {command.folder}: "
        f"{json.dumps(dataset.contents)}",
        highlight=False,
        soft_wrap=True,
    )
