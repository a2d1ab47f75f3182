"""``dataset.json``: which shards make up a data set, and what is true of all of them.

    {"version": 2, "shards": [{"name", "bytes", "samples", "sha256"}, ...],
     "contents": {"npy": {"dtype": "uint8", "shape": [1, 8, 8]}, "cls": {"classes": 10}},
     "metadata": {"latent_scale": 0.18215, ...},
     "files": {"null_tokens.npy": {"bytes", "sha256"}},
     "checksum": SHA-256 of the rest}

It is the commit record of the whole: written last, when every shard is on disk with its index. What
holds of no common value (shapes that differ) is null. While a writer is at work, and after it was
killed, a file ``NAME.incomplete`` lies there instead and readers refuse the folder.
"""

import hashlib
import json
import re
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from speed_engine.data.format import document
from speed_engine.data.format.errors import ShardError
from speed_engine.data.format.index import (
    VERSION,
    Content,
    Contents,
    ShardIndex,
    merge_description,
    without_gaps,
)
from speed_engine.runtime.checks import shortened

RECORD = "dataset.json"
_PLAIN_NAME = re.compile(r"[^/\\\0.][^/\\\0]*")


@dataclass(frozen=True)
class ShardRecord:
    """One tar."""

    name: str
    bytes: int
    samples: int
    sha256: str  # of the content, see index.py

    def __post_init__(self) -> None:
        document.check_count("bytes", self.bytes)
        document.check_count("samples", self.samples)


@dataclass(frozen=True)
class FileRecord:
    """One file beside the shards."""

    bytes: int
    sha256: str

    def __post_init__(self) -> None:
        document.check_count("bytes", self.bytes)


@dataclass(frozen=True)
class Dataset:
    """The record of a complete data set."""

    shards: tuple[ShardRecord, ...]
    contents: Contents = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    files: dict[str, FileRecord] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the content of all shards, hexadecimal."""
        hashes = "".join(shard.sha256 for shard in self.shards)
        return hashlib.sha256(hashes.encode()).hexdigest()

    def without(self, names: Collection[str]) -> "Dataset":
        """The record of the other shards."""
        return replace(self, shards=tuple(s for s in self.shards if s.name not in names))

    def to_json(self) -> str:
        """The content of ``dataset.json``."""
        record = {"version": VERSION, **asdict(self)}
        return json.dumps({**record, "checksum": _checksum(record)}, indent=1) + "\n"


def dataset_from_json(data: bytes, source: str) -> Dataset:
    """Inverse of ``Dataset.to_json``.

    Args:
        data: content of the file.
        source: its name, for messages.

    Raises:
        ShardError: damaged, of another version, or naming files outside its folder.
    """
    remedy = (
        "delete it and run `speed-engine shards index` on the folder; facts like a latent scale "
        "must be given again."
    )
    record = document.parse(data, source, remedy)
    read = lambda kind, name: document.field(kind, record, name, source, remedy)
    if (version := read(int, "version")) != VERSION:
        raise ShardError(f"{source} has version {version}; this program reads {VERSION}; {remedy}")
    checksum = read(str, "checksum")
    intact = checksum == _checksum({n: v for n, v in record.items() if n != "checksum"})
    read(dict[str, Content], "contents")
    dataset = Dataset(
        shards=read(tuple[ShardRecord, ...], "shards"),
        contents=record["contents"],
        metadata=checked_metadata(read(dict[str, Any], "metadata"), source, remedy),
        files=read(dict[str, FileRecord], "files"),
    )
    names = [shard.name for shard in dataset.shards] + list(dataset.files)
    foreign = [name for name in names if not _PLAIN_NAME.fullmatch(name)]
    foreign += [shard.name for shard in dataset.shards if not shard.name.endswith(".tar")]
    if not intact:
        raise ShardError(f"{source} does not match its own checksum; {remedy}")
    if foreign:
        raise ShardError(f"{source} names what is no shard beside it: {foreign[:3]}.")
    return dataset


def read_record(path: Path) -> bytes:
    """The content of a local ``dataset.json``, see ``document.read_file``."""
    return document.read_file(path)


def checked_metadata(metadata: dict[str, Any], source: str, remedy: str) -> dict[str, Any]:
    """Facts about the whole, of which those that are used here are of the right kind.

    Args:
        metadata: an object of JSON.
        source: its name, for messages.
        remedy: what to do about one that does not fit.

    Raises:
        ShardError: ``classes`` are no names, or the scale or shift of latents no numbers.
    """
    needs = {
        "classes": ("a list of names", _is_list_of_names),
        "latent_scale": ("a number that is not zero", lambda v: _is_number(v) and v != 0),
        "latent_shift": ("a number", _is_number),
    }
    for name, (need, fits) in needs.items():
        if name in metadata and not fits(metadata[name]):
            raise ShardError(
                f"{source}: metadata.{name}={shortened(metadata[name])}: needed is {need}; {remedy}"
            )
    return metadata


def _is_list_of_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _is_number(value: Any) -> bool:
    # Integers may be larger than any float; of NaN the comparison is false.
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def dataset_of(shards: Iterable[tuple[str, tuple[ShardIndex, str]]]) -> Dataset:
    """Of the names of tars, with the index and the content hash of each."""
    records, contents = [], {}
    for name, (index, sha256) in shards:
        records.append(ShardRecord(name, index.tar_bytes, len(index), sha256))
        for extension, description in index.contents.items():
            merge_description(contents, extension, description)
    return Dataset(tuple(records), without_gaps(contents))


def refuse_incomplete(folder: Path) -> None:
    """Raises ShardError if a writer is at work in the folder or was killed."""
    if markers := sorted(folder.glob("*.incomplete")):
        raise ShardError(
            f"{markers[0]} marks a data set whose writer did not finish; run what made it again, "
            f"or delete its shards and the marker."
        )


def file_record(data: bytes) -> FileRecord:
    """Of a file's content."""
    return FileRecord(len(data), hashlib.sha256(data).hexdigest())


def verified(dataset: Dataset, name: str, where: str, read: Callable[[], bytes]) -> bytes:
    """A file beside the shards; raises ShardError unless it is the recorded one."""
    if name not in dataset.files:
        raise ShardError(f"{where} is not among the recorded files {sorted(dataset.files)}.")
    data = read()
    if dataset.files[name] != file_record(data):
        raise ShardError(f"{where} is not the recorded file; put it back, or make it again.")
    return data


def _checksum(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
