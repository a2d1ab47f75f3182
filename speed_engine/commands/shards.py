"""``speed-engine shards COMMAND``: prepare, index and verify data."""

import json
import os
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import tyro
from rich.console import Console

from speed_engine.commands.dispatch import columns, usage
from speed_engine.commands.options import read_options
from speed_engine.runtime.checks import unknown


@dataclass(frozen=True)
class MakeCommand:
    """Write a collection of pictures as shards; killed and run again, it continues."""

    source: tyro.conf.Positional[str]
    """A collection of pictures, such as digits or a folder; `speed-engine shards --help` lists the
    kinds."""
    out: tyro.conf.Positional[Path]
    """Folder to write; it must be new, empty, or left by the same command."""
    images: Path | None = None
    """Folder of the pictures that a captions_*.json describes; of no other source."""
    split: str = "train"
    """Part of CIFAR-10 (train or test) or of a Hugging Face data set; of no other source."""
    size: int | None = None
    """Side in pixels to which the central square of each picture is cropped and resized, as ADM
    does. By default pictures stay as they are."""
    channels: int | None = None
    """Number of colour channels, 1 or 3. By default 1 for the digits and 3 for all others."""
    format: Literal["png", "jpg", "webp", "npy"] = "png"
    """File format in which the shards hold the pictures."""
    quality: int = 95
    """Quality of the formats jpg and webp, from 1 to 100."""
    low_size: int | None = None
    """Side in pixels of a second, smaller copy of each picture, for super-resolution. By default
    there is none."""
    samples_per_shard: int = 1000
    """Number of samples in a shard; the last shard may hold fewer."""
    workers: int = os.cpu_count() or 1
    """Number of processes that prepare pictures."""
    skip_bad: bool = False
    """Leave unusable pictures out, each with a warning. By default the first one stops the
    command."""


@dataclass(frozen=True)
class EncodeCommand:
    """Replace pictures by latents and add text tokens; killed and run again, it continues."""

    shards: tyro.conf.Positional[Path]
    """Folder of the data set to encode."""
    out: tyro.conf.Positional[Path]
    """Folder to write; it must be new, empty, or left by the same command."""
    vae: str | None = None
    """A diffusers AutoencoderKL, as a folder or a name on the Hugging Face hub
    (stabilityai/sd-vae-ft-ema), which encodes the pictures. By default they stay as they are."""
    text_encoder: str | None = None
    """A CLIP text model, as a folder or a name on the Hugging Face hub
    (openai/clip-vit-large-patch14), which encodes the captions. By default there are no text
    tokens."""
    batch_size: int = 32
    """Number of samples encoded at a time."""


@dataclass(frozen=True)
class IndexCommand:
    """Make a data set of the tars in a folder, whoever wrote them; reads each once."""

    folder: tyro.conf.Positional[Path]
    """Folder that holds the tars; their indices and dataset.json are written beside them."""
    workers: int = os.cpu_count() or 1
    """Number of processes that read."""
    metadata: Path | None = None
    """JSON file of facts about the whole data set, such as {"latent_scale": 0.18215}. Facts of
    the record that it does not name stay."""


@dataclass(frozen=True)
class CheckCommand:
    """Read everything once; exits with status 1 if something is wrong."""

    folder: tyro.conf.Positional[Path]
    """Folder that holds the tars."""
    members: tuple[str, ...] = ()
    """File extensions that every sample must have. By default those that most samples have."""
    workers: int = os.cpu_count() or 1
    """Number of processes that read."""
    out: Path | None = None
    """Repair list for --data.exclude, written if something is wrong. By default
    FOLDER/repair.json."""


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
        print(columns({shown(name): kind.text for name, kind in SOURCES.items()}), end="")
        return
    name = arguments[0]
    if name not in USES:
        raise unknown("command of shards", name, USES)
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

    command = read_options(MakeCommand, arguments, "speed-engine shards make")
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
    if command.split == "train":
        out = shlex.quote(str(command.out))
        _say(console, f"train on it: speed-engine train --data.source {out}")


def _encode(arguments: list[str], console: Console) -> None:
    command = read_options(EncodeCommand, arguments, "speed-engine shards encode")

    import torch

    from speed_engine.data.format.folder import LocalFolder
    from speed_engine.data.format.record import RECORD
    from speed_engine.data.preparing.encode import LatentEncoder, encode
    from speed_engine.data.preparing.summary import summarise
    from speed_engine.encoders.text import TextEncoder
    from speed_engine.runtime.progress import SampleProgress
    from speed_engine.runtime.world import described

    dataset, _ = LocalFolder(command.shards).load(())
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    world = described(kind)  # processes share the work, and need not talk to each other
    rank, world_size = world.rank, world.size
    device = torch.device(f"cuda:{world.local_rank}" if kind == "cuda" else "cpu")
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

    command = read_options(IndexCommand, arguments, "speed-engine shards index")
    metadata = None
    if command.metadata is not None:
        name, remedy = str(command.metadata), 'needed: an object such as {"latent_scale": 0.18215}.'
        content = document.read_file(command.metadata)
        parsed = document.parse(content, name, remedy)
        metadata = checked_metadata(parsed, name, "correct it there.")
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

    command = read_options(CheckCommand, arguments, "speed-engine shards check")
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
        console.print(f"repair list: {out}", highlight=False, markup=False, soft_wrap=True)
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
