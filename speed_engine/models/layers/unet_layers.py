"""The parts of the U-Net of ADM and latent diffusion, under their names of parameters.

Letters: B images, C channels, H x W pixels, N = H W places, E width of the embedding of t,
L tokens of a text, D width of a token.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speed_engine.models.layers.attention import split_heads
from speed_engine.models.layers.blocks import recomputable
from speed_engine.models.layers.fused import FusedLinear, Maps, holding
from speed_engine.models.layers.group_norm import NORM_GROUPS, GroupNormSiLU
from speed_engine.models.layers.initial import zeroed
from speed_engine.runtime.checks import UserError


def laid_out(x: Tensor) -> Tensor:
    """Images as convolutions want them: on a GPU with channels last, which all layers then keep.

    The kernels of a step of the paper's U-Net take an H200 a seventh less time so
    (``benchmarks/results/nvidia-h200/gpu_defaults.json``).
    """
    return x.contiguous(memory_format=torch.channels_last) if x.is_cuda else x


class ResBlock(nn.Module):
    """Two convolutions that know t, beside a skip; at first the skip alone.

    Args:
        channels: of the input.
        out_channels: of the output.
        embedding_dim: E.
        scale_shift_norm: t scales and shifts inside the second norm.
        dropout: probability before the second convolution.
        resample: applied to both branches.
    """

    def __init__(
        self,
        channels: int,
        out_channels: int,
        embedding_dim: int,
        scale_shift_norm: bool,
        dropout: float,
        resample: nn.Module | None,
    ) -> None:
        super().__init__()
        self.scale_shift_norm, self.resample = scale_shift_norm, resample or nn.Identity()
        self.in_layers = nn.Sequential(
            GroupNormSiLU(NORM_GROUPS, channels),
            nn.Identity(),  # where the originals have their SiLU
            nn.Conv2d(channels, out_channels, 3, padding=1),
        )
        parts = 2 if scale_shift_norm else 1
        emb_layer = FusedLinear(embedding_dim, parts * out_channels, parts)
        self.emb_layers = nn.Sequential(nn.SiLU(), emb_layer)
        self.out_layers = nn.Sequential(
            GroupNormSiLU(NORM_GROUPS, out_channels),
            nn.Identity(),
            nn.Dropout(dropout),
            zeroed(nn.Conv2d(out_channels, out_channels, 3, padding=1)),
        )
        same = channels == out_channels
        self.skip_connection = nn.Identity() if same else nn.Conv2d(channels, out_channels, 1)

    @recomputable
    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """(B, C, H, W), (B, E) -> (B, C, H, W) of other sizes."""
        in_norm, _, in_conv = self.in_layers
        out_norm, _, dropout, out_conv = self.out_layers
        h = in_conv(self.resample(in_norm(x)))
        modulation = self.emb_layers(embedding)
        if self.scale_shift_norm:
            h = out_norm(h, *modulation.chunk(2, dim=1))
        else:
            h = out_norm(h + modulation[:, :, None, None])
        return self.skip_connection(self.resample(x)) + out_conv(dropout(h))


class AttentionBlock(nn.Module):
    """Residual attention of all places to all places; at first the identity."""

    def __init__(self, channels: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm = nn.GroupNorm(NORM_GROUPS, channels)
        # The originals' 1 x 1 convolutions, of which only the parameters are used.
        self.qkv = holding(Maps((num_heads, 3, -1), axis=1), nn.Conv1d(channels, 3 * channels, 1))
        self.proj_out = zeroed(nn.Conv1d(channels, channels, 1))

    @recomputable
    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        places = self.norm(x).flatten(2).transpose(1, 2)  # (B, N, C)
        qkv = F.linear(places, self.qkv.weight[:, :, 0], self.qkv.bias)
        q, k, v = split_heads(qkv, self.num_heads).chunk(3, dim=-1)
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        h = F.linear(h, self.proj_out.weight[:, :, 0], self.proj_out.bias)
        return x + h.transpose(1, 2).reshape(x.shape)


class Downsample(nn.Module):
    """(B, C, H, W) -> (B, C, H/2, W/2), a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H/2, W/2)."""
        return self.op(x)


class Upsample(nn.Module):
    """(B, C, H, W) -> (B, C, 2H, 2W), nearest, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, 2H, 2W)."""
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class Halve(nn.AvgPool2d):
    """(B, C, H, W) -> (B, C, H/2, W/2), means."""

    def __init__(self) -> None:
        super().__init__(2)


class Double(nn.Upsample):
    """(B, C, H, W) -> (B, C, 2H, 2W), nearest."""

    def __init__(self) -> None:
        super().__init__(scale_factor=2, mode="nearest")


def check_halvings(input_size: tuple[int, int], levels: int) -> None:
    """Refuse a size that cannot be halved between all levels."""
    factor = 2 ** (levels - 1)
    if any(size % factor for size in input_size):
        height, width = input_size
        raise UserError(
            f"{levels} levels halve the input {levels - 1} times: its size {height} x {width} must "
            f"be a multiple of {factor} both ways."
        )


def check_given(name: str, value: Tensor | None, needed: bool) -> None:
    """Refuse a condition that the model was not built for, and the lack of one that it was."""
    if (value is not None) != needed:
        verb = "needs" if needed else "was built without, and has no use for,"
        raise UserError(f"this U-Net {verb} {name}.")
