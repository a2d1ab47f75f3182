"""Reading a whole data set once, to say what is wrong with it before a run finds out.

Found are: tars that end early or have damaged headers; bytes that do not match the index; members
that no decoder accepts; samples without a member, or with a shape or dtype, that most others have;
samples whose content is there already; and a record that is damaged or of other files. What
training can leave out goes into the repair list.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from speed_engine.data.format.checksums import crc32
from speed_engine.data.format.decode import decode_image, decode_label
from speed_engine.data.format.errors import ShardError
from speed_engine.data.format.folder import LocalFolder
from speed_engine.data.format.forms import tars_of
from speed_engine.data.format.index import Samples, ShardIndex, index_path, load_index
from speed_engine.data.format.record import RECORD, refuse_incomplete
from speed_engine.data.format.repair import RepairList
from speed_engine.data.format.tar import scan_tar
from speed_engine.data.format.writer import each_shard

_DECODED = ("npy", "png", "jpg", "jpeg", "webp")  # what a sample's identity is made of


@dataclass
class SampleFacts:
    """One sample, as it was read."""

    kinds: dict[str, tuple[str, tuple[int, ...]]] = field(default_factory=dict)  # dtype and shape
    digest: bytes = b""  # of the arrays and pictures
    reason: str | None = None  # what is wrong with it


@dataclass
class ShardFacts:
    """One tar, as it was read."""

    name: str
    samples: dict[str, SampleFacts] = field(default_factory=dict)  # by key
    fatal: str | None = None  # why training cannot open it
    note: str | None = None  # what is wrong with it, although training can read it


@dataclass
class Findings:
    """What a check found.

    Attributes:
        num_samples: read, in all shards together.
        repair: shards and samples that training can leave out.
        notes: by shard, what deserves a new tar although its samples can be read; by the name of
            the record, how it differs from what is there.
    """

    num_samples: int
    repair: RepairList
    notes: dict[str, str]


def check_folder(folder: Path, keys: Sequence[str] = (), workers: int = 1) -> Findings:
    """Read everything once.

    Args:
        folder: holds the tars.
        keys: members that every sample must have; by default those that most have.
        workers: processes.

    Raises:
        FileNotFoundError: there are no shards.
        ShardError: their writer did not finish.
    """
    refuse_incomplete(folder)
    paths = tars_of(folder)
    shards = list(each_shard(check_shard, paths, workers))
    repair = RepairList(
        shards={shard.name: shard.fatal for shard in shards if shard.fatal},
        samples={shard.name: {} for shard in shards},
    )
    usual = _usual_kinds(shards, keys)
    seen: dict[bytes, str] = {}
    for shard in shards:
        for key, facts in shard.samples.items():
            reason = facts.reason or _unusual(facts, usual)
            first = seen.setdefault(facts.digest, f"{shard.name}: {key!r}") if not reason else ""
            if not reason and facts.digest and first != f"{shard.name}: {key!r}":
                reason = f"the content of {first} again"
            if reason:
                repair.samples[shard.name][key] = reason
    notes = {shard.name: shard.note for shard in shards if shard.note}
    if unlike := _unlike_record(folder, repair):
        notes[RECORD] = unlike
    return Findings(
        num_samples=sum(len(shard.samples) for shard in shards),
        repair=RepairList(repair.shards, {n: keys for n, keys in repair.samples.items() if keys}),
        notes=notes,
    )


def _unlike_record(folder: Path, repair: RepairList) -> str | None:
    """Why the record, if there is one, is not of the shards that can be opened and their files."""
    if not (folder / RECORD).exists() or len(repair.shards) == len(tars_of(folder)):
        return None
    recorded = LocalFolder(folder)
    try:
        dataset, _ = recorded.load(repair.shards)
        for name in dataset.files:
            recorded.read_file(name)
    except (ShardError, OSError) as error:
        return str(error)
    return None


def check_shard(path: Path) -> ShardFacts:
    """Everything about one tar that needs no other."""
    shard, index = ShardFacts(path.name), None
    try:
        index, _ = load_index(index_path(path))
        if path.stat().st_size != index.tar_bytes:
            shard.fatal = f"{path.stat().st_size} bytes; its index says {index.tar_bytes}"
    except FileNotFoundError:
        pass
    except ShardError as error:
        shard.fatal = str(error)
    try:
        scanned = scan_tar(path, lambda *member: _visit(shard, *member))
        if index is not None and not shard.fatal:
            _compare(shard, index, scanned)
    except ShardError as error:
        shard.samples = {}
        if index is None or shard.fatal:
            shard.fatal = shard.fatal or str(error)
        else:
            shard.note = f"{error} Its samples are read by its index."
            _read_by_index(shard, index, path)
    return shard


def _visit(shard: ShardFacts, key: str, extension: str, data: memoryview) -> None:
    facts = shard.samples.setdefault(key, SampleFacts())
    kind = extension.rpartition(".")[2]
    try:
        if kind == "cls":
            decode_label(data)
        elif kind in _DECODED:
            array = decode_image(data, extension, 3)  # grey pictures pass for colour, as in runs
            facts.kinds[extension] = str(array.dtype), array.shape
            content = hashlib.blake2b(facts.digest, digest_size=16)
            content.update(extension.encode() + b"\0")
            content.update(data)
            facts.digest = content.digest()
    except ValueError as error:
        facts.reason = facts.reason or f"{extension}: {error}"
    facts.kinds.setdefault(extension, ("", ()))


def _compare(shard: ShardFacts, index: ShardIndex, scanned: Samples) -> None:
    """Bytes that are a sound tar, yet not those that were indexed."""
    for key, members in index.members():
        facts = shard.samples.setdefault(key, SampleFacts())
        if scanned.get(key) != members:
            facts.reason = "CRC-32 mismatch with the index"


def _read_by_index(shard: ShardFacts, index: ShardIndex, path: Path) -> None:
    with path.open("rb") as file:
        for key, members in index.members():
            facts = shard.samples.setdefault(key, SampleFacts())
            for extension, (offset, size, expected) in members.items():
                data = os.pread(file.fileno(), size, offset)
                if crc32(data) != expected:
                    facts.reason = f"{extension}: CRC-32 mismatch with the index"
                else:
                    _visit(shard, key, extension, memoryview(data))


def _usual_kinds(shards: list[ShardFacts], keys: Sequence[str]) -> dict[str, Any]:
    """By extension that every sample should have: the most frequent dtype and shape."""
    counts: dict[str, Counter] = {}
    sound = [facts for shard in shards for facts in shard.samples.values() if not facts.reason]
    for facts in sound:
        for extension, kind in facts.kinds.items():
            counts.setdefault(extension, Counter())[kind] += 1
    wanted = keys or [e for e, kinds in counts.items() if 2 * kinds.total() > len(sound)]
    return {e: counts[e].most_common(1)[0][0] if e in counts else ("", ()) for e in wanted}


def _unusual(facts: SampleFacts, usual: dict[str, Any]) -> str | None:
    for extension, (dtype, shape) in usual.items():
        if extension not in facts.kinds:
            return f"no member {extension!r}, only {sorted(facts.kinds)}"
        if facts.kinds[extension] != (dtype, shape):
            found = facts.kinds[extension]
            return f"{extension}: {found[0]} of shape {found[1]}; most are {dtype} of shape {shape}"
    return None
