"""A batch, as the shards store it and as a training step takes it.

    StoredBatch     what workers send: uint8 pixels or latents, as they are in the shards
    Batch           what the device gets: clean images, ready to be noised

``loading/clean.py`` makes one of the other.

Letters: B images, C channels, H, W.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor


class StoredBatch(NamedTuple):
    """One rank's part of a global batch, as it is stored."""

    images: Tensor  # (B, C, H, W) uint8 pixels, or floating-point latents (of a posterior: 2C)
    conditions: dict[str, Tensor]  # (B, ...) each, by the model's argument, see conditions.py
    ids: Tensor  # (B,) int64 positions in the stream, the addresses of the run's random draws
    replaced: tuple[str, ...] = ()  # what was wrong with each sample that has a substitute

    def to(self, device: torch.device | str) -> "StoredBatch":
        """The same on ``device``, contiguous; copies are asynchronous from pinned memory."""
        conditions = {name: _moved(value, device) for name, value in self.conditions.items()}
        return StoredBatch(
            _moved(self.images, device), conditions, _moved(self.ids, device), self.replaced
        )


@dataclass(frozen=True, eq=False)
class Batch:
    """One rank's part of a global batch, on its device."""

    images: Tensor  # (B, C, H, W) float32, clean: pixels in [-1, 1], or scaled latents
    conditions: dict[str, Tensor]  # (B, ...) each; pictures as the images, other floats float32
    ids: Tensor  # (B,) int64 positions in the stream, the addresses of the run's random draws
    targets: dict[str, Tensor] = field(default_factory=dict)  # (B, ...) each, of further losses
    replaced: tuple[str, ...] = ()  # what was wrong with each sample that has a substitute

    def split(self, size: int) -> list["Batch"]:
        """Parts of ``size`` images; the last may be smaller. None of them has ``replaced``."""
        starts = range(0, len(self.ids), size)
        return [self.at(slice(start, start + size)) for start in starts]

    def at(self, rows: slice | Tensor) -> "Batch":
        """These of the images, by a slice or their (N,) int64 numbers, without ``replaced``."""
        conditions = {name: value[rows] for name, value in self.conditions.items()}
        targets = {name: value[rows] for name, value in self.targets.items()}
        return Batch(self.images[rows], conditions, self.ids[rows], targets)


def _moved(tensor: Tensor, device: torch.device | str) -> Tensor:
    return tensor.to(device, non_blocking=True).contiguous()
