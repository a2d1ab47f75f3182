"""The index of a shard: where each member lies, what it holds, and checksums over all of it.

A safetensors file beside the tar, written after it, so that its presence says the tar is complete:

    key_bytes, key_ends     the sample keys, UTF-8, one after the other, and where each ends
    offset, size, crc32     (N, M) of member m of sample n in the tar; size is -1 where it is absent
    metadata["index"]       JSON: version, tar_bytes, sha256, extensions, contents, checksum

``sha256`` covers keys, extensions, sizes and CRCs: it is the identity of the content, whatever the
layout of the tar. ``checksum`` guards the index itself.

Letters: N samples, M extensions.
"""

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from speed_engine.data.format.errors import ShardError
from speed_engine.runtime import strict
from speed_engine.runtime.checks import UserError, check_between

VERSION = 2
MAX_PRESENT = 4096  # labels that are written down one by one


class Member(NamedTuple):
    """Where the bytes of one member lie in the tar, and their CRC-32."""

    offset: int
    size: int
    crc32: int


@dataclass(frozen=True, kw_only=True)
class Content:
    """What the members of one extension hold; None where there is no common value."""

    dtype: str | None = None
    shape: tuple[int, ...] | None = None
    classes: int | None = None
    present: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        numbers = [*(self.shape or ()), self.classes or 0, *(self.present or ())]
        if not all(0 <= number < 2**62 for number in numbers):
            raise UserError(f"{self}: sides and classes must lie in [0, 2^62).")
        if self.present is not None and self.classes is None:
            raise UserError(f"{self}: classes that are present need the number of classes.")


Samples = dict[str, dict[str, Member]]  # sample key -> extension -> member, in the tar's order
Contents = dict[str, dict[str, Any]]  # extension -> what ``decode.describe_member`` says of all


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """The members of one tar."""

    key_bytes: np.ndarray  # (bytes of all keys,) uint8
    key_ends: np.ndarray  # (N,) int64
    extensions: tuple[str, ...]  # (M,) sorted
    offset: np.ndarray  # (N, M) int64
    size: np.ndarray  # (N, M) int64
    crc32: np.ndarray  # (N, M) uint32
    tar_bytes: int
    contents: Contents

    @classmethod
    def of(cls, samples: Samples, tar_bytes: int, contents: Contents) -> "ShardIndex":
        """From what a scan or a writer collected."""
        extensions = tuple(
            sorted({extension for members in samples.values() for extension in members})
        )
        absent = (0, -1, 0)
        rows = [[members.get(e, absent) for e in extensions] for members in samples.values()]
        table = np.array(rows, dtype=np.int64).reshape(len(samples), len(extensions), 3)
        keys = [key.encode() for key in samples]
        return cls(
            key_bytes=np.frombuffer(b"".join(keys), dtype=np.uint8),
            key_ends=np.cumsum([len(key) for key in keys], dtype=np.int64),
            extensions=extensions,
            offset=np.ascontiguousarray(table[:, :, 0]),
            size=np.ascontiguousarray(table[:, :, 1]),
            crc32=table[:, :, 2].astype(np.uint32),
            tar_bytes=tar_bytes,
            contents=without_gaps(contents),
        )

    def __len__(self) -> int:
        return len(self.key_ends)

    def key(self, n: int) -> str:
        """The key of sample ``n``."""
        start = self.key_ends[n - 1] if n else 0
        return self.key_bytes[start : self.key_ends[n]].tobytes().decode()

    def members(self) -> Iterator[tuple[str, dict[str, Member]]]:
        """Key and members by extension, of every sample."""
        columns = (self.offset.tolist(), self.size.tolist(), self.crc32.tolist())
        for n, rows in enumerate(zip(*columns, strict=True)):
            places = zip(self.extensions, map(Member, *rows), strict=True)
            yield self.key(n), {name: member for name, member in places if member.size >= 0}

    def without(self, keys: Collection[str]) -> np.ndarray:
        """Numbers of the samples whose key is not among ``keys``, int64."""
        numbers = range(len(self))
        kept = [n for n in numbers if self.key(n) not in keys] if keys else numbers
        return np.array(kept, dtype=np.int64)

    def content_hash(self) -> str:
        """SHA-256 over the keys, extensions, sizes and CRCs, hexadecimal."""
        digest = hashlib.sha256(json.dumps(self.extensions).encode())
        for array in (self.key_ends, self.key_bytes, self.size, self.crc32):
            digest.update(array.data)
        return digest.hexdigest()

    def to_bytes(self) -> bytes:
        """The content of the index file."""
        header = {
            "version": VERSION,
            "tar_bytes": self.tar_bytes,
            "sha256": self.content_hash(),
            "extensions": self.extensions,
            "contents": self.contents,
        }
        header["checksum"] = self._checksum(header)
        arrays = {name: getattr(self, name) for name in _COLUMNS}
        return save(arrays, {"index": json.dumps(header, sort_keys=True)})

    def _checksum(self, header: Mapping[str, Any]) -> str:
        """Over the header, whose ``sha256`` covers the other columns, and the offsets."""
        digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
        digest.update(self.offset.data)
        return digest.hexdigest()


