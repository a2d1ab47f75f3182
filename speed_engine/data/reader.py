"""Reading shards: random access to verified samples, by number.

The samples are numbered through the shards in the order of their names. Where each lies is held in
arrays, which forked workers share; the tars are opened when first needed. Nothing here unpickles or
runs a command, and no name from inside a tar is ever opened.

Letters: N samples, K keys.
"""

import os
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from zlib import crc32

import numpy as np

from speed_engine.data.folder import open_folder
from speed_engine.data.index import ShardIndex
from speed_engine.data.remote import Cache
from speed_engine.data.repair import RepairList, load_repair_list
from speed_engine.data.tarscan import ShardError

MAX_OPEN_FILES = 64
_WASTE = 2**16  # bytes between the members of a sample that are read along rather than left out

Sample = dict[str, memoryview]


class ShardReader:
    """Random access to the samples of all shards of a data set.

    Reads are verified and hold no file position, so that forked processes may share a reader;
    a pickled one opens its files anew. Threads may not share one.

    Args:
        source: a folder of ``*.tar``, or the URL of one that has a record, see remote.py.
        keys: the members that every sample must have and ``read`` returns.
        cache: for what comes from a URL.
        exclude: a repair list, see check.py; what it names is left out.

    Attributes:
        keys: as given.
        dataset: the record of the data set.
        counts: samples per shard.
        fingerprint: SHA-256 of the content of the data set, and of what is excluded.

    Raises:
        FileNotFoundError: no such folder, or no shards in it.
        ShardError: shards, indices and record are not of each other; names the file and a remedy.
    """

    def __init__(
        self,
        source: str | Path,
        keys: Sequence[str] = ("npy", "cls"),
        cache: Cache | None = None,
        exclude: Path | None = None,
    ) -> None:
        self.keys = tuple(keys)
        excluded = load_repair_list(exclude) if exclude else RepairList()
        self._folder = open_folder(source, cache)
        self.dataset, self._indices = self._folder.load(excluded.shards)
        self.fingerprint = excluded.fingerprint(self.dataset)
        self._names = [self._folder.describe(shard.name) for shard in self.dataset.shards]
        kept = [
            index.without(excluded.samples.get(shard.name, {}))
            for shard, index in zip(self.dataset.shards, self._indices, strict=True)
        ]
        columns = [
            _columns(name, index, rows, self.keys)
            for name, index, rows in zip(self._names, self._indices, kept, strict=True)
        ]
        self.counts = tuple(map(len, kept))
        self._ends = np.array(list(accumulate(self.counts)))
        # Arrays, not objects: a million objects would be copied page by page into every worker.
        self._row = np.concatenate(kept)  # (N,) number in the shard
        self._offset, self._size, self._crc32 = map(np.concatenate, zip(*columns, strict=True))
        self._open: dict[int, int] = {}  # shard -> file descriptor, least recently used first

    def __len__(self) -> int:
        return len(self._row)

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

    def prefetch(self, shards: Sequence[int]) -> None:
        """Say that these shards are read next; returns at once."""
        self._folder.prefetch(shards)

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
        for _ in range(2):
            file = self._descriptor(shard)
            if apart:
                parts = [
                    _pread(file, size, start + offset)
                    for offset, size in zip(offsets, sizes, strict=True)
                ]
            else:
                data = _pread(file, length, start)
                parts = [data[o : o + size] for o, size in zip(offsets, sizes, strict=True)]
            checks = zip(self.keys, parts, sizes, crcs, strict=True)
            damaged = [
                k for k, part, size, crc in checks if len(part) != size or crc32(part) != crc
            ]
            if not damaged:
                return dict(zip(self.keys, parts, strict=True))
            if not self._folder.refetch(shard):
                break
            os.close(self._open.pop(shard))
        return ShardError(
            f"{self.describe(i)}, member {damaged[0]!r}: CRC-32 mismatch; the shard is damaged, "
            f"write it again."
        )

    def describe(self, i: int) -> str:
        """Shard and key of sample ``i``, for messages."""
        shard = int(np.searchsorted(self._ends, i, side="right"))
        return f"{self._names[shard]}: sample {self._indices[shard].key(int(self._row[i]))!r}"

    def close(self) -> None:
        """Close the files; a later read opens them again."""
        while self._open:
            os.close(self._open.popitem()[1])

    def _descriptor(self, shard: int) -> int:
        file = self._open.pop(shard, None)
        if file is None:
            if len(self._open) >= MAX_OPEN_FILES:
                os.close(self._open.pop(next(iter(self._open))))
            file = self._folder.open(shard)
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


def _columns(
    name: str, index: ShardIndex, rows: np.ndarray, keys: tuple[str, ...]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Offset, size and CRC of the required members of some samples, each (samples, K)."""
    if not len(index):
        raise ShardError(f"{name} holds no samples (members named <key>.<extension>).")
    for key in keys:
        column = index.extensions.index(key) if key in index.extensions else None
        absent = rows if column is None else rows[index.size[rows, column] < 0]
        if len(absent):
            sizes = index.size[absent[0]].tolist()
            present = [e for e, size in zip(index.extensions, sizes, strict=True) if size >= 0]
            raise ShardError(
                f"{name}: sample {index.key(absent[0])!r} has no member {key!r}, only {present}; "
                f"every sample needs {list(keys)}: name other keys or write the shard again."
            )
    chosen = np.ix_(rows, [index.extensions.index(key) for key in keys if len(rows)])
    offset, size = index.offset[chosen], index.size[chosen]
    if len(rows) and (offset.min() < 0 or (offset + size).max() > index.tar_bytes):
        raise ShardError(f"{name}: its index names bytes outside of it; write the shard again.")
    return offset, size, index.crc32[chosen]
