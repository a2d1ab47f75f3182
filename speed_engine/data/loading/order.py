"""The order of a run's images, a pure function of (counts, seed, window).

    stream     = epoch 0, epoch 1, ...             each a permutation of all N samples
    image n    = sample permutation(n // N)[n % N]
    epoch e    : shards shuffled, cut into groups of `window` shards, each group fully shuffled
    batch k    = images start + k B ... start + (k + 1) B - 1 of the stream; rank r takes the r-th
                 of its equal parts

So every process can compute any slice of the stream: the order depends neither on the number of
processes nor on that of workers. Nothing is dropped or padded; batches may straddle epochs. The
groups, called windows, keep reads near each other on disk. Frozen, like the bits it is made from:
resumed runs rely on it.

A sample that cannot be read is replaced by the one that stands elsewhere in the same epoch: again a
function of the image's place only.

Letters: B images of a global batch, N samples, S shards.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from speed_engine.ops import Stream, random_bits
from speed_engine.runtime.checks import UserError


@dataclass(frozen=True)
class Feed:
    """Which images of the stream one process is fed, and in what order the stream is.

    Attributes:
        batch_size: images per step, all ranks together.
        seed: of the run.
        start: images consumed so far, all ranks together.
        rank: of this process.
        world: number of ranks; divides ``batch_size``.
        window: shards that are shuffled together.

    Raises:
        UserError: a value out of range, or batches that cannot be shared out equally.
    """

    batch_size: int
    seed: int
    start: int = 0
    rank: int = 0
    world: int = 1
    window: int = 8

    def __post_init__(self) -> None:
        positive = min(self.batch_size, self.window) >= 1 and self.start >= 0
        if not positive or not 0 <= self.rank < self.world:
            raise UserError(
                f"batch_size={self.batch_size}, start={self.start}, rank={self.rank}, "
                f"world={self.world}, window={self.window}: sizes are positive, counts not "
                f"negative, rank < world."
            )
        if self.batch_size % self.world:
            below = self.batch_size - self.batch_size % self.world
            nearest = [str(size) for size in (below, below + self.world) if size]
            raise UserError(
                f"batch_size={self.batch_size} does not spread evenly over {self.world} processes; "
                "start a number of processes that divides it, or, in a new run, set batch_size to "
                f"{' or '.join(nearest)}."
            )

    @property
    def part_size(self) -> int:
        """Images of one batch that this rank takes."""
        return self.batch_size // self.world

    def first(self, k: int) -> int:
        """The first image of this rank's part of the k-th batch from ``start``."""
        return self.start + k * self.batch_size + self.rank * self.part_size


def epoch_order(counts: Sequence[int], seed: int, epoch: int, window: int) -> np.ndarray:
    """(N,) int64, the permutation of one epoch.

    Args:
        counts: (S,) samples per shard; samples are numbered shard after shard.
        seed: of the run.
        epoch: from 0.
        window: shards that are shuffled together.
    """
    num_shards, num_samples = len(counts), sum(counts)
    sample_words = _words(seed, epoch, num_shards + num_samples)[num_shards:]
    groups = _window_of_shard(num_shards, seed, epoch, window)
    return np.argsort(np.repeat(groups, counts) << 32 | sample_words, kind="stable")


def _window_of_shard(num_shards: int, seed: int, epoch: int, window: int) -> np.ndarray:
    """(S,) int64, the number of each shard's window in an epoch."""
    windows = np.empty(num_shards, dtype=np.int64)
    shuffled = np.argsort(_words(seed, epoch, num_shards), kind="stable")
    windows[shuffled] = np.arange(num_shards) // window
    return windows


def _words(seed: int, epoch: int, count: int) -> np.ndarray:
    return random_bits(torch.tensor(seed), torch.tensor([epoch]), count, Stream.ORDER)[0].numpy()


def elsewhere(place: int, attempt: int, num_samples: int) -> int:
    """Another place among ``num_samples``, far from those of other attempts."""
    stride = max(1, num_samples * 618_034 // 1_000_000)  # the golden section
    return (place + attempt * stride) % num_samples


class Window(NamedTuple):
    """Shards that are read in the same stretch of the stream."""

    end: int  # the first image of the stream after it
    shards: list[int]


class DataOrder:
    """Slices of the stream; keeps the permutations of the epochs it read last.

    Args:
        counts: (S,) samples per shard.
        seed: of the run.
        window: shards that are shuffled together.
    """

    def __init__(self, counts: Sequence[int], seed: int, window: int) -> None:
        if window < 1 or not sum(counts):
            raise UserError(f"window={window} and sum(counts)={sum(counts)} must be at least 1.")
        self._counts, self._seed, self._window = tuple(counts), seed, window
        self._num_samples = sum(counts)
        self._epochs: dict[int, np.ndarray] = {}

    def sample_indices(self, start: int, count: int) -> np.ndarray:
        """(count,) int64, the samples of images ``start``, ``start + 1``, ... of the stream."""
        if start < 0 or count < 0:
            raise UserError(f"start={start} and count={count} must not be negative.")
        pieces = [np.empty(0, dtype=np.int64)]
        while count > 0:
            epoch, place = divmod(start, self._num_samples)
            piece = self._epoch(epoch)[place : place + count]
            pieces.append(piece)
            start, count = start + len(piece), count - len(piece)
        return np.concatenate(pieces)

    def substitute(self, image: int, attempt: int) -> int:
        """The sample that takes the place of ``image`` if those of all attempts before are bad.

        Args:
            image: of the stream.
            attempt: from 1; each is far from the others, in other windows where there are any.
        """
        epoch, place = divmod(image, self._num_samples)
        return int(self._epoch(epoch)[elsewhere(place, attempt, self._num_samples)])

    def window_at(self, image: int) -> Window:
        """The window that holds an image of the stream."""
        epoch, place = divmod(image, self._num_samples)
        windows = _window_of_shard(len(self._counts), self._seed, epoch, self._window)
        ends = np.cumsum(np.bincount(windows, weights=self._counts).astype(np.int64))
        number = int(np.searchsorted(ends, place, side="right"))
        end = image - place + int(ends[number])
        return Window(end, np.flatnonzero(windows == number).tolist())

    def _epoch(self, epoch: int) -> np.ndarray:
        if epoch not in self._epochs:
            self._epochs = {e: p for e, p in self._epochs.items() if abs(e - epoch) == 1}
            self._epochs[epoch] = epoch_order(self._counts, self._seed, epoch, self._window)
        return self._epochs[epoch]
