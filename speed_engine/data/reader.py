"""Reading shards: random access to verified samples, by number.

The samples are numbered through the shards in the order of their names. Where each lies is held in
arrays, which forked workers share; the tars are opened when first needed. Nothing here unpickles,
writes, or runs a command, and no name from inside a tar is ever opened.

Letters: N samples, K keys.
"""

import logging
import os
import zlib
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np

from speed_engine.data.dataset import (
    RECORD,
    Dataset,
    ShardRecord,
    dataset_from_json,
    merge_description,
    refuse_incomplete,
)
from speed_engine.data.index import Contents, ShardIndex, index_path, load_index
from speed_engine.data.shards import scan_index
from speed_engine.data.tarscan import ShardError

log = logging.getLogger(__name__)

MAX_OPEN_FILES = 64
_WASTE = 2**16  # bytes between the members of a sample that are read along rather than left out

Sample = dict[str, memoryview]


class ShardReader:
    """Random access to the samples of all shards of a data set.

    Reads are verified and hold no file position, so that forked processes may share a reader;
    a pickled one opens its files anew. Threads may not share one.

    Args:
        folder: holds ``*.tar``, with ``dataset.json`` or without.
        keys: the members that every sample must have and ``read`` returns.

    Attributes:
        keys: as given.
        dataset: the record of the data set.
        counts: samples per shard.
        fingerprint: SHA-256 of the content of the data set.

    Raises:
        FileNotFoundError: no such folder, or no shards in it.
        ShardError: shards, indices and record are not of each other; names the file and a remedy.
    """

    def __init__(self, folder: str | Path, keys: Sequence[str] = ("npy", "cls")) -> None:
        self.keys = tuple(keys)
        self.dataset, self._indices = open_dataset(Path(folder))
        self._paths = [Path(folder) / shard.name for shard in self.dataset.shards]
        columns = [
            _columns(path, index, self.keys)
            for path, index in zip(self._paths, self._indices, strict=True)
        ]
        self.counts = tuple(map(len, self._indices))
        self.fingerprint = self.dataset.fingerprint
        self._ends = np.array(list(accumulate(self.counts)))
        # Arrays, not objects: a million objects would be copied page by page into every worker.
        self._offset, self._size, self._crc32 = map(np.concatenate, zip(*columns, strict=True))
        self._open: dict[int, int] = {}  # shard -> file descriptor, least recently used first

    def __len__(self) -> int:
        return int(self._ends[-1])

    def read(self, i: int) -> dict[str, bytes]:
        """Members of sample ``i`` by extension.

        Raises:
            ShardError: the bytes are not those that were written; names shard, sample and member.
            OSError: the shard cannot be read.
        """
        (sample,) = self.read_batch([i])
        if isinstance(sample, ShardError):
            raise sample
        return {key: bytes(data) for key, data in sample.items()}

    def read_batch(self, samples: Sequence[int] | np.ndarray) -> list[Sample | ShardError]:
        """Members of many samples; in the place of a damaged one, what is wrong with it.

        Raises:
            OSError: a shard cannot be read.
        """
        numbers = np.asarray(samples, dtype=np.int64)
        outside = numbers[(numbers < 0) | (numbers >= len(self))]
        if len(outside):
            raise IndexError(f"sample {outside[0]} of {len(self)}.")
        shards = np.searchsorted(self._ends, numbers, side="right").tolist()
        offsets, sizes = self._offset[numbers], self._size[numbers]
        starts = offsets.min(axis=1)
        lengths = (offsets + sizes).max(axis=1) - starts
        apart = lengths > sizes.sum(axis=1) + _WASTE
        rows = zip(
            numbers.tolist(),
            shards,
            starts.tolist(),
            lengths.tolist(),
            apart.tolist(),
            (offsets - starts[:, None]).tolist(),
            sizes.tolist(),
            self._crc32[numbers].tolist(),
            strict=True,
        )
        return [self._read(*row) for row in rows]

    def _read(
        self,
        i: int,
        shard: int,
        start: int,
        length: int,
        apart: bool,
        offsets: list[int],
        sizes: list[int],
        crcs: list[int],
    ) -> Sample | ShardError:
        """One sample, with one system call unless its members lie far apart."""
        file = self._descriptor(shard)
        if apart:
            parts = [
                _pread(file, size, start + offset)
                for offset, size in zip(offsets, sizes, strict=True)
            ]
        else:
            data = _pread(file, length, start)
            parts = [data[o : o + size] for o, size in zip(offsets, sizes, strict=True)]
        for key, part, size, crc32 in zip(self.keys, parts, sizes, crcs, strict=True):
            if len(part) != size or zlib.crc32(part) != crc32:
                return ShardError(
                    f"{self.describe(i)}, member {key!r}: CRC-32 mismatch in its {size} bytes; the "
                    f"shard is damaged, write it again."
                )
        return dict(zip(self.keys, parts, strict=True))

    def describe(self, i: int) -> str:
        """Shard and key of sample ``i``, for messages."""
        shard = int(np.searchsorted(self._ends, i, side="right"))
        key = self._indices[shard].key(i - int(self._ends[shard]) + self.counts[shard])
        return f"{self._paths[shard]}: sample {key!r}"

    def close(self) -> None:
        """Close the files; a later read opens them again."""
        while self._open:
            os.close(self._open.popitem()[1])

    def _descriptor(self, shard: int) -> int:
        file = self._open.pop(shard, None)
        if file is None:
            if len(self._open) >= MAX_OPEN_FILES:
                os.close(self._open.pop(next(iter(self._open))))
            file = os.open(self._paths[shard], os.O_RDONLY)
            if hasattr(os, "posix_fadvise"):  # its samples are about to be read, in random order
                os.posix_fadvise(file, 0, 0, os.POSIX_FADV_WILLNEED)
        self._open[shard] = file
        return file

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_open": {}}

    def __del__(self) -> None:
        if hasattr(self, "_open"):  # absent if construction failed
            self.close()


