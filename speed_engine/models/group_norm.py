"""Group normalisation followed by SiLU, the pair before every convolution of a U-Net.

    y = silu(normalised(x) * (1 + scale) + shift)

Letters: B images, C channels, H x W pixels, G groups.
"""

import torch.nn.functional as F
from torch import Tensor, nn


def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """(B, C, H, W) -> (B, C, H, W) of the same memory format.

    Args:
        x: any floating type; statistics are taken in float32 or better.
        num_groups: G; divides C.
        weight: (C,) of the norm.
        bias: (C,) of the norm.
        scale: (B, C) of the condition; given together with shift.
        shift: (B, C) of the condition.
        eps: added to the variance of a group.
    """
    y = F.group_norm(x, num_groups, weight, bias, eps)
    if scale is not None and shift is not None:
        y = y * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
    return F.silu(y)


class GroupNormSiLU(nn.GroupNorm):
    """``group_norm_silu`` with parameters; those of ``nn.GroupNorm``."""

    def forward(
        self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None
    ) -> Tensor:
        """(B, C, H, W), (B, C), (B, C) -> (B, C, H, W)."""
        return group_norm_silu(x, self.num_groups, self.weight, self.bias, scale, shift, self.eps)
