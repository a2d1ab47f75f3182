"""What a source of pictures is: a list of samples, each opened when it is asked for."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import NamedTuple

from PIL import Image

from speed_engine.data.preparing.pictures import is_picture
from speed_engine.runtime.checks import UserError

_MOST_CLASSES = 10**6  # that have numbers only: a name is made for each


class Record(NamedTuple):
    """One sample as its source has it."""

    picture: Image.Image  # mode L or RGB
    label: int | None = None
    captions: tuple[str, ...] = ()


class Source(ABC):
    """Samples by number, the same in every process and at every call; may be sent to processes.

    Attributes:
        channels: of the pictures where nothing else is asked for, 1 or 3.
        classes: names in the order of the labels; empty if there are none.
        identity: changes when the list of samples does; what it does not cover, ``content`` does.
        metadata: facts about the whole for ``dataset.json``, such as a licence.
        left_out: what is there and is no sample, with its number: files that are no pictures of a
            known kind, by extension, hidden ones, and so on.
    """

    channels: int = 3
    classes: tuple[str, ...] = ()
    identity: str
    metadata: Mapping[str, str] = {}
    left_out: Mapping[str, int] = {}

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def name(self, i: int) -> str:
        """Of sample ``i``, for messages."""

    @abstractmethod
    def read(self, i: int, channels: int) -> Record:
        """Sample ``i``, its picture with 1 or 3 channels.

        Raises:
            UserError: its picture is unusable.
            OSError: it cannot be read.
        """

    def content(self, i: int) -> bytes:
        """Digest of the stored bytes of sample ``i``; empty where ``identity`` covers them."""
        return b""


def digest(*parts: Sequence[object]) -> str:
    """SHA-256 of a list of samples, for ``Source.identity``."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def numbered_classes(count: int) -> tuple[str, ...]:
    """Names of classes that have none; a single one is "all".

    Raises:
        UserError: there are more than a million, which no numbers of classes are.
    """
    if count > _MOST_CLASSES:
        raise UserError(
            f"a label is {count - 1:,}; needed are classes numbered from 0, at most "
            f"{_MOST_CLASSES:,}. Number them anew, or give their names."
        )
    return tuple(map(str, range(count))) if count > 1 else ("all",)


def by_extension(names: Iterable[str]) -> Mapping[str, int]:
    """Counts of files for ``Source.left_out``, from their names inside the source."""
    files = [PurePath(name) for name in names]
    return Counter("hidden" if is_hidden(str(f)) else f.suffix.lower() or f.name for f in files)


def is_sample(name: str) -> bool:
    """Whether a file of this name inside a source is taken for a picture."""
    return is_picture(name) and not is_hidden(name)


def is_hidden(name: str) -> bool:
    """Whether a name inside a source is of a hidden file, or below a hidden folder."""
    return any(part.startswith(".") and part not in (".", "..") for part in PurePath(name).parts)