def _pread(file: int, size: int, offset: int) -> memoryview:
    """Writable, because torch wants its memory so; shorter at the end of the file."""
    data = bytearray(size)
    return memoryview(data)[: os.preadv(file, [data], offset)]


def open_dataset(folder: Path) -> tuple[Dataset, list[ShardIndex]]:
    """The record of a data set and the indices of its shards; what is missing is made in memory.

    Raises:
        FileNotFoundError: no such folder, or no shards in it.
        ShardError: shards, indices and record are not of each other; names the file and a remedy.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"data folder {folder} does not exist; check the path.")
    refuse_incomplete(folder)
    if not (names := sorted(path.name for path in folder.glob("*.tar"))):
        raise FileNotFoundError(
            f"{folder} holds no .tar shards; `speed-engine shards make` writes some."
        )
    record = folder / RECORD
    known = dataset_from_json(record.read_bytes(), str(record)) if record.exists() else None
    if known is not None and names != [shard.name for shard in known.shards]:
        listed = {shard.name for shard in known.shards}
        raise ShardError(
            f"{folder} lacks {sorted(listed.difference(names))[:3]} and has "
            f"{sorted(set(names) - listed)[:3]} that {record.name} does not list; put the folder "
            f"back as it was, or run `speed-engine shards index {folder}` to record it as it is."
        )
    loaded = [_open_shard(folder / name) for name in names]
    indices = [index for index, _ in loaded]
    if known is None:
        known = _record(names, loaded)
    for shard, (index, sha256) in zip(known.shards, loaded, strict=True):
        if (shard.sha256, shard.bytes) != (sha256, index.tar_bytes):
            raise ShardError(
                f"{folder / shard.name} is of another data set than {record}: its content is "
                f"{sha256[:12]}, recorded is {shard.sha256[:12]}; put the shard and its index back."
            )
    return known, indices


def _open_shard(path: Path) -> tuple[ShardIndex, str]:
    """Index and content hash, checked against the size of the tar."""
    try:
        index, sha256 = load_index(index_path(path))
    except FileNotFoundError:
        log.warning(
            "%s has no index and is read whole to make one; `speed-engine shards index %s` keeps "
            "it.",
            path,
            path.parent,
        )
        index = scan_index(path)
        return index, index.content_hash()
    tar_bytes = path.stat().st_size
    if tar_bytes != index.tar_bytes:
        raise ShardError(
            f"{path} has {tar_bytes} bytes, its index says {index.tar_bytes}: it is truncated or "
            f"was replaced; write it again, or delete {index_path(path).name} if you trust it."
        )
    return index, sha256


def _record(names: list[str], loaded: list[tuple[ShardIndex, str]]) -> Dataset:
    contents: Contents = {}
    for index, _ in loaded:
        for extension, description in index.contents.items():
            merge_description(contents, extension, description)
    shards = [
        ShardRecord(name, index.tar_bytes, len(index), sha256)
        for name, (index, sha256) in zip(names, loaded, strict=True)
    ]
    return Dataset(tuple(shards), contents)


def _columns(
    path: Path, index: ShardIndex, keys: tuple[str, ...]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Offset, size and CRC of the required members, each (samples, K)."""
    if not len(index):
        raise ShardError(f"{path} holds no samples (members named <key>.<extension>).")
    for key in keys:
        column = index.extensions.index(key) if key in index.extensions else None
        without = 0 if column is None else int(np.argmin(index.size[:, column]))
        if column is None or index.size[without, column] < 0:
            sizes = index.size[without].tolist()
            present = [e for e, size in zip(index.extensions, sizes, strict=True) if size >= 0]
            raise ShardError(
                f"{path}: sample {index.key(without)!r} has no member {key!r}, only {present}; "
                f"every sample needs {list(keys)}: name other keys or write the shard again."
            )
    columns = [index.extensions.index(key) for key in keys]
    offset, size = index.offset[:, columns], index.size[:, columns]
    if offset.min() < 0 or (offset + size).max() > index.tar_bytes:
        raise ShardError(f"{path}: its index names bytes outside of it; write the shard again.")
    return offset, size, index.crc32[:, columns]
