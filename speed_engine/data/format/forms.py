"""In which forms a data set may lie, and which forms of other programs are refused."""

import re
from pathlib import Path

from speed_engine.runtime.checks import UserError

_BRACES = re.compile(r"\{[^{}/]*(\.\.|,)[^{}/]*\}")
_PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_COMPRESSED = re.compile(r"\.(tar\.(gz|bz2|xz|zst)|tgz)$")


def tars_of(folder: Path) -> list[Path]:
    """The tars in a folder, by name.

    Raises:
        FileNotFoundError: there are none; says what is there instead.
    """
    if paths := sorted(folder.glob("*.tar")):
        return paths
    entries = sorted(folder.iterdir()) if folder.is_dir() else []
    names = [entry.name for entry in entries]
    if packed := [name for name in names if _COMPRESSED.search(name)]:
        raise FileNotFoundError(
            f"{folder} holds no .tar shards, but compressed ones ({min(packed)}, ...), which allow "
            f"no reading at random: unpack them first (gzip -d, zstd -d)."
        )
    if any(entry.suffix.lower() in _PICTURES or entry.is_dir() for entry in entries):
        raise FileNotFoundError(
            f"{folder} holds no .tar shards, but pictures or folders; {_shards_of(folder)}."
        )
    raise FileNotFoundError(
        f"{folder} holds no .tar shards; `speed-engine shards make` writes some."
    )


def refuse_missing(folder: Path) -> None:
    """Refuse what is no folder.

    Raises:
        FileNotFoundError: says what to do.
    """
    if folder.is_file():
        raise FileNotFoundError(f"{folder} is a file, not shards; {_shards_of(folder)}.")
    if not folder.is_dir():
        raise FileNotFoundError(
            f"data folder {folder} does not exist; name the folder of your shards by "
            f"--data.source, or write it: `speed-engine shards make SOURCE {folder}`."
        )


def _shards_of(pictures: Path) -> str:
    name = pictures.resolve().name.partition(".")[0]
    return (
        f"`speed-engine shards make {pictures} shards/{name} --size 64` makes shards of them, "
        f"cropped to 64 x 64 pixels, which --data.source shards/{name} then trains on"
    )


def refuse_other_forms(source: str) -> None:
    """Refuse what other programs take for data sets, and this one does not.

    Raises:
        UserError: a brace pattern, or a compressed tar; says what to do.
    """
    if match := _BRACES.search(source):
        raise UserError(
            f"data.source={source}: {match[0]} is a brace pattern of webdataset; name the folder "
            f"that holds the shards, all of which are read."
        )
    if _COMPRESSED.search(source):
        raise UserError(
            f"data.source={source} is a compressed tar, which allows no reading at random; unpack "
            f"it first (gzip -d, zstd -d) and name the .tar or its folder."
        )
