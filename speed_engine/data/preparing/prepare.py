"""Shards from a source or from other shards: in parallel, and to be continued after a crash.

    OUT/preparation.json        the plan: what is being made of what, and how
    OUT/shard-000000.tar, ...   each a function of the plan and its number alone
    OUT/shard-000000.source     digest of the files that the shard was made of, written before it
    OUT/dataset.json            there when all shards are, see record.py

So whatever was killed is continued by running it again: shards that are complete stay, others are
written, and the result is the same to the byte. Any number of processes may work on one plan, each
on shards of its own.

Letters: N samples, S shards.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from speed_engine.data.format.record import RECORD
from speed_engine.data.format.writer import (
    begin,
    commit,
    is_complete,
    shard_name,
    shard_processes,
    write_shard,
)
from speed_engine.data.preparing.pictures import FORMATS, centre_crop, encode_picture, shrink
from speed_engine.data.preparing.source import Source
from speed_engine.runtime.checks import UserError, check
from speed_engine.runtime.files import write_durably

PLAN = "preparation.json"
_NAME = "preparation"
_READING_THREADS = 8
Members = dict[str, bytes]
_log = logging.getLogger(__name__)


class Preparation:
    """A folder that is being filled with shards.

    Args:
        out: the folder; new, empty, or of the same plan.
        plan: of JSON's types; equal plans make equal shards.
        names: (S,) file names of the shards.

    Raises:
        UserError: the folder is in use for something else; says for what.
    """

    def __init__(self, out: Path, plan: dict[str, Any], names: Sequence[str]) -> None:
        self._out, self._names = out, names
        out.mkdir(parents=True, exist_ok=True)
        text = json.dumps(plan, indent=1, sort_keys=True) + "\n"
        if (out / PLAN).exists():
            _check_same_plan(out / PLAN, json.loads(text))
        elif any(path.name != f"{PLAN}.tmp" for path in out.iterdir()):  # what a kill left
            raise UserError(f"{out} is not empty; choose another folder or delete it.")
        else:
            write_durably(out / PLAN, text.encode())
        if not (out / RECORD).exists():
            begin(out, _NAME)

    def pending(self) -> list[int]:
        """Numbers of the shards that are not complete."""
        return [s for s in range(len(self._names)) if not is_complete(self.path(s))]

    def path(self, shard: int) -> Path:
        """Of a shard's tar."""
        return self._out / self._names[shard]

    def finish(self, metadata: dict[str, Any], files: Sequence[str] = ()) -> None:
        """Make the folder a data set if every shard is complete; else another process will.

        Args:
            metadata: facts about the whole for ``dataset.json``.
            files: further ones beside the shards.
        """
        if not self.pending():
            try:
                commit(self._out, _NAME, metadata, (PLAN, *files))
            except FileNotFoundError:  # two processes may end at once and rename one file
                if not (self._out / RECORD).exists():
                    raise


def _check_same_plan(path: Path, plan: dict[str, Any]) -> None:
    try:
        there = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}); delete its folder.") from error
    if not isinstance(there, dict):
        raise UserError(f"{path} is no plan of a preparation; delete its folder.")
    if there != plan:
        other = {k: there.get(k) for k in sorted({*there, *plan}) if there.get(k) != plan.get(k)}
        asked = {k: plan.get(k) for k in other}
        raise UserError(
            f"{path.parent} holds a preparation with {other}, asked for is {asked}; choose another "
            f"folder, or delete it."
        )


@dataclass(frozen=True, kw_only=True)
class PictureOptions:
    """How pictures are stored.

    Attributes:
        size: side of the square they are cropped to; None keeps them, if all are of one shape.
        channels: 1 or 3.
        format: png, jpg, webp or npy.
        quality: of jpg and webp.
        low_size: side of a second, smaller picture of the same, for super-resolution.
        samples_per_shard: the last shard may hold fewer.

    Raises:
        UserError: a value out of range.
    """

    size: int | None = None
    channels: int = 3
    format: str = "png"
    quality: int = 95
    low_size: int | None = None
    samples_per_shard: int = 1000

    def __post_init__(self) -> None:
        check("size", self.size, self.size is None or 1 <= self.size <= 8192, "1 to 8192 pixels")
        check("channels", self.channels, self.channels in (1, 3), "1 or 3")
        check("format", self.format, self.format in FORMATS, f"one of {', '.join(FORMATS)}")
        check("quality", self.quality, 1 <= self.quality <= 100, "1 to 100")
        count = self.samples_per_shard
        check("samples_per_shard", count, 1 <= count <= 10**6, "1 to 1,000,000")
        if self.low_size is not None:
            fits = self.size is not None and 1 <= self.low_size < self.size
            valid = fits and not (self.size or 0) % self.low_size
            check("low_size", self.low_size, valid, f"a divisor of size={self.size} below it")


