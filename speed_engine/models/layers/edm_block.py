"""The block of EDM's U-Nets (Karras et al. 2022), under its names of parameters.

Letters: B images, C channels, H x W pixels, N = H W places, E width of the embedding of t.
"""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from speed_engine.models.layers.attention import split_heads
from speed_engine.models.layers.blocks import recomputable
from speed_engine.models.layers.fused import FusedLinear, Maps, holding
from speed_engine.models.layers.group_norm import GroupNormSiLU
from speed_engine.models.layers.initial import zeroed
from speed_engine.runtime.checks import UserError


class Style(NamedTuple):
    """What the two networks build differently."""

    head_channels: int | None  # of an attention head; None is one head
    skip_scale: float  # of every sum of two branches
    eps: float  # of the norms
    scale_shift_norm: bool  # t scales and shifts inside the norm, rather than being added before it
    project_resampled: bool  # a 1 x 1 convolution on every skip that changes the resolution
    narrow_start: bool  # the first convolution ignores the finest level's multiplier
    sparse_attention_up: bool  # on the way up, only the last block of a level attends


class EdmBlock(nn.Module):
    """Two convolutions that know t, beside a skip, then attention.

    Args:
        channels: of the input.
        out_channels: of the output.
        embedding_dim: E.
        style: of the network.
        dropout: probability before the second convolution.
        resample: applied to both branches.
        attention: whether all places attend to all places at the end.
    """

    def __init__(
        self,
        channels: int,
        out_channels: int,
        embedding_dim: int,
        style: Style,
        dropout: float,
        resample: nn.Module | None = None,
        attention: bool = False,
    ) -> None:
        super().__init__()
        self.channels, self.style, self.resample = channels, style, resample or nn.Identity()
        self.norm0 = GroupNormSiLU(norm_groups(channels), channels, style.eps)
        self.conv0 = nn.Conv2d(channels, out_channels, 3, padding=1)
        parts = 1 + style.scale_shift_norm
        self.affine = FusedLinear(embedding_dim, parts * out_channels, parts)
        self.norm1 = GroupNormSiLU(norm_groups(out_channels), out_channels, style.eps)
        self.dropout = nn.Dropout(dropout)
        self.conv1 = zeroed(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        projected = channels != out_channels or (style.project_resampled and resample is not None)
        self.skip = nn.Conv2d(channels, out_channels, 1) if projected else nn.Identity()
        self.num_heads = 0
        if attention:
            self.num_heads = _heads(out_channels, style.head_channels)
            self.norm2 = nn.GroupNorm(norm_groups(out_channels), out_channels, style.eps)
            self.qkv = holding(Maps((-1, 3), axis=1), nn.Conv2d(out_channels, 3 * out_channels, 1))
            self.proj = zeroed(nn.Conv2d(out_channels, out_channels, 1))

    @recomputable
    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """(B, C, H, W), (B, E) -> (B, C, H, W) of other sizes."""
        h = self.conv0(self.resample(self.norm0(x)))
        modulation = self.affine(embedding)
        if self.style.scale_shift_norm:
            h = self.norm1(h, *modulation.chunk(2, dim=1))
        else:
            h = self.norm1(h + modulation[:, :, None, None])
        h = self.conv1(self.dropout(h))
        x = (self.skip(self.resample(x)) + h) * self.style.skip_scale
        return (x + self._attend(x)) * self.style.skip_scale if self.num_heads else x

    def _attend(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm2(x)).flatten(2).transpose(1, 2)  # (B, N, 3 C)
        q, k, v = split_heads(qkv, self.num_heads).unflatten(-1, (-1, 3)).unbind(-1)
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.proj(h.transpose(1, 2).reshape(x.shape))


def norm_groups(channels: int) -> int:
    """32, or fewer where a group would have less than 4 channels; 0 where there are less than 4."""
    return min(32, channels // 4)


def _heads(channels: int, head_channels: int | None) -> int:
    if head_channels is None:
        return 1
    if channels % head_channels:
        raise UserError(
            f"an attention has {channels} channels; needed: a multiple of {head_channels}, the "
            f"channels of a head. Change model_channels or channel_mult."
        )
    return channels // head_channels
