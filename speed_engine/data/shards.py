"""Shards: plain WebDataset tars, each with an index that makes it seekable and verifiable.

    digits-000000.tar           members <key>.<extension>, all of one sample adjacent
    digits-000000.index.json    where the members lie and their checksums, see index.py
    digits.incomplete           there while a writer is at work, or after it was killed

The tar is durable before its index, the index before the next shard; the reader refuses a folder
with an ``.incomplete`` marker, so a killed writer leaves nothing that could pass for a data set.
Tars of other tools have no index: theirs is built in memory by a strict scan. Nothing here
unpickles, opens a URL or runs a command.
"""

import hashlib
import os
import re
import tarfile
import zlib
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Self

import numpy as np

from speed_engine.data.index import index_path, index_to_json, load_index
from speed_engine.data.tarscan import BLOCK, Member, Samples, ShardError

MAX_OPEN_FILES = 64
_KEY = re.compile(r"[^\W_][^.\0]*")
_EXTENSION = re.compile(r"[a-z0-9][a-z0-9_.]*")


class ShardWriter:
    """Writes a data set; ``with ShardWriter(...) as writer: writer.write(key, members)``.

    Args:
        folder: created if missing.
        prefix: shards are ``<prefix>-000000.tar`` and so on; must be unused in the folder.
        samples_per_shard: the last shard may hold fewer.

    A shard is kept in memory until it is full. Equal samples give equal bytes: owner, mode and time
    of every member are fixed.
    """

    def __init__(self, folder: str | Path, prefix: str, samples_per_shard: int) -> None:
        if samples_per_shard < 1:
            raise ValueError(f"samples_per_shard={samples_per_shard} must be at least 1.")
        self._folder, self._prefix, self._limit = Path(folder), prefix, samples_per_shard
        self._folder.mkdir(parents=True, exist_ok=True)
        if used := sorted(self._folder.glob(f"{prefix}-*.tar")):
            raise FileExistsError(f"{used[0]} exists; choose another folder or prefix.")
        self._marker = self._folder / f"{prefix}.incomplete"
        self._marker.touch()
        _sync(self._folder)
        self._tar = bytearray()
        self._samples: Samples = {}
        self._shard = 0

    def write(self, key: str, members: dict[str, bytes]) -> None:
        """Append one sample.

        Raises:
            ValueError: the key is there already, or could not be read back as it is.
        """
        readable = _KEY.fullmatch(key) and all(map(_EXTENSION.fullmatch, members))
        if not readable or not members or key in self._samples:
            raise ValueError(
                f"key {key!r} with members {sorted(members)}: a key must be new, begin with a "
                f"letter or digit and have no dot; extensions, at least one, are lower case; "
                f"for example '000123' with ['cls', 'npy']."
            )
        self._samples[key] = {
            extension: self._append(f"{key}.{extension}", data)
            for extension, data in sorted(members.items())
        }
        if len(self._samples) == self._limit:
            self._commit()

    def _append(self, name: str, data: bytes) -> Member:
        info = tarfile.TarInfo(name)  # mode 0644; owner and time are zero
        info.size = len(data)
        self._tar += info.tobuf(tarfile.USTAR_FORMAT, "utf-8")
        offset = len(self._tar)
        self._tar += data + bytes(-len(data) % BLOCK)
        return Member(offset, len(data), zlib.crc32(data))

    def _commit(self) -> None:
        self._tar += bytes(2 * BLOCK)
        path = self._folder / f"{self._prefix}-{self._shard:06d}.tar"
        _write_durably(path, self._tar)
        _write_durably(index_path(path), index_to_json(self._samples, len(self._tar)))
        self._tar, self._samples = bytearray(), {}
        self._shard += 1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, exception_type: object, *_: object) -> None:
        """Complete the data set; after an exception it stays marked as incomplete."""
        if exception_type is None:
            if self._samples:
                self._commit()
            self._marker.unlink()
            _sync(self._folder)


