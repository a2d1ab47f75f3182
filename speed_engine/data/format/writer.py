"""Writing shards: plain WebDataset tars, each with an index that makes it seekable and verifiable.

    digits-000000.tar                   members <key>.<extension>, all of one sample adjacent
    digits-000000.index.safetensors     where the members lie and their checksums, see index.py
    dataset.json                        the record of the whole, see record.py
    digits.incomplete                   there while a writer is at work, or after it was killed

The tar is durable before its index, every index before ``dataset.json``; readers refuse a folder
with an ``.incomplete`` marker, so a killed writer leaves nothing that could pass for a data set.
"""

import re
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Self, TypeVar

from speed_engine.data.format.checksums import crc32
from speed_engine.data.format.decode import describe_member
from speed_engine.data.format.errors import ShardError
from speed_engine.data.format.forms import tars_of
from speed_engine.data.format.index import (
    Contents,
    Member,
    Samples,
    ShardIndex,
    index_path,
    load_index,
    merge_member,
)
from speed_engine.data.format.record import (
    RECORD,
    Dataset,
    dataset_from_json,
    dataset_of,
    file_record,
    read_record,
    refuse_incomplete,
)
from speed_engine.data.format.tar import BLOCK, scan_index
from speed_engine.runtime.checks import UserError
from speed_engine.runtime.files import sync, write_durably
from speed_engine.runtime.workers import worker_processes

T = TypeVar("T")

_KEY = re.compile(r"[^\W_][^.\0]*")
_EXTENSION = re.compile(r"[a-z0-9][a-z0-9_.]*")


class ShardWriter:
    """Writes a data set; ``with ShardWriter(...) as writer: writer.write(key, members)``.

    Args:
        folder: created if missing.
        prefix: shards are ``<prefix>-000000.tar`` and so on; must be unused in the folder.
        samples_per_shard: the last shard may hold fewer.
        metadata: facts about the whole for ``dataset.json``, see record.py.
        files: names of files in the folder that belong to the data set; there when it ends.

    A shard is kept in memory until it is full. Equal samples give equal bytes: owner, mode and time
    of every member are fixed.
    """

    def __init__(
        self,
        folder: str | Path,
        prefix: str,
        samples_per_shard: int,
        metadata: Mapping[str, Any] | None = None,
        files: Iterable[str] = (),
    ) -> None:
        if samples_per_shard < 1:
            raise UserError(f"samples_per_shard={samples_per_shard} must be at least 1.")
        self._folder, self._prefix, self._limit = Path(folder), prefix, samples_per_shard
        self._metadata, self._files = metadata, tuple(files)
        if used := sorted(self._folder.glob(f"{prefix}-*.tar")):
            raise FileExistsError(f"{used[0]} exists; choose another folder or prefix.")
        begin(self._folder, prefix)
        self._tar = _Tar()
        self._shard = 0

    def write(self, key: str, members: Mapping[str, bytes]) -> None:
        """Append one sample.

        Raises:
            UserError: the key is there already, or could not be read back as it is.
            OSError: the disk is full or read-only; the data set stays incomplete.
        """
        self._tar.add(key, members)
        if len(self._tar.samples) == self._limit:
            self._write_shard()

    def _write_shard(self) -> None:
        self._tar.write(self._folder / shard_name(self._prefix, self._shard))
        self._tar = _Tar()
        self._shard += 1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, exception_type: object, *_: object) -> None:
        """Complete the data set; after an exception it stays marked as incomplete."""
        if exception_type is None:
            if self._tar.samples:
                self._write_shard()
            commit(self._folder, self._prefix, self._metadata, self._files)


