"""Batches in the order of the run: sample indices -> bytes -> arrays -> ``Batch``.

    global batch k  = images start + k B ... start + (k + 1) B - 1 of the stream, see order.py
    rank r          takes the r-th of its world_size equal parts
    worker w of W   makes k = w, w + W, w + 2 W, ...; DataLoader collects from its workers in turn

The loader has no state to save: made anew with ``start`` = images consumed it continues exactly,
whatever the ranks, the workers and the batches in flight were.

Letters: B images, C, H, W as usual; N samples of the data set.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import partial
from typing import Literal, NamedTuple, Self, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from webdataset.filters import map as map_stage
from webdataset.pipeline import DataPipeline

from speed_engine.data.format.reader import ShardReader
from speed_engine.data.loading.conditions import condition_name
from speed_engine.data.loading.decoding import Arrays, BatchReader, OnBadSample, Shape
from speed_engine.data.loading.order import DataOrder, elsewhere
from speed_engine.data.loading.shared_memory import Piece, SharedMemory
from speed_engine.data.loading.stream import StreamSource
from speed_engine.runtime.checks import UserError

log = logging.getLogger(__name__)

PREFETCH = 4  # batches in flight per worker


class Batch(NamedTuple):
    """One rank's part of a global batch."""

    images: Tensor  # (B, C, H, W) as stored: uint8 pixels, floating-point latents
    conditions: dict[str, Tensor]  # (B, ...) each, by the model's argument, see conditions.py
    ids: Tensor  # (B,) int64 positions in the stream, the addresses of the run's random draws
    replaced: tuple[str, ...] = ()  # what was wrong with each sample that has a substitute
    targets: dict[str, Tensor] = {}  # (B, ...) each, what the terms of the loss compare with

    def to(self, device: torch.device | str) -> "Batch":
        """The batch on ``device``: pixels as float32 in [-1, 1], other floats as float32.

        Copies are asynchronous from pinned memory; everything travels as it is stored.
        """
        move = partial(_move, device=device)
        conditions = {name: move(value) for name, value in self.conditions.items()}
        targets = {name: move(value) for name, value in self.targets.items()}
        return Batch(move(self.images), conditions, move(self.ids), self.replaced, targets)

    def split(self, size: int) -> list["Batch"]:
        """Parts of ``size`` images; the last may be smaller."""
        return [
            Batch(
                self.images[start : start + size],
                {name: rows[start : start + size] for name, rows in self.conditions.items()},
                self.ids[start : start + size],
                targets={name: rows[start : start + size] for name, rows in self.targets.items()},
            )
            for start in range(0, len(self.ids), size)
        ]


