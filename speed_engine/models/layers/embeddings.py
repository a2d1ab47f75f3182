"""What a token is made of: its patch, its place, the timestep and the label.

Letters: B images, C channels, H x W pixels, P patch size, N = (H/P)(W/P) tokens, D width.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FREQUENCY_DIM = 256  # sinusoidal features of t, as in DiT and ADM
MAX_PERIOD = 10_000


class PatchEmbedding(nn.Module):
    """(B, C, H, W) -> (B, N, D): a linear map of every P x P patch, row by row."""

    def __init__(self, patch_size: int, channels: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, N, D)."""
        return self.proj(x).flatten(2).transpose(1, 2)


class TimestepEmbedding(nn.Module):
    """(B,) timesteps on the scale 0 .. 1000 -> (B, D); see ``sinusoid`` for the frequency shift."""

    def __init__(self, dim: int, frequency_shift: float = 0) -> None:
        super().__init__()
        self.frequency_shift = frequency_shift
        self.mlp = nn.Sequential(nn.Linear(FREQUENCY_DIM, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t: Tensor) -> Tensor:
        """(B,) -> (B, D)."""
        features = sinusoid(t, FREQUENCY_DIM, self.frequency_shift)
        return self.mlp(features.to(next(self.mlp.parameters()).dtype))


class LabelEmbedding(nn.Module):
    """(B,) labels in [0, num_classes] -> (B, D); the last one stands for "no label"."""

    def __init__(self, num_classes: int, dim: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, dim)

    def forward(self, labels: Tensor) -> Tensor:
        """(B,) int64 -> (B, D)."""
        return embedded(self.embedding_table.weight, labels)


def embedded(table: Tensor, labels: Tensor) -> Tensor:
    """(K, D) rows, (B,) int64 -> (B, D): of each label its row.

    On a GPU the gradient of a row is a product that repeats bit for bit: code that is compiled as a
    whole would add to rows atomically, in no fixed order.
    """
    return _Embedded.apply(table, labels) if table.is_cuda else F.embedding(labels, table)


class _Embedded(torch.autograd.Function):
    @staticmethod
    def forward(ctx, table, labels):
        ctx.save_for_backward(labels)
        ctx.num_rows = len(table)
        return F.embedding(labels, table)

    @staticmethod
    def backward(ctx, dy):
        (labels,) = ctx.saved_tensors
        is_row = labels == torch.arange(ctx.num_rows, device=labels.device)[:, None]
        with torch.autocast(dy.device.type, enabled=False):
            return is_row.to(dy.dtype) @ dy, None


def unpatchify(tokens: Tensor, grid: tuple[int, int], patch_size: int) -> Tensor:
    """(B, N, P * P * C) -> (B, C, H, W): every token's values in its patch, channel fastest."""
    (rows, columns), p = grid, patch_size
    patches = tokens.unflatten(2, (p, p, -1)).unflatten(1, (rows, columns))
    return patches.permute(0, 5, 1, 3, 2, 4).reshape(len(tokens), -1, rows * p, columns * p)


def sinusoid(t: Tensor, dim: int, frequency_shift: float = 0) -> Tensor:
    """(B,) -> (B, dim) float32: cosines, then sines, of geometrically spaced frequencies.

    The i-th of n = dim / 2 is MAX_PERIOD ** (-i / (n - frequency_shift)): 0 in DiT and ADM, 1 in
    DDPM and in diffusers' DiT.
    """
    half = torch.arange(dim // 2, dtype=torch.float32, device=t.device)
    exponent = -math.log(MAX_PERIOD) * half / (dim // 2 - frequency_shift)
    angles = t.float()[:, None] * torch.exp(exponent)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def position_grid(rows: int, columns: int, dim: int) -> Tensor:
    """(1, rows * columns, dim) float32 fixed 2-D positions: D/2 for the column, D/2 for the row."""
    column, row = torch.meshgrid(torch.arange(columns), torch.arange(rows), indexing="xy")
    halves = [_positions(axis.flatten(), dim // 2) for axis in (column, row)]
    return torch.cat(halves, dim=1).float().unsqueeze(0)


def rotary_grid(rows: int, columns: int, dim: int) -> tuple[Tensor, Tensor]:
    """(rows * columns, dim) float32 cosines and sines that turn a head by its token's 2-D position.

    Half of the pairs turn with the row and half with the column, at frequencies that fall from 1 to
    nearly 1 / MAX_PERIOD (RoFormer, Su et al. 2021; two axes as in EVA-02 and LightningDiT). Pair i
    is elements i and i + dim / 2.
    """
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    frequency = MAX_PERIOD ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angles = [axis.flatten().double()[:, None] * frequency for axis in (row, column)]
    both = torch.cat([*angles, *angles], dim=1)
    return both.cos().float(), both.sin().float()


def _positions(places: Tensor, dim: int) -> Tensor:
    frequency = MAX_PERIOD ** -(torch.arange(dim // 2, dtype=torch.float64) / (dim // 2))
    angles = places.double()[:, None] * frequency
    return torch.cat([angles.sin(), angles.cos()], dim=1)
