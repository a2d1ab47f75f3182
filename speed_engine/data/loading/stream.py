"""Plain webdataset streaming: shards in random order, read from end to end, and a shuffle buffer.

What it costs: every rank and worker draws its own shards, so the sequence of images depends on
their number, an epoch may leave out images and repeat others, and a resumed run sees new draws.
What it gains: nothing but sequential reads, where seeking is slow. ``ids`` count on as always.
"""

import os
import random
import tarfile
from collections.abc import Iterator
from typing import Any

from webdataset.filters import pick
from webdataset.tariterators import group_by_keys

from speed_engine.data.format.decode import MAX_MEMBER
from speed_engine.data.format.errors import ShardError
from speed_engine.data.format.reader import Sample, ShardReader
from speed_engine.data.format.tar import key_and_extension
from speed_engine.data.loading.order import Feed

BUFFER = 2000  # samples that are shuffled together, per worker
BUFFER_BYTES = 2**30  # of them together: of large ones there are fewer


def stream_samples(
    reader: ShardReader, feed: Feed, worker: int
) -> Iterator[tuple[str, Sample | ShardError]]:
    """(description, members) of samples without end; in place of an incomplete one, its error.

    Args:
        reader: says which shards and members; checksums are not compared.
        feed: of it, seed, start and rank decide which samples are drawn.
        worker: number of this process among those of the rank.
    """
    rng = random.Random(f"{feed.seed} {feed.start} {feed.rank} {worker}")
    files = _files(reader, rng)
    for sample in _shuffled(group_by_keys(files), rng):
        if not reader.takes(sample["__url__"], sample["__key__"]):
            continue
        where = f"{sample['__url__']}: sample {sample['__key__']!r}"
        found = {key: sample[key] for key in reader.keys if key in sample}
        sizes = {key: data for key, data in found.items() if isinstance(data, int)}
        if len(found) < len(reader.keys):
            yield where, ShardError(f"{where} has not all of the members {list(reader.keys)}.")
        elif sizes:
            yield where, ShardError(f"{where}: members {sizes} of more than {MAX_MEMBER:,} bytes.")
        else:
            yield where, {key: memoryview(data) for key, data in found.items()}


def _shuffled(samples: Iterator[dict[str, Any]], rng: random.Random) -> Iterator[dict[str, Any]]:
    """Endless samples as webdataset shuffles them, in a buffer that is bounded in bytes, too."""
    buffer: list[dict[str, Any]] = []
    held = 0
    for sample in samples:
        buffer.append(sample)
        held += _bytes(sample)
        if len(buffer) < BUFFER and held < BUFFER_BYTES:
            buffer.append(next(samples))
            held += _bytes(buffer[-1])
        while len(buffer) >= BUFFER // 2 or held >= BUFFER_BYTES:
            chosen = pick(buffer, rng)
            held -= _bytes(chosen)
            yield chosen
            if held < BUFFER_BYTES:
                break


def _bytes(sample: dict[str, Any]) -> int:
    return sum(len(value) for value in sample.values() if isinstance(value, bytes))


def _files(reader: ShardReader, rng: random.Random) -> Iterator[dict[str, Any]]:
    """Members as ``group_by_keys`` takes them: an empty one after each shard.

    Shards are opened by the reader: webdataset would give their names to a shell or the network.
    What nobody asked for is not read, nor what is larger than a member may be: of that comes the
    size.
    """
    while True:
        name, file = reader.open_shard(rng.randrange(len(reader.counts)))
        with os.fdopen(file, "rb") as stream:
            try:
                for path, data in _members(stream, reader.keys):
                    yield {"__url__": name, "fname": path, "data": data}
            except (tarfile.TarError, ValueError) as error:
                raise ShardError(
                    f"{name}: {error}; it is damaged, `speed-engine shards check` says where."
                ) from error
        yield {}


def _members(stream: Any, keys: tuple[str, ...]) -> Iterator[tuple[str, bytes | int]]:
    """(name, content or, where it is too large, size) of the members with these extensions."""
    with tarfile.open(fileobj=stream, mode="r|") as archive:
        kept = vars(archive)["members"]
        while (member := archive.next()) is not None:
            kept.clear()  # nobody reads them, and they would grow
            named = key_and_extension(member.name)
            if not member.isreg() or named is None or named[1] not in keys:
                continue
            content = archive.extractfile(member) if member.size <= MAX_MEMBER else None
            yield member.name, member.size if content is None else content.read()
