"""Files that a crash cannot leave half written, and the folder of those that can be made again."""

import errno
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

CONTINUED = (
    "`speed-engine train --resume RUN` continues a run whose folder is there already; all else "
    "begins or continues by the same command."
)
_MAKE_ROOM = f"Make room there; what is finished is kept. {CONTINUED[0].upper()}{CONTINUED[1:]}"
_PERMIT = "Change the permissions, or name another path."
_REMEDIES = {
    errno.ENOSPC: _MAKE_ROOM,
    errno.EDQUOT: _MAKE_ROOM,
    errno.EFBIG: "Raise the limit of a file's size (ulimit -f), or name another path.",
    errno.EACCES: _PERMIT,
    errno.EPERM: _PERMIT,
    errno.EROFS: "Name a path that is not on a read-only file system.",
}


def in_words(error: Exception) -> str:
    """An error for a person; one of a file that it names says what to do about it."""
    if not isinstance(error, OSError) or error.filename is None or error.errno not in _REMEDIES:
        return str(error)
    return f"{error}. {_REMEDIES[error.errno]}"


@contextmanager
def naming(path: Path, temporary: Path | None = None) -> Iterator[None]:
    """An OSError inside names this path if it names none, as those of a full disk do not.

    Args:
        path: what is written.
        temporary: what it is called until it is complete, which no error names.
    """
    try:
        yield
    except OSError as error:
        unnamed = error.filename is None
        if temporary is not None:
            unnamed = unnamed or str(error.filename).startswith(str(temporary))
        if error.errno is not None and unnamed:
            error.filename = str(path)
        raise


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

    As of ``write_durably``, the file is complete or not there at all.

    Raises:
        OSError: the disk is full or read-only; nothing is left behind.
    """
    # Not at the top: it needs torch, which the command line starts without.
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with replacing(path) as temporary:
        temporary.touch()
        permissions = temporary.stat().st_mode
        try:
            save_file(dict(tensors), temporary, metadata)
        except SafetensorError as error:
            raise _as_os_error(error) from error
        temporary.chmod(permissions)


@contextmanager
def replacing(path: Path, *, shared: bool = False) -> Iterator[Path]:
    """A path beside ``path`` to write a file to, which takes its place when the block ends.

    After an exception nothing is left behind, and what was at ``path`` is still there. An OSError
    names ``path``.

    Args:
        path: of the file.
        shared: whether several processes may write it at the same time, as in a cache; each then
            writes under a name of its own, which a kill leaves behind.
    """
    own = f".{uuid.uuid4().hex}" if shared else ""
    temporary = path.with_name(f"{path.name}{own}.tmp")
    try:
        with naming(path, temporary):
            yield temporary
            sync(temporary)
            temporary.rename(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder beside ``path`` to write files to, which takes that name when the block ends.

    After an exception nothing is left behind; what a killed process left there is made anew. An
    OSError names a path.

    Args:
        path: of the folder, which must not exist.
    """
    temporary = path.with_name(f"{path.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        with naming(path, temporary):
            yield temporary
            temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
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


def _as_os_error(error: Exception) -> OSError:
    """What safetensors says of the operating system, such as ``... (os error 28)``."""
    number = re.search(r"\(os error (\d+)\)", str(error))
    if number is None:
        return OSError(str(error))
    return OSError(int(number[1]), os.strerror(int(number[1])))
