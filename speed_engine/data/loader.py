"""Batches in the order of the run: sample indices -> bytes -> arrays -> ``Batch``.

    global batch k  = images start + k B ... start + (k + 1) B - 1 of the stream, see order.py
    rank r          takes the r-th of its world_size equal parts
    worker w of W   makes k = w, w + W, w + 2 W, ...; DataLoader collects from its workers in turn

The loader has no state to save: made anew with ``start`` = images consumed it continues exactly,
whatever the ranks, the workers and the batches in flight were.

Letters: B images, C, H, W as usual; N samples of the data set.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import NamedTuple, Self, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from webdataset.filters import map as map_stage
from webdataset.pipeline import DataPipeline

from speed_engine.data.conditions import condition_name, decode_condition
from speed_engine.data.decode import decode_image
from speed_engine.data.order import DataOrder
from speed_engine.data.reader import ShardReader

PREFETCH = 4  # batches in flight per worker
IMAGE = "image"  # in a decoded sample, beside the names of its conditions
Shape = tuple[int, int, int]  # C, H, W


class Batch(NamedTuple):
    """One rank's part of a global batch."""

    images: Tensor  # (B, C, H, W) float32: pixels in [-1, 1], or latents as stored
    conditions: dict[str, Tensor]  # (B, ...) each, by the model's argument, see conditions.py
    ids: Tensor  # (B,) int64 positions in the stream, the addresses of the run's random draws

    def to(self, device: torch.device | str) -> "Batch":
        """The batch on ``device``, floats as float32; copies from pinned memory do not wait."""

        def move(tensor: Tensor) -> Tensor:
            moved = tensor.to(device, non_blocking=True)
            return moved.float() if moved.is_floating_point() else moved

        conditions = {name: move(value) for name, value in self.conditions.items()}
        return Batch(move(self.images), conditions, move(self.ids))


class Loader:
    """The endless iterator over one rank's batches.

    A context manager; ``close`` ends the workers, as does any error.

    Args:
        reader: its first key is the image, the others are conditions.
        image_shape: (C, H, W) that every image must have.
        batch_size: images per step, all ranks together.
        seed: of the run.
        start: images consumed so far, all ranks together.
        workers: processes that read and decode; 0 does it in this one.
        rank: of this process.
        world_size: number of ranks.
        window: shards that are shuffled together, see order.py.
        num_classes: labels must be less; None accepts any.
        condition_shapes: of one row, by the condition's name; others accept any.

    Raises:
        ValueError: an argument or a sample is unfit; names shard and key of the sample.
        RuntimeError: a worker died, or the loader is closed.
    """

    def __init__(
        self,
        reader: ShardReader,
        image_shape: Shape,
        batch_size: int,
        seed: int,
        start: int = 0,
        workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
        window: int = 8,
        num_classes: int | None = None,
        condition_shapes: Mapping[str, tuple[int, ...]] | None = None,
    ) -> None:
        check_arguments(reader, batch_size, start, workers, rank, world_size)
        load = partial(_load_batch, reader, image_shape, num_classes)
        first = load(np.array([[0], [0]]))  # an unfit data set fails here, not in a worker
        _check_conditions(reader, first, condition_shapes or {})
        order = DataOrder(reader.counts, seed, window)
        source = _Source(order, start, batch_size, rank, world_size)
        pipeline = DataPipeline(source, map_stage(load))
        self._loader: DataLoader | None = DataLoader(
            cast(IterableDataset, pipeline),  # it is one, but its stubs do not say so
            batch_size=None,
            num_workers=workers,
            prefetch_factor=PREFETCH if workers else None,
            pin_memory=torch.cuda.is_available(),
        )
        self._batches: Iterator[Batch] | None = None

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        if self._loader is None:
            raise RuntimeError("this Loader is closed; make another with start=images consumed.")
        try:
            if self._batches is None:
                self._batches = iter(self._loader)
            return next(self._batches)
        except (EOFError, ConnectionError) as error:  # it died while handing over a batch
            self.close()
            raise RuntimeError(
                f"a DataLoader worker was killed or exited ({error!r}); if memory ran out, use "
                "fewer workers. Make another Loader with start=images consumed to go on."
            ) from error
        except BaseException:
            self.close()  # DataLoader would go on without the worker that failed
            raise

    def close(self) -> None:
        """End the workers; batches in flight are dropped."""
        # Private, but garbage collection would wait for whoever holds the traceback of an error.
        shutdown = getattr(self._batches, "_shutdown_workers", None)  # absent without workers
        self._loader = self._batches = None
        if shutdown is not None:
            shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_all(reader: ShardReader, image_shape: Shape) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Every sample in the order of the shards, for evaluation.

    Returns:
        images (N, C, H, W) uint8 and conditions, (N, ...) each, as stored.
    """
    images, conditions = _stack(reader, image_shape, None, range(len(reader)))
    if images.dtype != np.uint8:
        raise ValueError(f"{reader.describe(0)} holds {images.dtype}; needed: uint8 pixels.")
    return images, conditions


def read_conditions(
    reader: ShardReader, image_shape: Shape, indices: list[int]
) -> dict[str, np.ndarray]:
    """(N, ...) of the given samples, as batches have them."""
    _, conditions = _stack(reader, image_shape, None, indices)
    return {name: _scaled(value) for name, value in conditions.items()}


def read_stored(
    reader: ShardReader, image_shape: Shape, num_classes: int | None, indices: range | list[int]
) -> dict[str, np.ndarray]:
    """Images, under ``IMAGE``, and conditions (N, ...) of the given samples, as stored."""
    images, conditions = _stack(reader, image_shape, num_classes, indices)
    return {IMAGE: images, **conditions}


class _Source(IterableDataset):
    """This worker's batches as (2, B) int64: sample indices, positions in the stream."""

    def __init__(
        self, order: DataOrder, start: int, batch_size: int, rank: int, world_size: int
    ) -> None:
        self._order, self._batch_size = order, batch_size
        self._rank_size = batch_size // world_size
        self._first = start + rank * self._rank_size

    def __iter__(self) -> Iterator[np.ndarray]:
        worker = get_worker_info()
        k, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        while True:
            first = self._first + k * self._batch_size
            indices = self._order.sample_indices(first, self._rank_size)
            yield np.stack([indices, np.arange(first, first + self._rank_size)])
            k += stride


