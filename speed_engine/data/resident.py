"""A data set that lies in the device's memory: batches without a loader.

The shards are read once. A batch is then rows of what is stored, gathered by the order of the run,
and made into clean images by the operator that a loader's batches go through, too: same images,
same order, same bits.

Letters: B images of a batch, N samples of the data set.
"""

from collections.abc import Iterator, Mapping
from typing import Self

import numpy as np
import torch
from torch import Tensor

from speed_engine.data.clean import Cleaning
from speed_engine.data.loader import IMAGE, Batch, Shape, check_arguments, read_stored
from speed_engine.data.order import DataOrder
from speed_engine.data.reader import ShardReader

CHUNK = 1024  # samples read at once


class Resident:
    """The endless iterator over one rank's batches; arguments and order are those of ``Loader``.

    Args:
        reader: its first key is the image, the others are conditions.
        image_shape: (C, H, W) that every stored image must have.
        batch_size: images per step, all ranks together.
        seed: of the run.
        cleaning: on the device that the data set shall lie on.
        start: images consumed so far, all ranks together.
        rank: of this process.
        world_size: number of ranks; each holds the whole data set.
        window: shards that are shuffled together, see order.py.
        num_classes: labels must be less; None accepts any.

    Raises:
        ValueError: an argument or a sample is unfit; names shard and key of the sample.
    """

    def __init__(
        self,
        reader: ShardReader,
        image_shape: Shape,
        batch_size: int,
        seed: int,
        cleaning: Cleaning,
        start: int = 0,
        rank: int = 0,
        world_size: int = 1,
        window: int = 8,
        num_classes: int | None = None,
    ) -> None:
        check_arguments(reader, batch_size, start, 0, rank, world_size)
        self._cleaning, self._device = cleaning, cleaning.seed.device
        self._order = DataOrder(reader.counts, seed, window)
        self._images, self._conditions = _load(reader, image_shape, num_classes, self._device)
        self._batch_size, self._rank_size = batch_size, batch_size // world_size
        self._next = start + rank * self._rank_size

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        first = self._next
        self._next += self._batch_size
        rows = torch.from_numpy(self._order.sample_indices(first, self._rank_size))
        if self._device.type == "cuda":  # so that the copy does not wait
            rows = rows.pin_memory().to(self._device, non_blocking=True)
        ids = torch.arange(first, first + self._rank_size, device=self._device)
        return self._cleaning.batch(self._images, self._conditions, ids, rows)

    def close(self) -> None:
        """Give the memory back."""
        self._images, self._conditions = torch.empty(0), {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def resident_bytes(reader: ShardReader, image_shape: Shape) -> int:
    """What the data set will take of the device's memory; all samples are of one size."""
    arrays = read_stored(reader, image_shape, None, [0])
    return len(reader) * sum(array.nbytes for array in arrays.values())


def _load(
    reader: ShardReader, image_shape: Shape, num_classes: int | None, device: torch.device
) -> tuple[Tensor, Mapping[str, Tensor]]:
    """Images and conditions (N, ...) of every sample, in the order of the shards."""
    loaded: dict[str, Tensor] = {}
    for first, arrays in _chunks(reader, image_shape, num_classes):
        for name, array in arrays.items():
            values = torch.from_numpy(array)
            if name not in loaded:
                shape = (len(reader), *values.shape[1:])
                loaded[name] = torch.empty(shape, dtype=values.dtype, device=device)
            loaded[name][first : first + len(values)] = values
    return loaded.pop(IMAGE), loaded


def _chunks(
    reader: ShardReader, image_shape: Shape, num_classes: int | None
) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    for first in range(0, len(reader), CHUNK):
        samples = range(first, min(first + CHUNK, len(reader)))
        yield first, read_stored(reader, image_shape, num_classes, samples)
