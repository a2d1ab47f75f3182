"""JSON documents of a data set: parsed with bounds, and compared with what they should hold."""

import math
from pathlib import Path
from typing import Any

from speed_engine.data.format.errors import ShardError
from speed_engine.runtime import strict
from speed_engine.runtime.checks import UserError, shortened

MAX_COUNT = 2**62  # of bytes, samples, classes: their sums still fit 64 bits


def read_file(path: Path) -> bytes:
    """The content of a document.

    Raises:
        OSError: it cannot be read.
        ShardError: it is longer than any.
    """
    if (size := path.stat().st_size) > strict.MAX_BYTES:
        raise ShardError(f"{path} has {size:,} bytes; at most {strict.MAX_BYTES:,} are read.")
    return path.read_bytes()


def parse(content: bytes | str, source: str, remedy: str) -> dict[str, Any]:
    """An object of JSON, whose numbers are finite.

    Args:
        content: of the document.
        source: its name, for messages.
        remedy: what to do about one that is none.

    Raises:
        ShardError: it is none, or nested too deeply.
    """
    try:
        document = strict.parse(content, _finite)
    except UserError as error:
        raise ShardError(f"{source}: {error} {remedy[:1].upper()}{remedy[1:]}") from error
    if not isinstance(document, dict):
        raise ShardError(f"{source} is not an object but {shortened(document)}; {remedy}")
    return document


def field(kind: Any, document: dict[str, Any], name: str, source: str, remedy: str) -> Any:
    """A field of a document, of exactly this type, see ``strict.read``.

    Raises:
        ShardError: it is missing or of another type.
    """
    if name not in document:
        raise ShardError(f"{source} has no field {name!r}; {remedy}")
    try:
        return strict.read(kind, document[name], name)
    except UserError as error:
        raise ShardError(f"{source}: {error} {remedy[:1].upper()}{remedy[1:]}") from error


def check_count(name: str, value: int) -> None:
    """Refuse a number of a document that counts something and cannot be."""
    if not 0 <= value <= MAX_COUNT:
        raise UserError(f"{name}={shortened(value)}: must lie in [0, {MAX_COUNT:,}].")


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise UserError(f"{shortened(text)} is no number of JSON.")
    return value
