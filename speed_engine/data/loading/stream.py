"""Plain webdataset streaming: shards in random order, read from end to end, and a shuffle buffer.

What it costs: every rank and worker draws its own shards, so the sequence of images depends on
their number, an epoch may leave out images and repeat others, and a resumed run sees new draws.
What it gains: nothing but sequential reads, where seeking is slow. ``ids`` count on as always.
"""

import os
import random
from collections.abc import Iterator
from typing import Any

from webdataset.filters import shuffle
from webdataset.tariterators import group_by_keys, tar_file_expander

from speed_engine.data.format.index import ShardError
from speed_engine.data.format.reader import Sample, ShardReader
from speed_engine.data.loading.order import Feed

BUFFER = 2000  # samples that are shuffled together, per worker


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
    files = tar_file_expander(_shards(reader, rng))
    for sample in shuffle(BUFFER, initial=BUFFER // 2, rng=rng)(group_by_keys(files)):
        if not reader.takes(sample["__key__"]):
            continue
        where = f"{sample['__url__']}: sample {sample['__key__']!r}"
        members = {key: memoryview(sample[key]) for key in reader.keys if key in sample}
        if len(members) == len(reader.keys):
            yield where, members
        else:
            yield where, ShardError(f"{where} has not all of the members {list(reader.keys)}.")


def _shards(reader: ShardReader, rng: random.Random) -> Iterator[dict[str, Any]]:
    """Opened by the reader: webdataset would give their names to a shell or the network."""
    while True:
        name, file = reader.open_shard(rng.randrange(len(reader.counts)))
        with os.fdopen(file, "rb") as stream:
            yield {"url": name, "stream": stream}
