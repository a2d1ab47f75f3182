"""Memory that workers fill with batches, again and again.

A batch travels from a worker to the process that trains in shared memory, and new shared memory
costs more than what is put into it: the kernel clears every page (25 MB: 28 ms; filled again, 4).
So every worker keeps a few pieces. The number of a piece goes along with its batch, and comes back
when nobody holds the batch any more.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.multiprocessing import SimpleQueue
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.data import get_worker_info

PIECES = 6  # of one worker: those in flight, and two that are looked at


class Piece(NamedTuple):
    """What a batch was written to."""

    worker: int
    number: int


class SharedMemory:
    """Made before the workers start: they call ``empty`` and ``lend``, their parent the others.

    Args:
        workers: their number; without any, memory is ordinary.
    """

    def __init__(self, workers: int) -> None:
        self._returned: list[SimpleQueue] = [SimpleQueue() for _ in range(workers)]
        self._pieces: list[torch.UntypedStorage] = []  # of this worker
        self._free: list[int] = []  # the last is the one to be filled
        self._lent: list[tuple[list[StorageWeakRef], Piece]] = []  # held here, of all workers

    def empty(self, num_bytes: int) -> np.ndarray:
        """(num_bytes,) uint8, overwritten by the next call unless ``lend`` comes before it."""
        worker = get_worker_info()
        if worker is None:
            return np.empty(num_bytes, dtype=np.uint8)
        returned = self._returned[worker.id]
        while not returned.empty():
            self._free.append(returned.get())
        if not self._free:
            if len(self._pieces) == PIECES:  # whoever keeps so many batches gets each a copy
                return np.empty(num_bytes, dtype=np.uint8)
            self._free.append(len(self._pieces))
            self._pieces.append(_shared(num_bytes))
        number = self._free[-1]
        if self._pieces[number].nbytes() < num_bytes:
            self._pieces[number] = _shared(num_bytes)
        whole = torch.empty(0, dtype=torch.uint8).set_(self._pieces[number])
        return whole.numpy()[:num_bytes]

    def lend(self, batch: Iterable[Tensor]) -> tuple[list[Tensor], Piece | None]:
        """The tensors of a batch, in the same memory, and the piece that they are in."""
        tensors, piece = [], None
        for tensor in batch:
            if self._free and (inside := _inside(tensor, self._pieces[self._free[-1]])) is not None:
                tensor, worker = inside, get_worker_info()
                assert worker is not None
                piece = Piece(worker.id, self._free[-1])
            tensors.append(tensor)
        if piece is not None:
            self._free.pop()
        return tensors, piece

    def watch(self, tensors: Iterable[Tensor], piece: Piece) -> None:
        """Remember that these tensors, received from a worker, are in a piece of its memory."""
        self._lent.append(([StorageWeakRef(t.untyped_storage()) for t in tensors], piece))

    def give_back(self) -> None:
        """Tell the workers which pieces nobody holds any more: all their tensors are gone."""
        held = []
        for storages, piece in self._lent:
            if all(storage.expired() for storage in storages):
                self._returned[piece.worker].put(piece.number)
            else:
                held.append((storages, piece))
        self._lent = held


def _shared(num_bytes: int) -> torch.UntypedStorage:
    return torch.UntypedStorage._new_shared(num_bytes)


def _inside(tensor: Tensor, storage: torch.UntypedStorage) -> Tensor | None:
    """The same tensor as a part of ``storage``; None if its memory is elsewhere."""
    offset = tensor.untyped_storage().data_ptr() - storage.data_ptr()
    start, rest = divmod(offset, tensor.element_size())
    if not 0 <= offset < storage.nbytes() or rest:
        return None
    return tensor.new_empty(0).set_(storage, start, tensor.shape, tensor.stride())
