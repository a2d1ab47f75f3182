"""Batches on their device, one ahead, so that copies run beside the computation."""

from collections.abc import Iterable, Iterator

import torch

from speed_engine.data.batch import StoredBatch


def on_device(batches: Iterable[StoredBatch], device: torch.device) -> Iterator[StoredBatch]:
    """The same batches, moved, as they are stored.

    On CUDA the next one is copied on a stream of its own while the current one is worked on; its
    memory is not reused before that work is done. Elsewhere nothing is read ahead.
    """
    if device.type != "cuda":
        for batch in batches:
            yield batch.to(device)
        return
    copies, computation = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    ready: StoredBatch | None = None
    for batch in batches:
        with torch.cuda.stream(copies):
            following = batch.to(device)
        if ready is not None:
            yield ready
        computation.wait_stream(copies)
        for tensor in (following.images, following.ids, *following.conditions.values()):
            tensor.record_stream(computation)
        ready = following
    if ready is not None:
        yield ready
