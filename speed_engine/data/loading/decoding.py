"""Samples to the arrays of a batch, and what happens to a sample that is damaged.

Damage is a checksum that does not match, or bytes that no decoder accepts; a policy decides:

    stop    the run ends with an error that names the sample
    skip    another sample of the epoch takes its place, see ``DataOrder.substitute``: sizes and
            positions stay as they were, and so does what the run sees when it is repeated

A sample that is intact but unlike the others (shape, dtype, label out of range) always stops the
run: there the configuration is wrong, or the data set is. So does a shard that cannot be read at
all; put back, the run resumes.

Letters: B images of a batch.
"""

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Literal

import numpy as np
import torch

from speed_engine.data.batch import StoredBatch
from speed_engine.data.format.decode import (
    UnfitSample,
    decode_image,
    decode_labels,
    decode_npy_rows,
    decode_pictures,
)
from speed_engine.data.format.errors import ShardError
from speed_engine.data.format.reader import RawBatch, Sample, ShardReader
from speed_engine.data.loading.conditions import condition_name, decode_condition
from speed_engine.data.loading.order import elsewhere
from speed_engine.runtime.checks import UserError

log = logging.getLogger(__name__)

IMAGE = "image"  # in a decoded sample, beside the names of its conditions
TOGETHER = 2**28  # bytes of pictures that are read before the first is decoded
ATTEMPTS = 100  # substitutes of one sample; more are damaged only where nearly everything is
_WIDEST = 8  # bytes of one number
BAD_IN_A_ROW = 2000  # damaged samples of a stream before it is given up

ALLOCATE = partial(np.empty, dtype=np.uint8)  # bytes -> ordinary memory; workers share theirs

Shape = tuple[int, int, int]  # C, H, W
OnBadSample = Literal["skip", "stop"]
Row = dict[str, np.ndarray]
Describe = Callable[[], str]