def _move(tensor: Tensor, device: torch.device | str) -> Tensor:
    moved = tensor.to(device, non_blocking=True)
    if moved.dtype == torch.int64:
        return moved
    floats = moved.to(torch.float32, memory_format=torch.contiguous_format)
    if moved.dtype != torch.uint8:
        return floats
    # By a tensor: CUDA would multiply by the reciprocal of a number.
    return floats.div_(torch.full((), 127.5, device=floats.device)).sub_(1)


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
        on_bad_sample: what happens to a damaged sample, see batches.py.
        mode: exact as above, or stream, see stream.py.

    Raises:
        UserError: an argument or a sample is unfit; names shard and key of the sample.
        OSError: a shard cannot be read.
        ChildProcessError: a worker died.
        RuntimeError: the loader is closed.
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
        on_bad_sample: OnBadSample = "stop",
        mode: Literal["exact", "stream"] = "exact",
    ) -> None:
        check_arguments(reader, batch_size, start, workers, rank, world_size)
        order = DataOrder(reader.counts, seed, window)
        batches = BatchReader(reader, image_shape, num_classes, on_bad_sample)
        self._memory = SharedMemory(workers)
        load = partial(_load_batch, batches, order, self._memory)
        # An unfit data set fails here, not in a worker. The order of this epoch is computed, too,
        # which the workers then share.
        first, _ = load(np.array([order.sample_indices(start, 1), [start]]))
        _check_conditions(reader, first, condition_shapes or {})
        if mode == "exact":
            source = _Source(reader, order, start, batch_size, rank, world_size)
            pipeline = DataPipeline(source, map_stage(load))
        else:
            stream = StreamSource(batches, seed, start, batch_size, rank, world_size)
            pipeline = DataPipeline(stream, map_stage(_without_piece))
        self._loader: DataLoader | DataPipeline | None = pipeline
        if workers or torch.cuda.is_available():  # else it has nothing to do, and takes time
            self._loader = DataLoader(
                cast(IterableDataset, pipeline),  # it is one, but its stubs do not say so
                batch_size=None,
                num_workers=workers,
                prefetch_factor=PREFETCH if workers else None,
                pin_memory=torch.cuda.is_available(),
            )
        self._batches: Iterator[_Loaded] | None = None
        self._damaged: set[str] = set()  # shards

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        if self._loader is None:
            raise RuntimeError("this Loader is closed; make another with start=images consumed.")
        try:
            if self._batches is None:
                self._batches = iter(self._loader)
            self._memory.give_back()
            return self._reported(self._received(next(self._batches)))
        except (EOFError, ConnectionError, RuntimeError) as error:
            self.close()
            if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
                raise
            raise ChildProcessError(
                f"a DataLoader worker was killed or exited ({error!r}); if memory ran out, use "
                "fewer workers, or in a container more of /dev/shm (docker run --shm-size). Make "
                "another Loader with start=images consumed to go on."
            ) from error
        except BaseException:
            self.close()  # DataLoader would go on without the worker that failed
            raise

    def _received(self, loaded: "_Loaded") -> Batch:
        """The batch, whose memory its worker gets back once nobody holds it."""
        batch, piece = loaded
        if piece is not None:
            tensors = [batch.images, *batch.conditions.values()]
            pinned = torch.cuda.is_available()  # then these are copies, and the piece is free
            self._memory.watch([] if pinned else tensors, piece)
        return batch

    def _reported(self, batch: Batch) -> Batch:
        """The batch, after one warning for each shard that is found to be damaged."""
        for damage in batch.replaced:
            shard = damage.partition(": ")[0]
            if shard not in self._damaged:
                self._damaged.add(shard)
                log.warning(
                    "%s Another sample takes its place, as for all damaged ones of this shard; "
                    "they are counted in the metrics, and `speed-engine shards check` lists them.",
                    damage,
                )
        return batch

    def close(self) -> None:
        """End the workers; batches in flight are dropped."""
        # Private, but garbage collection would wait for whoever holds the traceback of an error.
        shutdown = getattr(self._batches, "_shutdown_workers", None)  # absent without workers
        self._loader = self._batches = None
        if shutdown is not None:
            # torch's signal handler reports a dead worker wherever we are, so perhaps here again.
            with suppress(RuntimeError):
                shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_all(
    reader: ShardReader,
    image_shape: Shape,
    on_bad_sample: OnBadSample = "stop",
    groups: np.ndarray | None = None,
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Every sample in the order of the shards, for evaluation; others replace damaged ones.

    Args:
        reader: its first key is the image.
        image_shape: (C, H, W) that every image must have.
        on_bad_sample: what happens to a damaged sample.
        groups: (N,) of the samples; a damaged one is replaced by one of its own group. None is one.

    Returns:
        images (N, C, H, W) uint8 and conditions, (N, ...) each, as stored.
    """
    batches = BatchReader(reader, image_shape, on_bad_sample=on_bad_sample)
    groups = np.zeros(len(reader)) if groups is None else groups

    def substitute(place: int, attempt: int) -> int:
        own = np.flatnonzero(groups == groups[place])
        return int(own[elsewhere(int(np.searchsorted(own, place)), attempt, len(own))])

    images, conditions, replaced = batches.read(range(len(reader)), substitute)
    if images.dtype != np.uint8:
        raise UserError(f"{reader.describe(0)} holds {images.dtype}; needed: uint8 pixels.")
    if replaced:
        log.warning("%d damaged samples are replaced in evaluation.", len(replaced))
    return np.ascontiguousarray(images), conditions


def read_conditions(
    reader: ShardReader, image_shape: Shape, indices: list[int]
) -> dict[str, np.ndarray]:
    """(N, ...) of the given samples, as batches have them."""
    _, conditions, _ = BatchReader(reader, image_shape).read(indices)
    return {name: _scaled(value) for name, value in conditions.items()}


class _Source(IterableDataset):
    """This worker's batches as (2, B) int64: sample indices, positions in the stream."""

    def __init__(
        self,
        reader: ShardReader,
        order: DataOrder,
        start: int,
        batch_size: int,
        rank: int,
        world_size: int,
    ) -> None:
        self._reader, self._order, self._batch_size = reader, order, batch_size
        self._rank_size = batch_size // world_size
        self._first = start + rank * self._rank_size

    def __iter__(self) -> Iterator[np.ndarray]:
        worker = get_worker_info()
        k, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        begin = end = self._first + k * self._batch_size  # of the last window that was announced
        while True:
            first = self._first + k * self._batch_size
            while first >= begin:  # announce the next window when the one before it begins
                begin, (end, shards) = end, self._order.window_at(end)
                self._reader.prefetch(shards)
            indices = self._order.sample_indices(first, self._rank_size)
            yield np.stack([indices, np.arange(first, first + self._rank_size)])
            k += stride


class _Loaded(NamedTuple):
    """What comes from a worker."""

    batch: Batch
    piece: Piece | None  # of shared memory, that the batch is in


def _load_batch(
    batches: BatchReader, order: DataOrder, memory: SharedMemory, part: np.ndarray
) -> _Loaded:
    indices, ids = part
    images, conditions, replaced = batches.read(
        indices, lambda place, attempt: order.substitute(int(ids[place]), attempt), memory.empty
    )
    (stored, *told), piece = memory.lend([images, *conditions.values()])
    conditions = dict(zip(conditions, told, strict=True))
    return _Loaded(Batch(_floats(stored), conditions, torch.from_numpy(ids), replaced), piece)


def _without_piece(part: tuple[Arrays, np.ndarray]) -> _Loaded:
    return _Loaded(as_batch(part), None)


def as_batch(part: tuple[Arrays, np.ndarray]) -> Batch:
    """The tensors that share the arrays' memory."""
    (images, conditions, replaced), ids = part
    told = {name: torch.from_numpy(value) for name, value in conditions.items()}
    return Batch(_floats(torch.from_numpy(images)), told, torch.from_numpy(ids), replaced)


def _floats(images: Tensor) -> Tensor:
    """bfloat16, which NumPy lacks, from its bits; others as they are."""
    return images.view(torch.bfloat16) if images.dtype == torch.uint16 else images


def _scaled(values: np.ndarray) -> np.ndarray:
    """Pixels to [-1, 1]; anything else as it is."""
    if values.dtype != np.uint8:
        return values
    return values.astype(np.float32) / np.float32(127.5) - np.float32(1)


def _check_conditions(
    reader: ShardReader, batch: Batch, shapes: Mapping[str, tuple[int, ...]]
) -> None:
    for name, shape in shapes.items():
        found = tuple(batch.conditions[name].shape[1:])
        if found != tuple(shape):
            raise UserError(
                f"{reader.describe(0)} has {name} of shape {found}; expected {tuple(shape)}. "
                "Correct the data options (token_shape, low_shape) or the data."
            )


def check_arguments(
    reader: ShardReader, batch_size: int, start: int, workers: int, rank: int, world_size: int
) -> None:
    """Raises UserError where batches cannot be shared out so."""
    for key in reader.keys[1:]:
        condition_name(key)
    if batch_size < 1 or start < 0 or workers < 0 or not 0 <= rank < world_size:
        raise UserError(
            f"batch_size={batch_size}, start={start}, workers={workers}, rank={rank}, "
            f"world_size={world_size}: sizes are positive, counts not negative, rank < world_size."
        )
    if batch_size % world_size:
        below = batch_size - batch_size % world_size
        raise UserError(
            f"batch_size={batch_size} is not a multiple of world_size={world_size}; nearest valid "
            f"values: {below or below + world_size} and {below + world_size}."
        )
