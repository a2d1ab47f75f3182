"""Reading shards: random access to verified samples, by number.

The samples are numbered through the shards in the order of their names. Where each lies is held in
arrays, which forked workers share; the tars are opened when first needed. Nothing here unpickles or
runs a command, and no name from inside a tar is ever opened.

Letters: N samples, K keys.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import numpy as np

from speed_engine.data.format.checksums import crc32
from speed_engine.data.format.decode import MAX_MEMBER
from speed_engine.data.format.errors import ShardError
from speed_engine.data.format.folder import open_folder
from speed_engine.data.format.held_out import Part, in_part, part_fingerprint
from speed_engine.data.format.index import ShardIndex
from speed_engine.data.format.remote import Cache
from speed_engine.data.format.repair import RepairList, load_repair_list

MAX_OPEN_FILES = 64
_WASTE = 2**16  # bytes between the members of a sample that are read along rather than left out
_ALIGNMENT = 64  # of the rows of a batch in memory

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
        held_out: share of the samples that is not trained on, see held_out.py; 0 splits nothing.
        part: which of the two parts to read; None reads both.

    Attributes:
        keys: as given.
        dataset: the record of the data set.
        counts: samples per shard.
        fingerprint: SHA-256 of the content of the data set, of what is excluded, and of the part.

    Raises:
        FileNotFoundError: no such folder, or no shards in it.
        ShardError: shards, indices and record are not of each other, or none of them is
            left; names the file and a remedy.
    """

    def __init__(
        self,
        source: str | Path,
        keys: Sequence[str] = ("npy", "cls"),
        cache: Cache | None = None,
        exclude: Path | None = None,
        held_out: float = 0.0,
        part: Part | None = None,
    ) -> None:
        self.keys = tuple(keys)
        self._held_out = held_out
        self._part: Part | None = part if held_out else None
        excluded = load_repair_list(exclude) if exclude else RepairList()
        self._folder = open_folder(source, cache)
        self._excluded = {
            self._folder.describe(name): frozenset(keys) for name, keys in excluded.samples.items()
        }
        self.dataset, self._indices = self._folder.load(excluded.shards)
        self.fingerprint = excluded.fingerprint(self.dataset)
        if self._part is not None:
            self.fingerprint = part_fingerprint(self.fingerprint, held_out, self._part)
        self._names = [self._folder.describe(shard.name) for shard in self.dataset.shards]
        kept = [
            index.without(excluded.samples.get(shard.name, {}))
            for shard, index in zip(self.dataset.shards, self._indices, strict=True)
        ]
        kept = [self._of_part(index, rows) for index, rows in zip(self._indices, kept, strict=True)]
        columns = [
            _columns(name, index, rows, self.keys)
            for name, index, rows in zip(self._names, self._indices, kept, strict=True)
        ]
        self.counts = tuple(map(len, kept))
        if not sum(self.counts):
            raise ShardError(self._nothing(source, exclude))
        self._ends = np.array(list(accumulate(self.counts)))
        # Arrays, not objects: a million objects would be copied page by page into every worker.
        self._row = np.concatenate(kept)  # (N,) number in the shard
        self._offset, self._size, self._crc32 = map(np.concatenate, zip(*columns, strict=True))
        self._memory = bytearray()  # of one sample at a time
        self._open: dict[int, int] = {}  # shard -> file descriptor, the oldest first

    def __len__(self) -> int:
        return len(self._row)

    def read(self, i: int) -> dict[str, bytes]:
        """Members of sample ``i`` by extension.

        Raises:
            ShardError: the bytes are not those that were written; names shard, sample and member.
            OSError: the shard cannot be read.
        """
        (sample,) = self.stream([i])
        if isinstance(sample, ShardError):
            raise sample
        return {key: bytes(data) for key, data in sample.items()}

    def stream(self, samples: Sequence[int] | np.ndarray) -> Iterator[Sample | ShardError]:
        """Members of many samples, one after the other, in memory that the next one reuses.

        In the place of a damaged sample comes what is wrong with it.

        Raises:
            OSError: a shard cannot be read.
        """
        places = self._places(samples, stride=0)
        if places.extent > len(self._memory):  # in the processor's cache from the second use on
            self._memory = bytearray(2 * places.extent)
        memory = memoryview(self._memory)
        for place in places.rows:
            parts = self._read(*place, memory)
            yield (
                parts if isinstance(parts, ShardError) else dict(zip(self.keys, parts, strict=True))
            )

    def read_batch(
        self,
        samples: Sequence[int] | np.ndarray,
        allocate: Callable[[int], np.ndarray],
        limit: int | None = None,
    ) -> "RawBatch | None":
        """Members of many samples, each in a row of memory of its own; None beyond ``limit`` bytes.

        Args:
            samples: B numbers.
            allocate: bytes -> memory of that size.
            limit: of bytes; None reads any number.

        Raises:
            OSError: a shard cannot be read.
        """
        places = self._places(samples, stride=1)
        num_bytes = len(places.offset) * places.extent
        if limit is not None and num_bytes > limit:
            return None
        memory = allocate(num_bytes)
        flat = memory.data
        rows = [self._read(*place, flat) for place in places.rows]
        memory = memory.reshape(len(rows), places.extent)
        return RawBatch(self.keys, rows, memory, places.offset, places.size)

    def _places(self, samples: Sequence[int] | np.ndarray, stride: int) -> "_Places":
        """Where samples lie, and where they go: row after row, or each (stride 0) to the first."""
        numbers = np.asarray(samples, dtype=np.int64)
        outside = numbers[(numbers < 0) | (numbers >= len(self))]
        if len(outside):
            raise IndexError(f"sample {outside[0]} of {len(self)}.")
        shards = np.searchsorted(self._ends, numbers, side="right")
        offset, size = self._offset[numbers], self._size[numbers]
        start = offset.min(axis=1, keepdims=True)
        length = (offset + size).max(axis=1, keepdims=True) - start
        if (length[:, 0] <= size.sum(axis=1) + _WASTE).all():  # one read, with what lies between
            begin, relative, extents = np.zeros_like(start), offset - start, length
        else:
            start, length = offset, size
            begin = relative = size.cumsum(axis=1) - size
            extents = size.sum(axis=1)
        extent = -(-int(extents.max(initial=0)) // _ALIGNMENT) * _ALIGNMENT
        row = np.arange(len(numbers))[:, None] * extent * stride
        reads = np.stack([start, row + begin, row + begin + length], axis=2)
        members = np.stack([row + relative, row + relative + size, self._crc32[numbers]], axis=2)
        rows = zip(numbers.tolist(), shards.tolist(), reads.tolist(), members.tolist(), strict=True)
        return _Places(rows, extent, relative, size)

    def _read(
        self,
        number: int,
        shard: int,
        reads: list[list[int]],
        members: list[list[int]],
        memory: memoryview,
    ) -> list[memoryview] | ShardError:
        """Members of one sample, a second time where the shard can be had elsewhere."""
        if parts := self._fill(shard, reads, members, memory):
            return parts
        if self._folder.refetch(shard):
            os.close(self._open.pop(shard))
            if parts := self._fill(shard, reads, members, memory):
                return parts
        return ShardError(
            f"{self.describe(number)}: CRC-32 mismatch in its members {list(self.keys)}; the shard "
            f"is damaged, write it again."
        )

    def _fill(
        self, shard: int, reads: list[list[int]], members: list[list[int]], memory: memoryview
    ) -> list[memoryview] | None:
        """The members, put into ``memory``; None unless all bytes match their checksums."""
        file = self._open.get(shard)
        if file is None:
            file = self._descriptor(shard)
        for start, begin, end in reads:
            if os.preadv(file, (memory[begin:end],), start) != end - begin:
                return None
        parts = []
        for begin, end, expected in members:
            part = memory[begin:end]
            if crc32(part) != expected:
                return None
            parts.append(part)
        return parts

    def prefetch(self, shards: Sequence[int]) -> None:
        """Say that these shards are read next; returns at once."""
        self._folder.prefetch(shards)

    def open_shard(self, shard: int) -> tuple[str, int]:
        """Name and file descriptor of a whole shard, which the caller closes."""
        return self._names[shard], self._folder.open(shard)

    def read_file(self, name: str) -> bytes:
        """A file of the data set's record beside the shards, verified.

        Raises:
            ShardError: it is not in the record, or not what the record says.
        """
        return self._folder.read_file(name)

    def describe(self, i: int) -> str:
        """Shard and key of sample ``i``, for messages."""
        shard = int(np.searchsorted(self._ends, i, side="right"))
        return f"{self._names[shard]}: sample {self.key(i)!r}"

    def key(self, i: int) -> str:
        """Of sample ``i``."""
        shard = int(np.searchsorted(self._ends, i, side="right"))
        return self._indices[shard].key(int(self._row[i]))

    def takes(self, shard: str, key: str) -> bool:
        """Whether a sample, by the name of its shard, is not excluded and of the part read."""
        if key in self._excluded.get(shard, ()):
            return False
        return self._part is None or bool(in_part([key], self._held_out, self._part)[0])

    def close(self) -> None:
        """Close the files, and fetch none ahead; a later read opens them again."""
        self._folder.close()
        while self._open:
            os.close(self._open.popitem()[1])

    def _nothing(self, source: str | Path, exclude: Path | None) -> str:
        if not any(map(len, self._indices)) and (self._indices or exclude is None):
            return f"{source} holds no samples (members named <key>.<extension>)."
        if self._part is None or not self._indices:
            return f"{exclude} leaves nothing of {source}."
        return (
            f"data.held_out={self._held_out} leaves no samples for the {self._part} part of "
            f"{source}; choose another share, or 0 to train on all."
        )

    def _of_part(self, index: ShardIndex, rows: np.ndarray) -> np.ndarray:
        if self._part is None:
            return rows
        return rows[in_part(map(index.key, rows.tolist()), self._held_out, self._part)]

    def _descriptor(self, shard: int) -> int:
        if len(self._open) >= MAX_OPEN_FILES:
            os.close(self._open.pop(next(iter(self._open))))
        self._open[shard] = self._folder.open(shard)
        return self._open[shard]

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_open": {}, "_memory": bytearray()}

    def __del__(self) -> None:
        if hasattr(self, "_open"):  # absent if construction failed
            self.close()


class RawBatch(NamedTuple):
    """Samples in memory, verified and not decoded.

    Letters: B samples, L bytes at most of one, K keys.
    """

    keys: tuple[str, ...]
    rows: list[list[memoryview] | ShardError]  # (B, K) members, or what is wrong with a sample
    memory: np.ndarray  # (B, L) uint8, in which they lie
    offset: np.ndarray  # (B, K) of each member in its row
    size: np.ndarray  # (B, K)

    def sample(self, place: int) -> Sample | ShardError:
        """Its members, or what is wrong with it."""
        row = self.rows[place]
        return row if isinstance(row, ShardError) else dict(zip(self.keys, row, strict=True))

    def members(self, k: int) -> list[memoryview] | None:
        """The k-th of every sample; None if one is damaged."""
        parts = [row[k] for row in self.rows if not isinstance(row, ShardError)]
        return parts if len(parts) == len(self.rows) else None

    def member_rows(self, k: int) -> np.ndarray | None:
        """(B, size) uint8 of the k-th key; None if it is not in the same place of every row."""
        offset, size = int(self.offset[0, k]), int(self.size[0, k])
        if (self.offset[:, k] != offset).any() or (self.size[:, k] != size).any():
            return None
        return self.memory[:, offset : offset + size]


class _Places(NamedTuple):
    """Where samples lie in their shards, and where in memory they go."""

    # Per sample: its number, shard, [(start in the shard, begin and end in memory)], [(begin and
    # end in memory, CRC)].
    rows: Iterator[tuple[int, int, list[list[int]], list[list[int]]]]
    extent: int  # bytes of memory of one sample
    offset: np.ndarray  # (B, K) of the members in their row
    size: np.ndarray  # (B, K)


def _columns(
    name: str, index: ShardIndex, rows: np.ndarray, keys: tuple[str, ...]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Offset, size and CRC of the required members of some samples, each (samples, K)."""
    if not len(rows):  # the shard is empty, or all are excluded
        none = np.empty((0, len(keys)), dtype=np.int64)
        return none, none, none.astype(np.uint32)
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
    columns = [index.extensions.index(key) for key in keys]
    offset, size = index.offset[rows][:, columns], index.size[rows][:, columns]
    if size.max(initial=0) > MAX_MEMBER:
        n, k = np.unravel_index(size.argmax(), size.shape)
        raise ShardError(
            f"{name}: sample {index.key(rows[n])!r}: its member {keys[k]!r} has {size[n, k]:,} "
            f"bytes; at most {MAX_MEMBER:,} are read."
        )
    # Each by itself first: their sum could pass the largest integer.
    if not (
        0 <= offset.min() <= offset.max() <= index.tar_bytes
        and size.max() <= index.tar_bytes
        and (offset + size).max() <= index.tar_bytes
    ):
        raise ShardError(f"{name}: its index names bytes outside of it; write the shard again.")
    return offset, size, index.crc32[rows][:, columns]
