"""Any model, conditioned on a low-resolution version of the image it is to generate.

The smaller image is enlarged to the size of x and joined to it along the channels (Saharia et al.
2021, SR3, section 2.3), and beside it the level of its noise as a constant plane.

Letters: B images, C channels, H x W pixels, h x w pixels of the smaller image.
"""

from collections.abc import Mapping, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conditioned_channels(channels: int, low_channels: int) -> int:
    """Input channels that the model needs: those of x, of the smaller image and of its noise."""
    return channels + low_channels + 1


class SuperResolution(nn.Module):
    """A model with ``conditioned_channels`` of input.

    Args:
        model: called with what is joined in place of x.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    @property
    def blocks(self) -> nn.ModuleList:
        """Of the model, if it has any."""
        return cast(nn.ModuleList, self.model.blocks)

    @property
    def ends(self) -> tuple[nn.Module, ...]:
        """As the model declares them."""
        return getattr(self.model, "ends", ())

    @property
    def training_passes(self) -> Sequence[Mapping[str, int]]:
        """As the model declares them; by default one plain pass."""
        return getattr(self.model, "training_passes", ({},))

    @property
    def features(self) -> tuple[str, ...]:
        """As the model declares them."""
        return getattr(self.model, "features", ())

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        low_resolution: Tensor,
        low_resolution_noise: Tensor | None = None,
        **conditions: Tensor,
    ) -> Tensor:
        """As the model answers.

        Args:
            x: (B, C, H, W).
            t: (B,).
            low_resolution: (B, C, h, w).
            low_resolution_noise: (B,) level of its noise, in [0, 1]; None is none.
            conditions: what else the model takes.
        """
        enlarged = F.interpolate(low_resolution, x.shape[-2:], mode="bilinear").to(x.dtype)
        level = x.new_zeros(len(x)) if low_resolution_noise is None else low_resolution_noise
        plane = level.to(x.dtype).view(-1, 1, 1, 1).expand(-1, 1, *x.shape[-2:])
        return self.model(torch.cat([x, enlarged, plane], dim=1), t, **conditions)
