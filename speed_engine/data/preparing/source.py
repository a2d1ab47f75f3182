"""What a source of pictures is: a list of samples, each opened when it is asked for."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

from PIL import Image


class Record(NamedTuple):
    """One sample as its source has it."""

    picture: Image.Image  # mode L or RGB
    label: int | None = None
    captions: tuple[str, ...] = ()


class Source(Protocol):
    """Samples by number, the same in every process and at every call; may be sent to processes.

    Attributes:
        channels: of the pictures where nothing else is asked for, 1 or 3.
        classes: names in the order of the labels; empty if there are none.
        identity: changes when the list of samples does.
        metadata: facts about the whole for ``dataset.json``, such as a licence.
    """

    channels: int
    classes: tuple[str, ...]
    identity: str
    metadata: Mapping[str, str]

    def __len__(self) -> int: ...

    def name(self, i: int) -> str:
        """Of sample ``i``, for messages."""
        ...

    def read(self, i: int, channels: int) -> Record:
        """Sample ``i``.

        Raises:
            UserError: its picture is unusable.
        """
        ...


def digest(*parts: Sequence[object]) -> str:
    """SHA-256 of a list of samples, for ``Source.identity``."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def numbered_classes(count: int) -> tuple[str, ...]:
    """Names of classes that have none; a single one is "all"."""
    return tuple(map(str, range(count))) if count > 1 else ("all",)
