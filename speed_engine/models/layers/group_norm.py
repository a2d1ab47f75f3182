"""Group normalisation followed by SiLU, the pair before every convolution of a U-Net.

    y = silu(normalised(x) * (1 + scale) + shift)

Letters: B images, C channels, H x W pixels, G groups.
"""

from torch import Tensor, nn

from speed_engine.ops import group_norm_silu

NORM_GROUPS = 32  # of ADM and latent diffusion


class GroupNormSiLU(nn.GroupNorm):
    """``ops.group_norm_silu`` with parameters; those of ``nn.GroupNorm``."""

    def forward(
        self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None
    ) -> Tensor:
        """(B, C, H, W), (B, C), (B, C) -> (B, C, H, W)."""
        return group_norm_silu(x, self.num_groups, self.weight, self.bias, scale, shift, self.eps)
