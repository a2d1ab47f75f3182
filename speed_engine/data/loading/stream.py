"""Plain webdataset streaming: shards in random order, read from end to end, and a shuffle buffer.

What it costs: every rank and worker draws its own shards, so the sequence of images depends on
their number, an epoch may leave out images and repeat others, and a resumed run sees new draws.
What it gains: nothing but sequential reads, where seeking is slow. ``ids`` count on as always.
"""

import logging
import os
import random
from collections.abc import Iterator
from itertools import count, islice
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info
from webdataset.filters import shuffle
from webdataset.tariterators import group_by_keys, tar_file_expander

from speed_engine.data.format.index import ShardError
from speed_engine.data.loading.decoding import IMAGE, Arrays, BatchReader, Row

log = logging.getLogger(__name__)

BUFFER = 2000  # samples that are shuffled together, per worker


class StreamSource(IterableDataset):
    """This worker's batches, as (arrays, positions in the stream).

    Args:
        batches: decodes, and holds the reader and the policy.
        seed: of the run.
        start: images consumed so far, all ranks together.
        batch_size: images per step, all ranks together.
        rank: of this process.
        world_size: number of ranks.
    """

    def __init__(
        self,
        batches: BatchReader,
        seed: int,
        start: int,
        batch_size: int,
        rank: int,
        world_size: int,
    ) -> None:
        log.warning(
            "data.mode=stream is not exact: the order of images depends on ranks and workers, an "
            "epoch is not every image once, and a resumed run does not continue it."
        )
        self._batches, self._seed, self._batch_size = batches, seed, batch_size
        self._rank, self._rank_size = rank, batch_size // world_size
        self._start = start

    def __iter__(self) -> Iterator[tuple[Arrays, np.ndarray]]:
        worker = get_worker_info()
        number, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        rng = random.Random(f"{self._seed} {self._start} {self._rank} {number}")
        files = tar_file_expander(self._shards(rng))
        samples = shuffle(BUFFER, initial=BUFFER // 2, rng=rng)(group_by_keys(files))
        first = self._start + self._rank * self._rank_size
        for k in count(number, stride):
            ids = first + k * self._batch_size + np.arange(self._rank_size)
            yield self._batch(samples), ids

    def _shards(self, rng: random.Random) -> Iterator[dict[str, Any]]:
        """Opened by the reader: webdataset would give their names to a shell or the network."""
        while True:
            shard = rng.randrange(len(self._batches.reader.counts))
            name, file = self._batches.reader.open_shard(shard)
            with os.fdopen(file, "rb") as stream:
                yield {"url": name, "stream": stream}

    def _batch(self, samples: Iterator[dict[str, Any]]) -> Arrays:
        replaced: list[str] = []
        rows = list(islice(self._rows(samples, replaced), self._rank_size))
        arrays = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        return Arrays(arrays.pop(IMAGE), arrays, tuple(replaced))

    def _rows(self, samples: Iterator[dict[str, Any]], replaced: list[str]) -> Iterator[Row]:
        bad = 0  # in a row
        for sample in samples:
            if not self._batches.reader.takes(sample["__key__"]):
                continue
            where = f"{sample['__url__']}: sample {sample['__key__']!r}"
            try:
                keys = self._batches.reader.keys
                members = {key: memoryview(sample[key]) for key in keys if key in sample}
                if len(members) < len(keys):
                    raise ShardError(f"{where} has not all of the members {list(keys)}.")
                yield self._batches.decode(members, lambda where=where: where)
                bad = 0
            except ShardError as damage:
                bad += 1
                if self._batches.stops or bad > BUFFER:  # rather than look for ever
                    raise
                replaced.append(str(damage))
