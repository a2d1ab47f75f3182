"""What a model is conditioned on beside x and t, and what stands for no condition.

Conditions are named tensors with one row per image, arguments of the model: ``labels``, ``tokens``,
``low_resolution``. Those that have a null value can be hidden, so that one model is
conditional and unconditional, and guidance can extrapolate between both (Ho and Salimans 2022,
section 3.2).

Letters: B images.
"""

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from speed_engine.ops import Stream, normal, random_bits

Conditions = dict[str, Tensor]


class ConditionChange(Protocol):
    """What training does to conditions, a function of the run's seed and the images' counters."""

    def __call__(self, conditions: Conditions, seed: Tensor, ids: Tensor) -> Conditions:
        """(B, ...) each, (), (B,) int64 -> (B, ...) each."""
        ...


def hidden(conditions: Conditions, null: Mapping[str, Tensor]) -> Conditions:
    """The conditions with every one that has a null value replaced by it; same shapes."""
    return {
        name: null[name].to(value).expand_as(value) if name in null else value
        for name, value in conditions.items()
    }


class ConditionDropout(nn.Module):
    """Hides the conditions of a share of the images, all that can be hidden of an image together.

    Args:
        null: value of one row, by the condition's name, that stands for no condition.
        share: of the images, in [0, 1].
    """

    def __init__(self, null: Mapping[str, Tensor], share: float) -> None:
        super().__init__()
        self.share = share
        self._names = tuple(null)
        for name, value in null.items():
            self.register_buffer(f"null_{name}", value, persistent=False)

    @property
    def null(self) -> dict[str, Tensor]:
        """Of every condition that can be hidden."""
        return {name: self.get_buffer(f"null_{name}") for name in self._names}

    def forward(self, conditions: Conditions, seed: Tensor, ids: Tensor) -> Conditions:
        """(B, ...) each, (), (B,) image counters -> (B, ...) each, a function of seed and ids."""
        null = {name: value for name, value in self.null.items() if name in conditions}
        if not null:
            return conditions
        words = random_bits(seed, ids, 1, Stream.LABEL_DROPOUT)[:, 0]
        drop = words < round(self.share * 2**32)
        return conditions | {
            name: torch.where(_like(drop, conditions[name]), blank, conditions[name])
            for name, blank in hidden({n: conditions[n] for n in null}, null).items()
        }


class LowResolutionNoise(nn.Module):
    """Gaussian noise on the low-resolution image, of a level that the model is conditioned on.

    Conditioning augmentation (Ho et al. 2022, Cascaded Diffusion Models, section 4.2): the model
    learns to mend what a smaller model gets wrong. It is noise of the variance-preserving process,
    s ~ U(0, strongest):  low <- sqrt(1 - s^2) low + s noise,  and ``low_resolution_noise`` = s.

    Args:
        strongest: level, in [0, 1]; 0 adds none.
    """

    def __init__(self, strongest: float) -> None:
        super().__init__()
        self.strongest = strongest

    def forward(self, conditions: Conditions, seed: Tensor, ids: Tensor) -> Conditions:
        """(B, ...) each, (), (B,) image counters -> (B, ...) each, and the level (B,)."""
        if "low_resolution" not in conditions:
            return conditions
        low = conditions["low_resolution"]
        words = random_bits(seed, ids, 1, Stream.LOW_RESOLUTION_LEVEL)[:, 0]
        level = self.strongest * (words.float() + 0.5) / 2**32
        noise = normal(seed, ids, low[0].numel(), Stream.LOW_RESOLUTION_NOISE).view_as(low)
        share = _like(level, low)
        noised = (1 - share.square()).sqrt() * low + share * noise
        return conditions | {"low_resolution": noised, "low_resolution_noise": level}


def _like(rows: Tensor, value: Tensor) -> Tensor:
    """(B,) -> (B, 1, ...) of as many dimensions as ``value``."""
    return rows.view(-1, *[1] * (value.ndim - 1))
