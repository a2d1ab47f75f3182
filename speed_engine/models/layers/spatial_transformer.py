"""Transformer blocks on the places of an image that attend to the tokens of a text.

Parameter names and numerics follow CompVis/latent-diffusion (Rombach et al. 2022, section 3.3).

Letters: B images, C channels, H x W pixels, N = H W places, L tokens, D width of a token, K heads.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from speed_engine.models.layers.attention import split_heads
from speed_engine.models.layers.blocks import recomputable
from speed_engine.models.layers.fused import FusedLinear
from speed_engine.models.layers.group_norm import NORM_GROUPS
from speed_engine.models.layers.initial import zeroed


class SpatialTransformer(nn.Module):
    """Residual transformer blocks between two linear maps; at first the identity.

    Args:
        channels: C, a multiple of 32.
        num_heads: K; divides C.
        token_dim: D.
        depth: number of blocks.
    """

    def __init__(self, channels: int, num_heads: int, token_dim: int, depth: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(NORM_GROUPS, channels, eps=1e-6)
        self.proj_in = nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(channels, num_heads, token_dim) for _ in range(depth)
        )
        self.proj_out = zeroed(nn.Conv2d(channels, channels, 1))

    @recomputable
    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        """(B, C, H, W), (B, L, D) -> (B, C, H, W)."""
        h = self.proj_in(self.norm(x))
        places = h.flatten(2).transpose(1, 2)  # (B, N, C)
        for block in self.transformer_blocks:
            places = block(places, tokens)
        return x + self.proj_out(places.transpose(1, 2).reshape(h.shape))


class TransformerBlock(nn.Module):
    """Attention among places, attention to tokens, feed-forward; each residual, normed before."""

    def __init__(self, dim: int, num_heads: int, token_dim: int) -> None:
        super().__init__()
        self.attn1 = Attention(dim, num_heads, dim)
        self.ff = GatedFeedForward(dim)
        self.attn2 = Attention(dim, num_heads, token_dim)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        """(B, N, C), (B, L, D) -> (B, N, C)."""
        h = self.norm1(x)
        x = x + self.attn1(h, h)
        x = x + self.attn2(self.norm2(x), tokens)
        return x + self.ff(self.norm3(x))


class Attention(nn.Module):
    """Attention of places to whatever is given as source."""

    def __init__(self, dim: int, num_heads: int, source_dim: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(source_dim, dim, bias=False)
        self.to_v = nn.Linear(source_dim, dim, bias=False)
        self.to_out = nn.Sequential(nn.Linear(dim, dim))

    def forward(self, x: Tensor, source: Tensor) -> Tensor:
        """(B, N, C), (B, L, D) -> (B, N, C)."""
        q, k, v = (
            split_heads(y, self.num_heads)
            for y in (self.to_q(x), self.to_k(source), self.to_v(source))
        )
        return self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class GatedFeedForward(nn.Module):
    """x -> W2 (a * gelu(b)) with (a, b) = W1 x, four times as wide inside."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.net = nn.Sequential(_Gated(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        return self.net(x)


class _Gated(nn.Module):
    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.proj = FusedLinear(dim, 2 * hidden_dim, 2)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)
