"""Group normalisation followed by SiLU, the pair before every convolution of a U-Net.

    y = silu(normalised(x) * (1 + scale) + shift)

Letters: B images, C channels, H x W pixels, G groups.
"""

from torch import Tensor, nn

from speed_engine.ops import group_norm_silu
from speed_engine.runtime.checks import UserError

NORM_GROUPS = 32  # of ADM and latent diffusion


class GroupNormSiLU(nn.GroupNorm):
    """``ops.group_norm_silu`` with parameters; those of ``nn.GroupNorm``.

    Raises:
        UserError: the groups do not divide the channels.
    """

    def __init__(self, num_groups: int, num_channels: int, eps: float = 1e-5) -> None:
        if not num_groups or num_channels % num_groups:
            raise UserError(
                f"a group norm has {num_channels} channels, of a level or of a level and a skip; "
                f"needed: a multiple of {num_groups or 4}. Change model_channels or channel_mult; "
                f"a model_channels that is a multiple of {NORM_GROUPS} fits."
            )
        super().__init__(num_groups, num_channels, eps)

    def forward(
        self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None
    ) -> Tensor:
        """(B, C, H, W), (B, C), (B, C) -> (B, C, H, W)."""
        return group_norm_silu(x, self.num_groups, self.weight, self.bias, scale, shift, self.eps)