def _load_batch(
    reader: ShardReader, image_shape: Shape, num_classes: int | None, part: np.ndarray
) -> Batch:
    indices, ids = part
    images, conditions = _stack(reader, image_shape, num_classes, indices.tolist())
    told = {name: torch.from_numpy(_scaled(value)) for name, value in conditions.items()}
    images = _scaled(images).astype(np.float32, copy=False)
    return Batch(torch.from_numpy(images), told, torch.from_numpy(ids))


def _scaled(values: np.ndarray) -> np.ndarray:
    """Pixels to [-1, 1]; anything else as it is."""
    if values.dtype != np.uint8:
        return values
    return values.astype(np.float32) / np.float32(127.5) - np.float32(1)


def _stack(
    reader: ShardReader, image_shape: Shape, num_classes: int | None, indices: range | list[int]
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Images (B, C, H, W) and conditions (B, ...), each of one dtype and shape."""
    rows: list[dict[str, np.ndarray]] = []
    for i in indices:
        row = _decode(reader, i, image_shape)
        for name, value in row.items():
            first = rows[0][name] if rows else value
            if (value.dtype, value.shape) != (first.dtype, first.shape):
                raise ValueError(
                    f"{reader.describe(i)} has {name} of {value.dtype} and shape {value.shape}, "
                    f"others {first.dtype} and {first.shape}; a data set needs one dtype and shape."
                )
        if num_classes is not None and row.get("labels", 0) >= num_classes:
            raise ValueError(
                f"{reader.describe(i)} has label {row['labels']}; needed: less than "
                f"num_classes={num_classes}. Correct num_classes or the data."
            )
        rows.append(row)
    stacked = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    return stacked.pop(IMAGE), stacked


def _decode(reader: ShardReader, i: int, image_shape: Shape) -> dict[str, np.ndarray]:
    """The image, under ``IMAGE``, and the conditions of a sample."""
    image_key, *condition_keys = reader.keys
    sample = reader.read(i)
    try:
        image = decode_image(sample[image_key], image_key, image_shape[0])
        conditions = {
            condition_name(key): decode_condition(sample[key], key, image_shape[0])
            for key in condition_keys
        }
    except ValueError as error:
        raise ValueError(f"{reader.describe(i)}: {error}") from error
    if image.shape != tuple(image_shape) or image.dtype == np.int64:
        raise ValueError(
            f"{reader.describe(i)}: the image is {image.dtype} of shape {image.shape}; expected "
            f"uint8 or floating point of shape {tuple(image_shape)}. Correct image_shape or the "
            f"data."
        )
    return {IMAGE: image, **conditions}


def _check_conditions(
    reader: ShardReader, batch: Batch, shapes: Mapping[str, tuple[int, ...]]
) -> None:
    for name, shape in shapes.items():
        found = tuple(batch.conditions[name].shape[1:])
        if found != tuple(shape):
            raise ValueError(
                f"{reader.describe(0)} has {name} of shape {found}; expected {tuple(shape)}. "
                "Correct the data options (token_shape, low_shape) or the data."
            )


def check_arguments(
    reader: ShardReader, batch_size: int, start: int, workers: int, rank: int, world_size: int
) -> None:
    """Raises ValueError where batches cannot be shared out so."""
    for key in reader.keys[1:]:
        condition_name(key)
    if batch_size < 1 or start < 0 or workers < 0 or not 0 <= rank < world_size:
        raise ValueError(
            f"batch_size={batch_size}, start={start}, workers={workers}, rank={rank}, "
            f"world_size={world_size}: sizes are positive, counts not negative, rank < world_size."
        )
    if batch_size % world_size:
        below = batch_size - batch_size % world_size
        raise ValueError(
            f"batch_size={batch_size} is not a multiple of world_size={world_size}; nearest valid "
            f"values: {below or below + world_size} and {below + world_size}."
        )
