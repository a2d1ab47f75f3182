"""A data set that lies in the device's memory: batches without a loader.

The shards are read once. A batch is then rows of what is stored, gathered by the order of the run,
and made into clean images by the operator that a loader's batches go through, too: same images,
same order, same bits. So are the substitutes of damaged samples, see decoding.py.

Letters: B images of a batch, N samples of the data set.
"""

import logging
from typing import Self

import numpy as np
import torch
from torch import Tensor

from speed_engine.data.batch import Batch, StoredBatch
from speed_engine.data.format.errors import ShardError
from speed_engine.data.format.reader import ShardReader
from speed_engine.data.loading.clean import Cleaning
from speed_engine.data.loading.decoding import ATTEMPTS, BatchReader, OnBadSample, Shape
from speed_engine.data.loading.order import DataOrder, Feed, elsewhere
from speed_engine.runtime.checks import UserError
from speed_engine.runtime.progress import announced

CHUNK = 1024  # samples read at once
log = logging.getLogger(__name__)


class Resident:
    """The endless iterator over one rank's batches, in the order of ``Loader``.

    Args:
        reader: its first key is the image, the others are conditions.
        image_shape: (C, H, W) that every stored image must have.
        feed: which images of the stream; each rank holds the whole data set.
        cleaning: on the device that the data set shall lie on.
        num_classes: labels must be less; None accepts any.
        on_bad_sample: what happens to a damaged sample.

    Raises:
        UserError: a sample is unfit; names shard and key of it.
        OSError: a shard cannot be read.
    """

    def __init__(
        self,
        reader: ShardReader,
        image_shape: Shape,
        feed: Feed,
        cleaning: Cleaning,
        *,
        num_classes: int | None = None,
        on_bad_sample: OnBadSample = "stop",
    ) -> None:
        self._feed, self._k = feed, 0
        self._cleaning, self._device = cleaning, cleaning.seed.device
        self._order = DataOrder(reader.counts, feed.seed, feed.window)
        self._damage: dict[int, str] = {}  # sample -> what is wrong with it
        self._stored: dict[str, Tensor] = {}  # (N, ...) each, the images under ""
        with announced(f"reading all {len(reader):,} images into memory"):
            self._load(reader, BatchReader(reader, image_shape, num_classes, on_bad_sample))

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        first, count = self._feed.first(self._k), self._feed.part_size
        self._k += 1
        samples, replaced = self._samples(first, count)
        rows = torch.from_numpy(samples)
        if self._device.type == "cuda":  # so that the copy does not wait
            rows = rows.pin_memory().to(self._device, non_blocking=True)
        ids = torch.arange(first, first + count, device=self._device)
        conditions = self._stored.copy()
        stored = StoredBatch(conditions.pop(""), conditions, ids, replaced)
        return self._cleaning.batch(stored, rows)

    def _samples(self, first: int, count: int) -> tuple[np.ndarray, tuple[str, ...]]:
        """Of the batch that begins with image ``first``, and what was wrong with others."""
        samples = self._order.sample_indices(first, count)
        replaced = []
        if self._damage:
            for place in np.flatnonzero(np.isin(samples, list(self._damage))).tolist():
                replaced.append(self._damage[int(samples[place])])
                samples[place] = self._substitute(first + place, replaced[-1])
        return samples, tuple(replaced)

    def _substitute(self, image: int, damage: str) -> int:
        for attempt in range(1, ATTEMPTS + 1):
            if (sample := self._order.substitute(image, attempt)) not in self._damage:
                return sample
        raise ShardError(f"{damage} None of {ATTEMPTS} samples elsewhere could take its place.")

    def _load(self, reader: ShardReader, batches: BatchReader) -> None:
        for first in range(0, len(reader), CHUNK):
            samples = np.arange(first, min(first + CHUNK, len(reader)))
            damaged: list[int] = []

            def next_one(place: int, attempt: int, first=first, damaged=damaged) -> int:
                """Fills the row of a damaged sample, which is then never gathered."""
                if attempt == 1:
                    damaged.append(first + place)
                return elsewhere(first + place, attempt, len(reader))

            chunk = batches.read(samples, next_one)
            self._damage |= dict(zip(damaged, chunk.replaced, strict=True))
            for name, values in {"": chunk.images, **chunk.conditions}.items():
                if name not in self._stored:
                    self._stored[name] = torch.empty(
                        (len(reader), *values.shape[1:]), dtype=values.dtype, device=self._device
                    )
                stored = self._stored[name]
                if (values.dtype, values.shape[1:]) != (stored.dtype, stored.shape[1:]):
                    raise UserError(
                        f"{reader.describe(first)} and those after it have {name or 'image'} of "
                        f"{values.dtype} and shape {tuple(values.shape[1:])}, others "
                        f"{stored.dtype} and {tuple(stored.shape[1:])}; a data set needs one "
                        f"dtype and shape."
                    )
                stored[first : first + len(values)] = values
        if self._damage:
            log.warning(
                "%d damaged samples have substitutes, which the metrics count; the first: %s "
                "`speed-engine shards check` lists all.",
                len(self._damage),
                next(iter(self._damage.values())),
            )

    def close(self) -> None:
        """Give the memory back."""
        self._stored = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def resident_bytes(reader: ShardReader, image_shape: Shape) -> int:
    """What the data set will take of the device's memory; all samples are of one size."""
    batches = BatchReader(reader, image_shape, on_bad_sample="skip")
    first = batches.read([0], lambda _, attempt: attempt % len(reader))
    return len(reader) * sum(tensor.nbytes for tensor in (first.images, *first.conditions.values()))