def begin(folder: Path, name: str) -> None:
    """Mark a folder as incomplete until ``commit``; ``name`` says by what, such as a prefix."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.incomplete").touch()
    (folder / RECORD).unlink(missing_ok=True)
    sync(folder)


def commit(
    folder: Path,
    name: str | None = None,
    metadata: Mapping[str, Any] | None = None,
    files: Iterable[str] = (),
) -> Dataset:
    """Record all shards of a folder as one complete data set.

    Args:
        folder: every tar in it has its index.
        name: as given to ``begin``; None if that was not called.
        metadata: facts about the whole, of JSON's types; ``latent_scale``, for example.
        files: names of files beside the shards that belong to the data set.

    Raises:
        ShardError: there is no shard, or one lacks its index or does not fit it.
    """
    loaded = {path: load_index(index_path(path)) for path in sorted(folder.glob("*.tar"))}
    for path, (index, _) in loaded.items():
        if path.stat().st_size != index.tar_bytes:
            raise ShardError(f"{path} has not the size that its index says; write it again.")
    if not loaded:
        raise ShardError(f"{folder} holds no shards; nothing was written into it.")
    records = {file: file_record((folder / file).read_bytes()) for file in files}
    dataset = dataset_of((path.name, both) for path, both in loaded.items())
    dataset = replace(dataset, metadata=dict(metadata or {}), files=records)
    write_durably(folder / RECORD, dataset.to_json().encode())
    if name is not None:
        (folder / f"{name}.incomplete").unlink(missing_ok=True)
        sync(folder)
    return dataset


def shard_name(prefix: str, number: int) -> str:
    """``digits-000003.tar``."""
    return f"{prefix}-{number:06d}.tar"


def write_shard(path: Path, samples: Iterable[tuple[str, Mapping[str, bytes]]]) -> None:
    """Write one tar and its index, for writers that make many in parallel.

    They call ``begin`` first and ``commit`` at the end; a shard that
    ``is_complete`` need not be written again. Errors are those of ``ShardWriter.write``.
    """
    tar = _Tar()
    for key, members in samples:
        tar.add(key, members)
    tar.write(path)


def is_complete(path: Path) -> bool:
    """Whether a tar is on disk with its index; its bytes are not read."""
    try:
        index, _ = load_index(index_path(path))
        return path.stat().st_size == index.tar_bytes
    except (FileNotFoundError, ShardError):
        return False


def index_folder(
    folder: Path, workers: int = 1, metadata: Mapping[str, Any] | None = None
) -> Dataset:
    """Make a data set of the tars in a folder, whoever wrote them, by reading each once.

    Args:
        folder: shards that have an intact index already are not read again.
        workers: processes.
        metadata: facts about the whole, beside those that the folder's record has, if there is one.

    Raises:
        ShardError: a tar is damaged, or a writer did not finish; nothing is recorded then.
        ChildProcessError: a worker was killed; likewise.
    """
    refuse_incomplete(folder)
    record, files = folder / RECORD, ()
    if record.exists():
        known = dataset_from_json(read_record(record), str(record))
        metadata, files = {**known.metadata, **(metadata or {})}, known.files
    paths = [path for path in tars_of(folder) if not is_complete(path)]
    for _ in each_shard(index_shard, paths, workers):
        pass  # errors are raised here
    return commit(folder, None, metadata, files)


def each_shard(function: Callable[[Path], T], paths: Sequence[Path], workers: int) -> Iterator[T]:
    """Results of ``function`` for all paths in turn, computed in so many processes."""
    if workers <= 1 or len(paths) <= 1:
        yield from map(function, paths)
        return
    with shard_processes(min(workers, len(paths))) as pool:
        yield from pool.map(function, paths)


@contextmanager
def shard_processes(
    count: int, start: Callable[..., object] | None = None, *given: Any
) -> Iterator[ProcessPoolExecutor]:
    """As ``worker_processes``, for commands that may be repeated.

    Raises:
        ChildProcessError: one of them was killed.
    """
    try:
        with worker_processes(count, start, *given) as pool:
            yield pool
    except BrokenProcessPool as error:
        raise ChildProcessError(
            "a worker process was killed; if memory ran out, use fewer workers. Run the same "
            "command again to continue."
        ) from error


def index_shard(path: Path) -> None:
    """Write the index of a tar, by reading all of it.

    Raises:
        ShardError: the tar is damaged.
    """
    write_durably(index_path(path), scan_index(path).to_bytes())


class _Tar:
    """A tar in memory."""

    def __init__(self) -> None:
        self.samples: Samples = {}
        self._data = bytearray()
        self._contents: Contents = {}

    def add(self, key: str, members: Mapping[str, bytes]) -> None:
        readable = _KEY.fullmatch(key) and all(map(_EXTENSION.fullmatch, members))
        if not readable or not members or key in self.samples:
            raise UserError(
                f"key {key!r} with members {sorted(members)}: a key must be new, begin with a "
                f"letter or digit and have no dot; extensions, at least one, are lower case; "
                f"for example '000123' with ['cls', 'npy']."
            )
        self.samples[key] = {
            extension: self._append(f"{key}.{extension}", data)
            for extension, data in sorted(members.items())
        }
        for extension, data in members.items():
            merge_member(self._contents, extension, describe_member(data, extension))

    def write(self, path: Path) -> None:
        """The tar is durable before its index, so that the index says that it is complete."""
        self._data += bytes(2 * BLOCK)
        write_durably(path, self._data)
        index = ShardIndex.of(self.samples, len(self._data), self._contents)
        write_durably(index_path(path), index.to_bytes())

    def _append(self, name: str, data: bytes) -> Member:
        info = tarfile.TarInfo(name)  # mode 0644; owner and time are zero
        info.size = len(data)
        self._data += info.tobuf(tarfile.USTAR_FORMAT, "utf-8")
        offset = len(self._data)
        self._data += data + bytes(-len(data) % BLOCK)
        return Member(offset, len(data), crc32(data))
