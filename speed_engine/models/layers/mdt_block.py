"""The block of the masked diffusion transformer: DiT's, knowing relative positions of some tokens.

Letters: B images, N tokens, K of them shown, D width, M heads.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speed_engine.models.layers.attention import SelfAttention
from speed_engine.models.layers.blocks import recomputable
from speed_engine.models.layers.embeddings import embedded
from speed_engine.models.layers.feed_forward import FeedForward
from speed_engine.models.layers.fused import FusedLinear


class Shown(NamedTuple):
    """The tokens that the encoder sees."""

    places: Tensor  # (B, K) int64, distinct in each image
    valid: Tensor | None  # (B, K) bool, False where a token is hidden after all; None is all True


class RelativePositionBias(nn.Module):
    """What is added to the attention of one place to another, by rows and columns between them."""

    relative_position_index: Tensor

    def __init__(self, grid: tuple[int, int], num_heads: int) -> None:
        super().__init__()
        self.grid = rows, columns = grid
        distances = (2 * rows - 1) * (2 * columns - 1)
        # The original has three rows more, which nothing reads.
        self.relative_position_bias_table = nn.Parameter(torch.empty(distances + 3, num_heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.register_buffer("relative_position_index", distance_index(rows, columns))

    def forward(self) -> Tensor:
        """() -> (M, N, N).

        By rows, then by columns: for both at once the product that is the gradient of ``embedded``
        on a GPU would have a factor of N * N numbers for every row of the table.
        """
        (rows, columns), across = self.grid, 2 * self.grid[1] - 1
        index = self.relative_position_index.view(rows, columns, rows, columns)
        down, right = index[:, 0, :, 0] // across, index[0, :, 0] % across
        table = self.relative_position_bias_table[: (2 * rows - 1) * across]
        by_rows = embedded(table.view(2 * rows - 1, -1), down.flatten())
        by_rows = by_rows.view(rows * rows, across, -1).transpose(0, 1).flatten(1)
        bias = embedded(by_rows, right.flatten()).view(columns, columns, rows, rows, -1)
        return bias.permute(4, 2, 0, 3, 1).reshape(-1, rows * columns, rows * columns)


class BiasedAttention(SelfAttention):
    """Self-attention of the shown tokens, with a bias by relative position."""

    def __init__(self, dim: int, num_heads: int, grid: tuple[int, int]) -> None:
        super().__init__(dim, num_heads)
        self.rel_pos_bias = RelativePositionBias(grid, num_heads)

    def forward(self, x: Tensor, shown: Shown | None = None) -> Tensor:
        """(B, N, D), or (B, K, D) of the shown tokens -> the same."""
        batch, num_tokens, dim = x.shape
        heads = self.qkv(x).view(batch, num_tokens, 3, self.num_heads, dim // self.num_heads)
        q, k, v = heads.permute(2, 0, 3, 1, 4)  # each (B, M, N, D / M)
        bias = self.rel_pos_bias().to(q.dtype)
        bias = bias.unsqueeze(0) if shown is None else bias_among(bias, shown)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.proj(attended.transpose(1, 2).flatten(2))


class MdtBlock(nn.Module):
    """DiT's block with biased attention; one with a skip first merges it with its input."""

    def __init__(
        self, dim: int, num_heads: int, mlp_ratio: float, grid: tuple[int, int], skip: bool = False
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.attn = BiasedAttention(dim, num_heads, grid)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.mlp = FeedForward(dim, int(dim * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), FusedLinear(dim, 6 * dim, 6))
        self.skip_linear = nn.Linear(2 * dim, dim) if skip else None

    @recomputable
    def forward(
        self, x: Tensor, condition: Tensor, shown: Shown | None = None, skip: Tensor | None = None
    ) -> Tensor:
        """(B, N, D), (B, D), (B, N, D) to merge -> (B, N, D)."""
        if self.skip_linear is not None:
            assert skip is not None
            x = self.skip_linear(torch.cat([x, skip], dim=-1))
        modulation = self.adaLN_modulation(condition).unsqueeze(1).chunk(6, dim=2)
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = modulation
        x = x + gate_attn * self.attn(self.norm1(x) * (1 + scale_attn) + shift_attn, shown)
        return x + gate_mlp * self.mlp(self.norm2(x) * (1 + scale_mlp) + shift_mlp)


def distance_index(rows: int, columns: int) -> Tensor:
    """(N, N) int64: the number of the (row, column) distance from one place to another."""
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    row, column = row.flatten(), column.flatten()
    down, right = row[:, None] - row + rows - 1, column[:, None] - column + columns - 1
    return down * (2 * columns - 1) + right


def bias_among(bias: Tensor, shown: Shown) -> Tensor:
    """(M, N, N) -> (B, M, K, K) among the shown tokens; none attends to one that is not valid.

    Two gathers, because the places of an image are distinct: no gradient is added twice to one
    element, so that sums have one order on every device.
    """
    (num_heads, num_tokens, _), (batch, num_shown) = bias.shape, shown.places.shape
    rows = shown.places[:, None, :, None].expand(-1, num_heads, -1, num_tokens)
    columns = shown.places[:, None, None, :].expand(-1, num_heads, num_shown, -1)
    among = bias.expand(batch, -1, -1, -1).gather(2, rows).gather(3, columns)
    if shown.valid is None:
        return among
    return among.masked_fill(~shown.valid[:, None, None, :], -torch.inf)