_COLUMNS = {"key_bytes": 1, "key_ends": 1, "offset": 2, "size": 2, "crc32": 2}  # and dimensions
_DTYPES = {"key_bytes": np.uint8, "crc32": np.uint32}  # others int64


def index_path(tar_path: Path) -> Path:
    """``digits-000000.tar`` -> ``digits-000000.index.safetensors``."""
    return tar_path.with_suffix(".index.safetensors")


def merge_member(contents: Contents, extension: str, description: dict[str, Any]) -> None:
    """Let ``contents`` say of ``extension`` what holds with one more member as well.

    Args:
        contents: of the members before; ``without_gaps`` of it is to be written down.
        extension: of the member.
        description: what ``decode.describe_member`` says of it.
    """
    if "classes" in description:
        description = {**description, "present": [description["classes"] - 1]}
    merge_description(contents, extension, description)


def merge_description(contents: Contents, extension: str, description: dict[str, Any]) -> None:
    """Let ``contents`` say of ``extension`` what holds with more members as well."""
    known = contents.get(extension)
    if known is None:
        contents[extension] = description
    elif known != description:
        merged = dict.fromkeys(
            name for name in known | description if known.get(name) != description.get(name)
        )
        counts = [entry.get("classes") for entry in (known, description)]
        if classes := [count for count in counts if count is not None]:
            merged["classes"] = max(classes)
            merged["present"] = _union(_present(known), _present(description))
        contents[extension] = known | merged


def without_gaps(contents: Contents) -> Contents:
    """The same, naming the classes that have samples only where some before the last have none."""
    return {
        extension: {
            name: value
            for name, value in facts.items()
            if name != "present" or (value is not None and len(value) < facts["classes"])
        }
        for extension, facts in contents.items()
    }


def _present(facts: dict[str, Any]) -> list[int] | None:
    """Sorted classes that have samples; None where they are too many to be written down."""
    if "present" in facts:
        return facts["present"]
    count = facts.get("classes") or 0
    return [*range(count)] if count <= MAX_PRESENT else None


def _union(known: list[int] | None, more: list[int] | None) -> list[int] | None:
    """Of two sorted lists."""
    if known is None or more is None:
        return None
    if len(more) == 1 and more[0] in known:  # one more sample: nearly always
        return known
    union = sorted({*known, *more})
    return union if len(union) <= MAX_PRESENT else None


def load_index(path: Path) -> tuple[ShardIndex, str]:
    """An index and its content hash.

    Raises:
        FileNotFoundError: there is none.
        ShardError: it is damaged; names it, the reason and a remedy.
    """
    try:
        with safe_open(path, framework="np") as file:
            header = json.loads((file.metadata() or {})["index"])
            columns = {name: file.get_tensor(name) for name in _COLUMNS}
        if header["version"] != VERSION:
            raise ShardError(
                f"{path} has version {header['version']!r}; this program reads {VERSION}. Delete "
                f"it and run `speed-engine shards index {path.parent}`."
            )
        checksum, sha256 = header.pop("checksum"), header["sha256"]
        index = ShardIndex(
            **columns,
            extensions=strict.read(tuple[str, ...], header["extensions"], "extensions"),
            tar_bytes=strict.read(int, header["tar_bytes"], "tar_bytes"),
            contents=header["contents"],
        )
        strict.read(dict[str, Content], index.contents, "contents")
        check_between("tar_bytes", index.tar_bytes, 0, 2**62)
        _check_shapes(columns, len(index.extensions))
        intact = index._checksum(header) == checksum and index.content_hash() == sha256
    except (FileNotFoundError, ShardError):
        raise
    # Whatever bytes provoke: an unreadable file, JSON of another structure or too deep.
    except (
        SafetensorError,
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RecursionError,
    ) as error:
        raise ShardError(f"{path} is not a shard index ({error!r}); {_remedy(path)}") from error
    if not intact:
        raise ShardError(f"{path} does not match its own checksum; {_remedy(path)}")
    return index, sha256


def _check_shapes(columns: Mapping[str, np.ndarray], num_extensions: int) -> None:
    num_samples = len(columns["key_ends"])
    for name, array in columns.items():
        if array.ndim != _COLUMNS[name] or array.dtype != _DTYPES.get(name, np.int64):
            raise UserError(f"{name} is {array.dtype} of shape {array.shape}")
        if array.ndim == 2 and array.shape != (num_samples, num_extensions):
            raise UserError(f"{name} has shape {array.shape}")
    ends, num_bytes = columns["key_ends"], len(columns["key_bytes"])
    if num_samples and not (ends[0] >= 0 and (np.diff(ends) >= 0).all() and ends[-1] == num_bytes):
        raise UserError(f"key_ends are not the ends of keys in {num_bytes} bytes")
    columns["key_bytes"].tobytes().decode()
    starts = ends[:-1]
    if (columns["key_bytes"][starts[starts < num_bytes]] & 0xC0 == 0x80).any():
        raise UserError("a key begins inside of a character")


def _remedy(path: Path) -> str:
    return f"if you trust the tar, delete it and run `speed-engine shards index {path.parent}`."