def make(
    source: Source,
    out: Path,
    options: PictureOptions,
    *,
    workers: int,
    skip_bad: bool = False,
    advance: Callable[[int], object] = lambda samples: None,
) -> None:
    """Write a source as shards, its samples in an order that mixes them.

    Args:
        source: what to write.
        out: folder, new, empty or of the same preparation, which is continued.
        options: how to write it.
        workers: processes.
        skip_bad: leave unusable pictures out, each with a warning, instead of stopping there.
        advance: called with the number of samples whenever a shard is there.

    Raises:
        UserError: a picture is unusable, with ``skip_bad`` every one; or the folder is.
        OSError: the disk is full, for example; the folder can be continued.
        ChildProcessError: a worker was killed; likewise.
    """
    check("workers", workers, workers >= 1, "1 or more")
    size = _size_of_all(source, options, skip_bad)
    order, step = mixed_order(len(source)), options.samples_per_shard
    numbers = [order[start : start + step] for start in range(0, len(order), step)]
    names = [shard_name("shard", s) for s in range(len(numbers))]
    plan = {"source": source.identity, "size": list(size), "samples": len(source)}
    preparation = Preparation(out, {**asdict(options), **plan}, names)
    pending = preparation.pending()
    _refuse_changed(source, preparation, numbers, set(range(len(names))).difference(pending))
    advance(sum(len(numbers[s]) for s in set(range(len(names))).difference(pending)))
    tasks = [(preparation.path(s), numbers[s]) for s in pending]
    for path, bad in _in_processes(tasks, source, options, size, skip_bad, workers):
        for message in bad:
            _log.warning("left out: %s", message)
        advance(next(len(n) for p, n in tasks if p == path))
    classes = {"classes": list(source.classes)} if source.classes else {}
    preparation.finish({**classes, **source.metadata})


def _refuse_changed(
    source: Source, preparation: Preparation, numbers: list[np.ndarray], complete: set[int]
) -> None:
    """Raises UserError if a file of a shard that is there already has another content now."""
    with ThreadPoolExecutor(_READING_THREADS) as threads:
        for shard in sorted(complete):
            known = _source_file(preparation.path(shard))
            if known.exists() and known.read_text() != _content(
                source, numbers[shard], threads.map
            ):
                raise UserError(
                    f"files of the source have changed since {preparation.path(shard)} was made of "
                    f"them; delete the folder to prepare all anew, or put the files back."
                )


def _content(source: Source, numbers: np.ndarray, mapped: Callable[..., Iterator[bytes]]) -> str:
    """Digest of the stored bytes of these samples, hexadecimal; "" if the plan covers them."""
    contents = [*mapped(source.content, numbers.tolist())]
    lengths = ",".join(str(len(content)) for content in contents)
    return (
        hashlib.sha256(lengths.encode() + b"".join(contents)).hexdigest() if any(contents) else ""
    )


def _source_file(shard: Path) -> Path:
    return shard.with_suffix(".source")


def mixed_order(count: int) -> np.ndarray:
    """(count,) int64, a fixed permutation: sources list class after class, shards mix them.

    By the finaliser of SplitMix64 (Steele, Lea and Flood 2014).
    """
    x = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.argsort(x ^ (x >> np.uint64(31)), kind="stable")


def _size_of_all(source: Source, options: PictureOptions, skip_bad: bool) -> tuple[int, int]:
    """(width, height), by the first usable picture; an unfit source fails here, before any work."""
    for i in range(len(source)):
        try:
            picture = source.read(i, options.channels).picture
        except (ValueError, OSError) as error:
            if not skip_bad:
                raise _unusable(source.name(i), error) from error
        else:
            return (options.size, options.size) if options.size else picture.size
    raise UserError(f"of the {len(source)} samples of the source, none is usable.")


def _unusable(name: str, error: Exception) -> UserError:
    reason = str(error).rstrip(".")
    return UserError(f"{name}: {reason}. Mend it, or leave out all such pictures by --skip-bad.")


def _in_processes(
    tasks: list[tuple[Path, np.ndarray]],
    source: Source,
    options: PictureOptions,
    size: tuple[int, int],
    skip_bad: bool,
    workers: int,
) -> Iterator[tuple[Path, list[str]]]:
    """Each shard's path and its bad samples, as it is completed."""
    count = min(workers, max(len(tasks), 1))
    with shard_processes(count, _start_worker, source, options, size, skip_bad) as pool:
        futures = [pool.submit(_make_shard, path, numbers) for path, numbers in tasks]
        for future in as_completed(futures):
            yield future.result()


_worker: tuple[Source, PictureOptions, tuple[int, int], bool]  # of this process


def _start_worker(*setup: Any) -> None:
    global _worker
    _worker = setup  # type: ignore[assignment]


def _make_shard(path: Path, numbers: np.ndarray) -> tuple[Path, list[str]]:
    source, options, size, skip_bad = _worker
    bad: list[str] = []

    def samples() -> Iterator[tuple[str, Members]]:
        for number in numbers.tolist():
            try:
                yield f"{number:07d}", _members(source, number, options, size)
            except (ValueError, OSError) as error:
                if not skip_bad:
                    raise _unusable(source.name(number), error) from error
                bad.append(f"{source.name(number)}: {error}")

    if content := _content(source, numbers, map):
        write_durably(_source_file(path), content.encode())
    write_shard(path, samples())
    return path, bad


def _members(
    source: Source, number: int, options: PictureOptions, size: tuple[int, int]
) -> Members:
    picture, label, captions = source.read(number, options.channels)
    if options.size is not None:
        picture = centre_crop(picture, options.size)
    elif picture.size != size:
        shape, first = ("{} x {}".format(*of) for of in (picture.size, size))
        raise UserError(
            f"it has {shape} pixels, the first picture has {first}; --size 64 crops all to 64 x 64"
        )
    members = {options.format: encode_picture(picture, options.format, options.quality)}
    if options.low_size is not None:
        kind = "npy" if options.format == "npy" else "png"
        low = shrink(picture, options.low_size)
        members[f"low.{kind}"] = encode_picture(low, kind, options.quality)
    if label is not None:
        members["cls"] = str(label).encode()
    if captions:
        members["txt"] = "\n".join(captions).encode()
    return members