class ShardReader:
    """Random access to the samples of all shards in a folder, in the order of their names.

    Reads are verified and hold no file position, so that forked processes may share a reader;
    a pickled one opens its files anew. Threads may not share one.

    Args:
        folder: holds ``*.tar``.
        keys: the members that every sample must have and ``read`` returns: image, then label.

    Attributes:
        keys: as given.
        counts: samples per shard.
        fingerprint: SHA-256 of the content of the data set.
    """

    def __init__(self, folder: str | Path, keys: Sequence[str] = ("npy", "cls")) -> None:
        self.keys = tuple(keys)
        self._paths = _shard_paths(Path(folder))
        hashes, sample_keys, members = [], [], []
        for path in self._paths:
            samples, sha256 = load_index(path)
            hashes.append(sha256)
            sample_keys.append(np.array([key.encode() for key in samples]))
            members.append(_required_members(path, samples, self.keys))
        self.counts = tuple(len(m) for m in members)
        self.fingerprint = hashlib.sha256("".join(hashes).encode()).hexdigest()
        self._ends = list(accumulate(self.counts))
        # Arrays, not objects: a million objects would be copied page by page into every worker.
        self._sample_keys = np.concatenate(sample_keys)  # (N,) bytes
        self._members = np.concatenate(members)  # (N, keys, 3) int64: offset, size, crc32
        self._open: dict[int, int] = {}  # shard -> file descriptor, least recently used first

    def __len__(self) -> int:
        return self._ends[-1]

    def read(self, i: int) -> dict[str, bytes]:
        """Members of sample ``i`` by extension.

        Raises:
            ShardError: the bytes are not those that were written; names shard, sample and member.
        """
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)}.")
        file = self._descriptor(bisect_right(self._ends, i))
        sample = {}
        for key, (offset, size, crc32) in zip(self.keys, self._members[i].tolist(), strict=True):
            data = os.pread(file, size, offset)
            if len(data) != size or zlib.crc32(data) != crc32:
                raise ShardError(
                    f"{self.describe(i)}, member {key!r}: CRC-32 mismatch in the {size} bytes at "
                    f"{offset}; the shard is damaged, write it again."
                )
            sample[key] = data
        return sample

    def describe(self, i: int) -> str:
        """Shard and key of sample ``i``, for messages."""
        path = self._paths[bisect_right(self._ends, i)]
        return f"{path}: sample {self._sample_keys[i].decode()!r}"

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


def _shard_paths(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise FileNotFoundError(f"data folder {folder} does not exist; check the path.")
    if markers := sorted(folder.glob("*.incomplete")):
        raise ShardError(
            f"{markers[0]} marks a data set whose writer did not finish; delete its shards and the "
            f"marker, and write it again."
        )
    if not (paths := sorted(folder.glob("*.tar"))):
        raise FileNotFoundError(
            f"{folder} holds no .tar shards; write some with speed_engine.data.shards.ShardWriter "
            f"or any WebDataset tool."
        )
    return paths


def _required_members(path: Path, samples: Samples, keys: tuple[str, ...]) -> np.ndarray:
    """(samples, keys, 3) int64: offset, size, crc32."""
    if not samples:
        raise ShardError(f"{path} holds no samples (members named <key>.<extension>).")
    for sample_key, members in samples.items():
        for key in keys:
            if key not in members:
                raise ShardError(
                    f"{path}: sample {sample_key!r} has no member {key!r}, only {sorted(members)}; "
                    f"every sample needs {list(keys)}: name other keys or write the shard again."
                )
    table = np.array([[m[key] for key in keys] for m in samples.values()], dtype=np.int64)
    if table.min() < 0 or table[:, :, :2].sum(axis=2).max() > path.stat().st_size:
        raise ShardError(f"{path}: its index names bytes outside of it; write the shard again.")
    return table


def _write_durably(path: Path, data: bytes | bytearray) -> None:
    """Under its final name the file is complete and on disk, or it is not there at all."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
    _sync(path.parent)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
