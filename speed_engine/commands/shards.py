"""``speed-engine shards COMMAND``: prepare, index and verify data."""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import tyro
from rich.console import Console

from speed_engine.commands.dispatch import known, usage


@dataclass(frozen=True)
class MakeCommand:
    """Write a collection of pictures as shards; killed and run again, it continues."""

    source: tyro.conf.Positional[str]
    """A collection of pictures: digits, a folder, ...; `speed-engine shards --help` lists the
    kinds."""
    out: tyro.conf.Positional[Path]
    """Folder to write; new, empty, or left by the same command."""
    images: Path | None = None
    """Folder of the pictures of captions_*.json."""
    split: str = "train"
    """Of CIFAR-10 (train, test) and of Hugging Face data sets."""
    size: int | None = None
    """Crop the central square and resize it to so many pixels, as ADM does; default: as it is."""
    channels: int | None = None
    """1 or 3; by default 1 for the digits and 3 for all others."""
    format: Literal["png", "jpg", "webp", "npy"] = "png"
    """How pictures are stored."""
    quality: int = 95
    """Of jpg and webp, 1 to 100."""
    low_size: int | None = None
    """Store each picture a second time with so many pixels a side, for super-resolution."""
    samples_per_shard: int = 1000
    """The last shard may hold fewer."""
    workers: int = os.cpu_count() or 1
    """Processes."""
    skip_bad: bool = False
    """Leave unusable pictures out, each with a warning; default: stop at the first."""


@dataclass(frozen=True)
class EncodeCommand:
    """Replace pictures by latents and add text tokens; killed and run again, it continues."""

    shards: tyro.conf.Positional[Path]
    """Folder of the data set to encode."""
    out: tyro.conf.Positional[Path]
    """Folder to write; new, empty, or left by the same command."""
    vae: str | None = None
    """A diffusers AutoencoderKL, its folder or name on the hub (stabilityai/sd-vae-ft-ema)."""
    text_encoder: str | None = None
    """A CLIP text model, its folder or name on the hub (openai/clip-vit-large-patch14)."""
    batch_size: int = 32
    """Samples at a time."""


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


def run(arguments: list[str], console: Console) -> None:
    """Run one of the commands.

    Raises:
        UserError: an unknown command, a damaged shard, or an argument that does not fit.
        OSError: a folder cannot be read or written.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        from speed_engine.data.preparing.catalogue import SOURCES, shown

        print(usage("speed-engine shards", USES), end="")
        print("\nEach command explains its options with --help. SOURCE is one of:\n")
        print("".join(f"  {shown(name):25}{kind.text}\n" for name, kind in SOURCES.items()), end="")
        return
    name = known(arguments[0], USES, "command of shards")
    try:
        COMMANDS[name](arguments[1:], console)
    except KeyboardInterrupt:
        raise InterruptedError("interrupted; run the same command again to continue.") from None


def _make(arguments: list[str], console: Console) -> None:
    from speed_engine.data.preparing.catalogue import open_source
    from speed_engine.data.preparing.pictures import EXTENSIONS
    from speed_engine.data.preparing.prepare import PictureOptions, make
    from speed_engine.data.preparing.summary import summarise
    from speed_engine.runtime.progress import SampleProgress

    command = tyro.cli(MakeCommand, args=arguments, prog="speed-engine shards make")
    options = PictureOptions(
        size=command.size,
        channels=3 if command.channels is None else command.channels,
        format=command.format,
        quality=command.quality,
        low_size=command.low_size,
        samples_per_shard=command.samples_per_shard,
    )
    source = open_source(command.source, command.images, command.split)
    if command.channels is None:
        options = replace(options, channels=source.channels)
    with SampleProgress(console, len(source)) as progress:
        make(
            source,
            command.out,
            options,
            workers=command.workers,
            skip_bad=command.skip_bad,
            advance=progress.advance,
        )
    summary = summarise(command.out)
    _say(console, *summary.lines())
    if source.left_out:
        counted = sorted(source.left_out.items(), key=lambda of: -of[1])
        shown = [f"{count:,} {kind}" for kind, count in counted[:12]]
        if rest := sum(count for _, count in counted[12:]):
            shown.append(f"{rest:,} of {len(counted) - 12:,} other kinds")
        _say(console, f"left out: {', '.join(shown)}; taken are {', '.join(EXTENSIONS)}")
    if left_out := len(source) - summary.num_samples:
        what = "unusable picture was" if left_out == 1 else "unusable pictures were"
        _say(console, f"{left_out:,} {what} left out, each named above")
    _say(console, f"contact sheet: {summary.draw_contact_sheet()}")


def _encode(arguments: list[str], console: Console) -> None:
    command = tyro.cli(EncodeCommand, args=arguments, prog="speed-engine shards encode")

    import torch

    from speed_engine.data.format.folder import LocalFolder
    from speed_engine.data.format.record import RECORD
    from speed_engine.data.preparing.encode import LatentEncoder, encode
    from speed_engine.data.preparing.summary import summarise
    from speed_engine.encoders.text import TextEncoder
    from speed_engine.runtime.progress import SampleProgress

    dataset, _ = LocalFolder(command.shards).load(())
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    gpu = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    device = torch.device(gpu if torch.cuda.is_available() else "cpu")
    share = sum(shard.samples for shard in dataset.shards[rank::world_size])
    with SampleProgress(Console(quiet=rank > 0), share) as progress:
        encode(
            command.shards,
            command.out,
            LatentEncoder(command.vae, device) if command.vae else None,
            TextEncoder(command.text_encoder, device) if command.text_encoder else None,
            batch_size=command.batch_size,
            rank=rank,
            world_size=world_size,
            advance=progress.advance,
        )
    if (command.out / RECORD).exists():
        _say(console, *summarise(command.out).lines())
    else:
        _say(console, f"rank {rank} of {world_size} is done, others are not yet")


def _say(console: Console, *lines: str) -> None:
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _index(arguments: list[str], console: Console) -> None:
    from speed_engine.data.format import document
    from speed_engine.data.format.record import checked_metadata
    from speed_engine.data.format.writer import index_folder

    command = tyro.cli(IndexCommand, args=arguments, prog="speed-engine shards index")
    metadata = None
    if command.metadata is not None:
        name, remedy = str(command.metadata), 'needed: an object such as {"latent_scale": 0.18215}.'
        content = document.read_file(command.metadata)
        metadata = checked_metadata(document.parse(content, name, remedy), name)
    dataset = index_folder(command.folder, command.workers, metadata)
    samples = sum(shard.samples for shard in dataset.shards)
    console.print(
        f"{samples:,} samples in {len(dataset.shards):,} shards of {command.folder}: "
        f"{json.dumps(dataset.contents)}",
        highlight=False,
        soft_wrap=True,
    )


def _check(arguments: list[str], console: Console) -> None:
    from speed_engine.data.preparing.check import check_folder

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


COMMANDS: dict[str, Callable[[list[str], Console], None]] = {
    "make": _make,
    "encode": _encode,
    "index": _index,
    "check": _check,
}
USES = {
    "make": ("SOURCE OUT", "write a collection of pictures as shards"),
    "encode": ("SHARDS OUT", "turn pictures into latents of a VAE, captions into text tokens"),
    "index": ("FOLDER", "make a data set of the tars in a folder, whoever wrote them"),
    "check": ("FOLDER", "read everything once; list what is damaged, unlike the rest, or twice"),
}
