"""``speed-engine shards COMMAND``: prepare, index and verify data."""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console

USAGE = """\
usage: speed-engine shards COMMAND ...

  index FOLDER             make a data set of the tars in a folder, whoever wrote them
  check FOLDER             read everything once; list what is damaged, unlike the rest, or twice

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


@dataclass(frozen=True)
class CheckCommand:
    """Read everything once; exits with status 1 if something is wrong."""

    folder: tyro.conf.Positional[Path]
    """Holds the tars."""
    members: tuple[str, ...] = ()
    """Extensions that every sample must have; by default those that most have."""
    workers: int = os.cpu_count() or 1
    """Processes."""
    out: Path | None = None
    """Repair list to write if something is wrong, for data.exclude; default FOLDER/repair.json."""


def main(arguments: list[str], console: Console) -> None:
    """Run one command.

    Raises:
        ValueError: an unknown command, a damaged shard, or an unfit argument.
        OSError: a folder cannot be read or written.
    """
    commands: dict[str, Callable[[list[str], Console], None]] = {
        "index": _index,
        "check": _check,
    }
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


def _check(arguments: list[str], console: Console) -> None:
    from speed_engine.data.check import check_folder

    command = tyro.cli(CheckCommand, args=arguments, prog="speed-engine shards check")
    found = check_folder(command.folder, command.members, command.workers)
    lines = [f"{name}: {reason}" for name, reason in found.repair.shards.items()]
    lines += [f"{name}: {note}" for name, note in found.notes.items()]
    lines += [
        f"{name}: sample {key!r}: {reason}"
        for name, samples in found.repair.samples.items()
        for key, reason in samples.items()
    ]
    for line in [*lines[:50], *([f"and {len(lines) - 50:,} more"] if len(lines) > 50 else [])]:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    bad = sum(map(len, found.repair.samples.values()))
    console.print(
        f"{found.num_samples:,} samples read: {len(found.repair.shards):,} shards unreadable, "
        f"{bad:,} samples damaged, unlike the rest or twice",
        highlight=False,
        soft_wrap=True,
    )
    if found.repair:
        out = command.out or command.folder / "repair.json"
        found.repair.save(out)
        console.print(f"repair list: {out}", highlight=False, soft_wrap=True)
    if lines:
        sys.exit(1)
