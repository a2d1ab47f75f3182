"""Batches in the order of the run: sample indices -> bytes -> arrays -> ``StoredBatch``.

    worker w of W   makes k = w, w + W, w + 2 W, ...; DataLoader collects from its workers in turn

The loader has no state to save: made anew with ``start`` = images consumed it continues exactly,
whatever the ranks, the workers and the batches in flight were. See order.py.

Letters: B images of this rank's part of a batch.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Literal, NamedTuple, Self

import numpy as np
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from speed_engine.data.batch import StoredBatch
from speed_engine.data.format.reader import ShardReader
from speed_engine.data.loading.decoding import BatchReader, OnBadSample, Shape
from speed_engine.data.loading.order import DataOrder, Feed
from speed_engine.data.loading.shared_memory import Piece, SharedMemory
from speed_engine.runtime.checks import UserError, check

log = logging.getLogger(__name__)

PREFETCH = 4  # batches in flight per worker


class Loader:
    """The endless iterator over one rank's batches.

    A context manager; ``close`` ends the workers, as does any error.

    Args:
        reader: its first key is the image, the others are conditions.
        image_shape: (C, H, W) that every image must have.
        feed: which images of the stream.
        workers: processes that read and decode; 0 does it in this one.
        num_classes: labels must be less; None accepts any.
        condition_shapes: of one row, by the condition's name; others accept any.
        on_bad_sample: what happens to a damaged sample, see decoding.py.
        mode: exact as above, or stream, see stream.py.
        pinned: whether batches come in pinned memory, from which a GPU copies beside its work.

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
        feed: Feed,
        *,
        workers: int = 0,
        num_classes: int | None = None,
        condition_shapes: Mapping[str, tuple[int, ...]] | None = None,
        on_bad_sample: OnBadSample = "stop",
        mode: Literal["exact", "stream"] = "exact",
        pinned: bool = False,
    ) -> None:
        check("workers", workers, workers >= 0, "must be 0 or more")
        batches = BatchReader(reader, image_shape, num_classes, on_bad_sample)
        self._memory, self._pinned = SharedMemory(workers), pinned
        source = _Exact(batches, feed, self._memory)
        # An unfit data set fails here, not in a worker. The order of this epoch is computed, too,
        # which the workers then share.
        _check_conditions(reader, source.load(feed.start, 1).batch, condition_shapes or {})
        if mode == "stream":
            source = _Streamed(batches, feed)
        self._loader: DataLoader | IterableDataset | None = source
        if workers or pinned:  # else it has nothing to do, and takes time
            self._loader = DataLoader(
                source,
                batch_size=None,
                num_workers=workers,
                prefetch_factor=PREFETCH if workers else None,
                pin_memory=pinned,
            )
        self._batches: Iterator[_Loaded] | None = None
        self._damaged: set[str] = set()  # shards

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> StoredBatch:
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

    def _received(self, loaded: "_Loaded") -> StoredBatch:
        """The batch, whose memory its worker gets back once nobody holds it."""
        batch, piece = loaded
        if piece is not None:
            tensors = [batch.images, *batch.conditions.values()]
            # Pinned ones are copies, so that the piece is free.
            self._memory.watch([] if self._pinned else tensors, piece)
        return batch

    def _reported(self, batch: StoredBatch) -> StoredBatch:
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


class _Loaded(NamedTuple):
    """What comes from a worker."""

    batch: StoredBatch
    piece: Piece | None = None  # of shared memory, that the batch is in


class _Exact(IterableDataset):
    """This worker's batches of the stream."""

    def __init__(self, batches: BatchReader, feed: Feed, memory: SharedMemory) -> None:
        self._batches, self._feed, self._memory = batches, feed, memory
        self._order = DataOrder(batches.reader.counts, feed.seed, feed.window)

    def __iter__(self) -> Iterator[_Loaded]:
        k, stride = _worker()
        begin = end = self._feed.first(k)  # of the last window that was announced
        try:
            while True:
                first = self._feed.first(k)
                while first >= begin:  # announce the next window when the one before it begins
                    begin, (end, shards) = end, self._order.window_at(end)
                    self._batches.reader.prefetch(shards)
                yield self.load(first, self._feed.part_size)
                k += stride
        finally:
            self._batches.reader.close()

    def load(self, first: int, count: int) -> _Loaded:
        """The images ``first``, ``first + 1``, ... of the stream."""
        images, conditions, ids, replaced = self._batches.read(
            self._order.sample_indices(first, count),
            lambda place, attempt: self._order.substitute(first + place, attempt),
            self._memory.empty,
            np.arange(first, first + count),
        )
        (images, *values), piece = self._memory.lend([images, *conditions.values()])
        conditions = dict(zip(conditions, values, strict=True))
        return _Loaded(StoredBatch(images, conditions, ids, replaced), piece)


class _Streamed(IterableDataset):
    """This worker's batches of whatever it draws."""

    def __init__(self, batches: BatchReader, feed: Feed) -> None:
        log.warning(
            "data.mode=stream is not exact: the order of images depends on ranks and workers, an "
            "epoch is not every image once, and a resumed run does not continue it."
        )
        self._batches, self._feed = batches, feed

    def __iter__(self) -> Iterator[_Loaded]:
        from speed_engine.data.loading.stream import stream_samples  # webdataset takes long

        k, stride = _worker()
        samples = stream_samples(self._batches.reader, self._feed, k)
        while True:
            ids = self._feed.first(k) + np.arange(self._feed.part_size)
            yield _Loaded(self._batches.collect(samples, ids))
            k += stride


def _worker() -> tuple[int, int]:
    """Number of this worker, and of all."""
    worker = get_worker_info()
    return (worker.id, worker.num_workers) if worker else (0, 1)


def _check_conditions(
    reader: ShardReader, batch: StoredBatch, shapes: Mapping[str, tuple[int, ...]]
) -> None:
    for name, shape in shapes.items():
        found = tuple(batch.conditions[name].shape[1:])
        if found != tuple(shape):
            raise UserError(
                f"{reader.describe(0)} has {name} of shape {found}; expected {tuple(shape)}. "
                "Correct the data options (token_shape, low_shape) or the data."
            )
