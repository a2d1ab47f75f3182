"""Files that a crash cannot leave half written, and the folder of those that can be made again."""

import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def write_durably(path: Path, data: bytes | bytearray, *, shared: bool = False) -> None:
    """Under its final name the file is complete and on disk, or it is not there at all.

    Args:
        path: of the file; one that is there is replaced.
        data: its content.
        shared: as in ``replacing``.

    Raises:
        OSError: the disk is full or read-only; nothing is left behind.
    """
    with replacing(path, shared=shared) as temporary:
        temporary.write_bytes(data)


def save_tensors(
    tensors: "Mapping[str, Tensor]", path: Path, metadata: dict[str, str] | None = None
) -> None:
    """A safetensors file with the permissions of any new file; the library gives the owner's only.

    Raises:
        OSError: the disk is full or read-only.
        SafetensorError: the same, as the library says it.
    """
    # Not at the top: it needs torch, which the command line starts without.
    from safetensors.torch import save_file

    path.touch()
    permissions = path.stat().st_mode
    save_file(dict(tensors), path, metadata)
    path.chmod(permissions)


@contextmanager
def replacing(path: Path, *, shared: bool = False) -> Iterator[Path]:
    """A path beside ``path`` to write a file to, which takes its place when the block ends.

    After an exception nothing is left behind, and what was at ``path`` is still there.

    Args:
        path: of the file.
        shared: whether several processes may write it at the same time, as in a cache; each then
            writes under a name of its own, which a kill leaves behind.
    """
    own = f".{uuid.uuid4().hex}" if shared else ""
    temporary = path.with_name(f"{path.name}{own}.tmp")
    try:
        yield temporary
        sync(temporary)
        temporary.rename(path)
    except BaseException:
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