class BatchReader:
    """Reads, verifies and decodes the samples of a batch.

    Args:
        reader: its first key is the image, the others are conditions.
        image_shape: (C, H, W) that every image must have.
        num_classes: labels must be less; None accepts any.
        on_bad_sample: the policy for damage.
    """

    def __init__(
        self,
        reader: ShardReader,
        image_shape: Shape,
        num_classes: int | None = None,
        on_bad_sample: OnBadSample = "stop",
    ) -> None:
        self.reader = reader
        self._shape, self._num_classes = image_shape, num_classes
        self.stops = on_bad_sample == "stop"
        image, *conditions = reader.keys
        self._members = [(image, IMAGE), *((key, condition_name(key)) for key in conditions)]
        self._holds_arrays = _is_npy(image)

    def read(
        self,
        samples: Sequence[int] | np.ndarray,
        substitute: Callable[[int, int], int] | None = None,
        allocate: Callable[[int], np.ndarray] = ALLOCATE,
        ids: np.ndarray | None = None,
    ) -> StoredBatch:
        """The batch of ``samples``, in their order.

        Args:
            samples: (B,) numbers.
            substitute: (place in the batch, attempt from 1) -> number of another sample; needed to
                skip.
            allocate: bytes -> memory of that size, for the images; called once at most.
            ids: (B,) int64 positions in the stream; None takes the numbers.

        Raises:
            UserError: a sample is damaged and the policy is to stop, or it is unfit; names it.
            OSError: a shard cannot be read.
        """
        numbers = np.asarray(samples, dtype=np.int64)
        ids = numbers if ids is None else ids
        if self._holds_arrays:  # which stay where they are read to
            # A single sample that is much larger than all must be must not enlarge every row.
            limit = TOGETHER + len(numbers) * _WIDEST * math.prod(self._shape)
            raw = self.reader.read_batch(numbers, allocate, limit)
        else:
            raw = self.reader.read_batch(numbers, ALLOCATE, limit=TOGETHER)
        if raw is not None:
            if (uniform := self._decode_all(raw, allocate)) is not None:
                return _batch(uniform, ids, [])
            read = map(raw.sample, range(len(numbers)))
        else:
            read = self.reader.stream(numbers)
        replaced: list[str] = []
        rows = self._decode_each(numbers.tolist(), read, substitute, replaced)
        return _batch(_stack(rows, len(numbers)), ids, replaced)

    def collect(
        self, samples: Iterator[tuple[str, Sample | ShardError]], ids: np.ndarray
    ) -> StoredBatch:
        """The next samples of a stream; after a damaged one the policy takes another, or stops.

        Args:
            samples: (description, members), without end.
            ids: (B,) int64 positions in the stream.

        Raises:
            UserError: as ``read`` does, or too many in a row are damaged.
        """
        replaced: list[str] = []
        rows = islice(self._sound(samples, replaced), len(ids))
        return _batch(_stack(rows, len(ids)), ids, replaced)

    def _sound(
        self, samples: Iterator[tuple[str, Sample | ShardError]], replaced: list[str]
    ) -> Iterator[tuple[Describe, Row]]:
        bad = 0  # in a row
        for where, sample in samples:
            describe = partial(str, where)
            try:
                row = self.decode(sample, describe)
            except ShardError as damage:
                bad += 1
                if self.stops or bad > BAD_IN_A_ROW:  # rather than look for ever
                    raise
                replaced.append(str(damage))
            else:
                yield describe, row
                bad = 0

    def _decode_all(self, raw: RawBatch, allocate: Callable[[int], np.ndarray]) -> Row | None:
        """All samples at once; None unless they are intact, fit and alike."""
        arrays: Row = {}
        try:
            for column, (key, name) in reversed([*enumerate(self._members)]):  # pictures last
                array = self._decode_column(raw, column, key, name, allocate)
                if array is None:
                    return None
                arrays[name] = array
        except ValueError:
            return None
        limit = self._num_classes
        if limit is not None and "labels" in arrays and arrays["labels"].max() >= limit:
            return None
        return arrays

    def _decode_column(
        self, raw: RawBatch, k: int, key: str, name: str, allocate: Callable[[int], np.ndarray]
    ) -> np.ndarray | None:
        """The k-th member of all samples, arrays without a copy; None unless they are alike."""
        members, shape = raw.members(k), self._shape
        if members is None:
            return None
        if name == "labels":
            return decode_labels(raw.memory, raw.offset[:, k], raw.size[:, k])
        if name != IMAGE:
            shape = decode_condition(members[0], key, self._shape[0]).shape
        if not _is_npy(key):
            memory = allocate if name == IMAGE else ALLOCATE
            return decode_pictures(members, key, self._shape[0], shape, memory)
        if name == IMAGE and decode_image(members[0], key, self._shape[0]).dtype == np.int64:
            return None
        rows = raw.member_rows(k)
        array = None if rows is None else decode_npy_rows(rows)
        return array if array is not None and array.shape[1:] == shape else None

    def _decode_each(
        self,
        numbers: list[int],
        samples: Iterable[Sample | ShardError],
        substitute: Callable[[int, int], int] | None,
        replaced: list[str],
    ) -> Iterator[tuple[Describe, Row]]:
        for place, (number, sample) in enumerate(zip(numbers, samples, strict=True)):
            try:
                row = self.decode(sample, partial(self.reader.describe, number))
            except ShardError as damage:
                if self.stops or substitute is None:
                    raise
                replaced.append(str(damage))
                number, row = self._replace(place, substitute, damage)
            yield partial(self.reader.describe, number), row

    def _replace(
        self, place: int, substitute: Callable[[int, int], int], damage: ShardError
    ) -> tuple[int, Row]:
        for attempt in range(1, ATTEMPTS + 1):
            number = substitute(place, attempt)
            try:
                (sample,) = self.reader.stream([number])
                return number, self.decode(sample, partial(self.reader.describe, number))
            except ShardError:
                continue
        raise ShardError(
            f"{damage} None of {ATTEMPTS} samples elsewhere could take its place; run "
            "`speed-engine shards check`."
        ) from damage

    def decode(self, sample: Sample | ShardError, describe: Describe) -> Row:
        """The image, under ``IMAGE``, and the conditions of a sample; ``describe`` names it.

        Raises:
            ShardError: it is damaged.
            UnfitSample: it is intact, but unlike what is expected.
        """
        if isinstance(sample, ShardError):
            raise sample
        channels, height, width = self._shape
        try:
            (key, _), *conditions = self._members
            image = decode_image(sample[key], key, channels, (height, width))
            row = {IMAGE: image}
            for key, name in conditions:
                row[name] = decode_condition(sample[key], key, channels)
        except UnfitSample as error:
            raise UnfitSample(f"{describe()}: {error}") from error
        except ValueError as error:
            raise ShardError(f"{describe()}: {error}") from error
        if image.shape != self._shape or image.dtype == np.int64:
            raise UnfitSample(
                f"{describe()}: the image is {image.dtype} of shape "
                f"{image.shape}; expected uint8 or floating point of shape {self._shape}. Correct "
                f"image_shape or the data."
            )
        label = row.get("labels")
        if self._num_classes is not None and label is not None and label >= self._num_classes:
            raise UnfitSample(
                f"{describe()} has label {label}; needed: less than "
                f"num_classes={self._num_classes}. Correct num_classes or the data."
            )
        return row


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

    Raises:
        UserError: what is stored are no pixels, or as ``BatchReader.read`` does.
    """
    groups = np.zeros(len(reader)) if groups is None else groups

    def substitute(place: int, attempt: int) -> int:
        own = np.flatnonzero(groups == groups[place])
        return int(own[elsewhere(int(np.searchsorted(own, place)), attempt, len(own))])

    batches = BatchReader(reader, image_shape, on_bad_sample=on_bad_sample)
    images, conditions, _, replaced = batches.read(range(len(reader)), substitute)
    if images.dtype != torch.uint8:
        dtype = str(images.dtype).removeprefix("torch.")
        raise UserError(f"{reader.describe(0)} holds {dtype}; needed: uint8 pixels.")
    if replaced:
        log.warning("%d damaged samples are replaced in evaluation.", len(replaced))
    stored = {name: value.numpy() for name, value in conditions.items()}
    return np.ascontiguousarray(images.numpy()), stored


def _batch(arrays: Row, ids: np.ndarray, replaced: Sequence[str]) -> StoredBatch:
    """In the memory of the arrays; bfloat16, which NumPy lacks, from its bits."""
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    images = tensors.pop(IMAGE)
    if images.dtype == torch.uint16:
        images = images.view(torch.bfloat16)
    return StoredBatch(images, tensors, torch.from_numpy(ids), tuple(replaced))


def _stack(rows: Iterable[tuple[Describe, Row]], count: int) -> Row:
    """(count, ...) each; raises UnfitSample where a row is unlike the first."""
    arrays: Row = {}
    for place, (describe, row) in enumerate(rows):
        for name, value in row.items():
            if place == 0:
                arrays[name] = _allocate(count, value)
            array = arrays[name]
            if value.dtype != array.dtype or value.shape != array.shape[1:]:
                raise UnfitSample(
                    f"{describe()} has {name} of {value.dtype} and shape {value.shape}, others "
                    f"{array.dtype} and {array.shape[1:]}; a data set needs one dtype and shape."
                )
            array[place] = value
    return arrays


def _is_npy(key: str) -> bool:
    return f".{key}".endswith(".npy")


def _allocate(num_rows: int, row: np.ndarray) -> np.ndarray:
    """(B, *row.shape), each laid out as ``row`` is, so that filling it copies whole blocks."""
    order = sorted(range(row.ndim), key=lambda axis: -row.strides[axis])
    memory = np.empty((num_rows, *(row.shape[axis] for axis in order)), dtype=row.dtype)
    return memory.transpose(0, *(1 + order.index(axis) for axis in range(row.ndim)))
