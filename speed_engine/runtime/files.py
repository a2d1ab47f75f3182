"""Files that a crash cannot leave half written, and the folder of those that can be made again."""

import os
from pathlib import Path


def write_durably(path: Path, data: bytes | bytearray) -> None:
    """Under its final name the file is complete and on disk, or it is not there at all.

    Raises:
        OSError: the disk is full or read-only; nothing is left behind.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def sync(path: Path) -> None:
    """A file's content, or a folder's renames and deletions, onto the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def cache_folder() -> Path:
    """For what can be made again: $SPEED_ENGINE_CACHE or ~/.cache/speed_engine."""
    return Path(os.environ.get("SPEED_ENGINE_CACHE") or "~/.cache/speed_engine").expanduser()
