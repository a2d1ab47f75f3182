"""The sources of pictures, by name or kind of file. A new one is a module, and its entry here.

Nothing is unpacked to disk and nothing unpickled.
"""

from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

from speed_engine.data.preparing.labels import LISTS
from speed_engine.data.preparing.pictures import is_picture
from speed_engine.data.preparing.source import Source, is_hidden
from speed_engine.data.preparing.sources.cifar import Cifar10
from speed_engine.data.preparing.sources.coco import CocoCaptions
from speed_engine.data.preparing.sources.digits import Digits
from speed_engine.data.preparing.sources.emoji import Emoji
from speed_engine.data.preparing.sources.huggingface import HuggingFace
from speed_engine.data.preparing.sources.image_folder import ImageFolder
from speed_engine.data.preparing.sources.listed_folder import ListedFolder, list_of
from speed_engine.data.preparing.sources.tars import Tars
from speed_engine.data.preparing.sources.zip_archive import ZipArchive
from speed_engine.data.preparing.summary import CONTACT_SHEET
from speed_engine.runtime.checks import UserError


class Asked(NamedTuple):
    """What a person asked for."""

    name: str  # as it was written
    path: Path  # that it is, if it is one
    split: str  # of CIFAR-10 and Hugging Face data sets
    images: Path | None  # folder of the pictures, for captions


class Kind(NamedTuple):
    """One kind of source."""

    text: str  # what it is
    open: Callable[[Asked], Source]
    options: tuple[str, ...] = ()  # of its own: split, images


SOURCES: dict[str, Kind] = {  # pattern of a name; that of a folder has a slash at its end
    "digits": Kind("scans of 8 x 8, part of the package", lambda asked: Digits()),
    "emoji": Kind("drawings of Noto Color Emoji, from its font", lambda asked: Emoji()),
    "hf:*": Kind(
        "Hugging Face data set, on the hub or in a folder",
        lambda asked: _hugging_face(asked.name.removeprefix("hf:"), asked.split),
        ("split",),
    ),
    "*/": Kind(
        "pictures, a sub-folder per class or listed in metadata.jsonl; or WebDataset's tars",
        lambda asked: _folder(asked.path),
    ),
    "*.tar": Kind(
        "pictures, labels and captions, as WebDataset has them",
        lambda asked: Tars([asked.path], asked.path.parent),
    ),
    "*.zip": Kind("pictures and labels, as EDM has them", lambda asked: ZipArchive(asked.path)),
    "*.json": Kind(
        "COCO's captions of the pictures in --images",
        lambda asked: CocoCaptions(asked.path, asked.images),
        ("images",),
    ),
    "*.tar.gz": Kind(
        "cifar-10-binary.tar.gz as it is published",
        lambda asked: Cifar10(asked.path, asked.split),
        ("split",),
    ),
}
SOURCES["*.tgz"] = SOURCES["*.tar.gz"]


def _folder(path: Path) -> Source:
    """By what is in it."""
    tars = sorted(path.glob("*.tar"))
    beside = [e for e in path.iterdir() if not is_hidden(e.name) and e.name != CONTACT_SHEET]
    if tars and not any(entry.is_dir() or is_picture(entry.name) for entry in beside):
        return Tars(tars, path)
    if listed := list_of(path):
        return ListedFolder(path, listed)
    return ImageFolder(path)


def _hugging_face(name: str, split: str) -> Source:
    """Image folders with a list are read here, as they are; others by the library."""
    folder = Path(name).expanduser()
    for path in (folder / split, folder) if split == "train" else (folder / split,):
        if path.is_dir() and (listed := list_of(path)) in LISTS:
            return ListedFolder(path, listed)
    return HuggingFace(name, split)


def shown(pattern: str) -> str:
    """How a person writes the name of a source of this pattern."""
    return pattern.replace("*", "NAME")


def open_source(name: str, images: Path | None = None, split: str = "train") -> Source:
    """The source that a name stands for, see ``SOURCES``.

    Args:
        name: as a person wrote it.
        images: folder of the pictures, for captions.
        split: of CIFAR-10 and Hugging Face data sets.

    Raises:
        UserError: unknown, unreadable or unusable, or asked for with an option of other sources;
            says why.
    """
    path = Path(name).expanduser()
    written = f"{name}/" if path.is_dir() and name not in SOURCES else name
    pattern = next((pattern for pattern in SOURCES if fnmatchcase(written, pattern)), "*")
    if pattern.startswith("*") and not path.exists():
        known = ", ".join(map(shown, SOURCES))
        raise UserError(f"source {name!r} does not exist; needed: {known}.")
    if pattern not in SOURCES:
        raise UserError(f"source {name!r}: files of kind {path.suffix!r} are not known.")
    kind = SOURCES[pattern]
    for option, given in (("images", images), ("split", split if split != "train" else None)):
        if given is not None and option not in kind.options:
            others = ", ".join(shown(p) for p, of in SOURCES.items() if option in of.options)
            raise UserError(
                f"--{option} {given}: sources of kind {others} have it, {name} has none; leave it "
                "out."
            )
    return kind.open(Asked(name, path, split, images))
