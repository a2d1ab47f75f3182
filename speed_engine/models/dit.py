"""Diffusion transformer (DiT, Peebles and Xie 2022) with adaLN-Zero conditioning.

Parameter names, initialisation and numerics follow facebookresearch/DiT, so its checkpoints load.

Letters: B images, C channels, H x W pixels, P patch size, N tokens, D width.
"""

from typing import NamedTuple, overload

import torch
from torch import Tensor, nn

from speed_engine.models.attention import SelfAttention
from speed_engine.models.embeddings import (
    LabelEmbedding,
    PatchEmbedding,
    TimestepEmbedding,
    position_grid,
)
from speed_engine.ops import block_operators_for, gated_residual


class FeedForward(nn.Module):
    """Two linear layers with a GELU (tanh form) between."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        return self.fc2(self._hidden(x))

    def open(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The answer, and the bias of ``BlockOperators.linear``."""
        return block_operators_for(x.device).linear(self.fc2, self._hidden(x))

    def _hidden(self, x: Tensor) -> Tensor:
        op = block_operators_for(x.device)
        return op.gelu(*op.linear(self.fc1, x))


class OpenSum(NamedTuple):
    """tokens + gate branch, not added yet: who normalises the sum adds it in the same pass."""

    tokens: Tensor  # (B, N, D)
    branch: Tensor | None = None  # (B, N, D); None adds nothing
    gate: Tensor | None = None  # (B, D)
    bias: Tensor | None = None  # (D,) as in ``BlockOperators.linear``

    def adaln(self, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """(B, D), (B, D) -> the sum and its norm, scaled and shifted; each (B, N, D)."""
        op = block_operators_for(self.tokens.device)
        if self.branch is None:
            return self.tokens, op.adaln(self.tokens, shift, scale)
        return op.gated_residual_adaln(*self[:3], shift, scale, self.bias)

    def close(self) -> Tensor:
        """(B, N, D) the sum."""
        if self.branch is None or self.gate is None:
            return self.tokens
        return gated_residual(self.tokens, self.branch, self.gate, self.bias)


class Block(nn.Module):
    """Attention and feed-forward, each shifted, scaled and gated by the condition."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.attn = SelfAttention(dim, num_heads)
        self.mlp = FeedForward(dim, int(dim * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    @overload
    def forward(self, x: OpenSum, condition: Tensor) -> OpenSum: ...

    @overload
    def forward(self, x: Tensor, condition: Tensor) -> Tensor: ...

    def forward(self, x: Tensor | OpenSum, condition: Tensor) -> Tensor | OpenSum:
        """(B, N, D), (B, D) -> (B, N, D); given an open sum, it leaves its own open."""
        modulation = self.adaLN_modulation(condition).chunk(6, dim=1)
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = modulation
        before = x if isinstance(x, OpenSum) else OpenSum(x)
        tokens, y = before.adaln(shift_attn, scale_attn)
        branch, bias = self.attn.open(y)
        tokens, y = OpenSum(tokens, branch, gate_attn, bias).adaln(shift_mlp, scale_mlp)
        branch, bias = self.mlp.open(y)
        after = OpenSum(tokens, branch, gate_mlp.clone(), bias)  # FSDP2 warns of views
        return after if isinstance(x, OpenSum) else after.close()


class FinalLayer(nn.Module):
    """Modulated norm and a linear map from tokens to patches."""

    def __init__(self, dim: int, patch_values: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, patch_values)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x: Tensor | OpenSum, condition: Tensor) -> Tensor:
        """(B, N, D), (B, D) -> (B, N, P * P * C)."""
        shift, scale = self.adaLN_modulation(condition).chunk(2, dim=1)
        before = x if isinstance(x, OpenSum) else OpenSum(x)
        return self.linear(before.adaln(shift, scale)[1])


class DiT(nn.Module):
    """Class-conditional transformer on patches of an image or latent.

    Args:
        input_size: (H, W); each a multiple of the patch size.
        channels: C.
        patch_size: P.
        dim: width D, a multiple of 4 (two axes, sine and cosine).
        depth: number of blocks.
        num_heads: attention heads; divides D.
        num_classes: labels 0 .. num_classes - 1; num_classes itself means "no label".
        mlp_ratio: hidden width of the feed-forward layers, in units of D.
        learn_sigma: answer with twice the channels, the second half for the variance.
        residual_dtype: of the stream of tokens from block to block. None leaves it to PyTorch:
            float32 under autocast, which computes branches in bfloat16, else the parameters' dtype.
            bfloat16 halves its memory traffic and rounds after every sum.

    Raises:
        ValueError: sizes that do not divide as said.
    """

    pos_embed: Tensor

    def __init__(
        self,
        *,
        input_size: tuple[int, int],
        channels: int,
        patch_size: int,
        dim: int,
        depth: int,
        num_heads: int,
        num_classes: int,
        mlp_ratio: float = 4.0,
        learn_sigma: bool = False,
        residual_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        height, width = input_size
        if height % patch_size or width % patch_size:
            raise ValueError(
                f"patch_size={patch_size} does not divide the input size {height} x {width}."
            )
        if dim % 4:
            raise ValueError(f"dim={dim} is not a multiple of 4, as the position code needs.")
        self.patch_size, self.out_channels = patch_size, 2 * channels if learn_sigma else channels
        self.grid = height // patch_size, width // patch_size
        self.num_classes, self.residual_dtype = num_classes, residual_dtype
        self.x_embedder = PatchEmbedding(patch_size, channels, dim)
        self.t_embedder = TimestepEmbedding(dim)
        self.y_embedder = LabelEmbedding(num_classes, dim)
        self.register_buffer("pos_embed", position_grid(*self.grid, dim))
        self.blocks = nn.ModuleList(Block(dim, num_heads, mlp_ratio) for _ in range(depth))
        self.final_layer = FinalLayer(dim, patch_size**2 * self.out_channels)
        self._initialise()

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """(B, C, H, W), (B,) timesteps, (B,) int64 labels -> (B, C or 2C, H, W)."""
        tokens = self.x_embedder(x) + self.pos_embed
        condition = self.t_embedder(t) + self.y_embedder(labels)
        stream = OpenSum(tokens.to(self.residual_dtype))
        for block in self.blocks:
            stream = block(stream, condition)
        return self._unpatchify(self.final_layer(stream, condition))

    def _unpatchify(self, tokens: Tensor) -> Tensor:
        """(B, N, P * P * C) -> (B, C, H, W), C counting what the model answers."""
        (rows, columns), p, c = self.grid, self.patch_size, self.out_channels
        patches = tokens.view(len(tokens), rows, columns, p, p, c)
        return patches.permute(0, 5, 1, 3, 2, 4).reshape(len(tokens), c, rows * p, columns * p)

    def _initialise(self) -> None:
        """DiT's initialisation: every block starts as the identity, the output as zero."""
        for name, module in self.named_modules():
            if not isinstance(module, nn.Linear):
                continue
            if "adaLN_modulation" in name or name == "final_layer.linear":
                nn.init.zeros_(module.weight)
            elif name.startswith("t_embedder"):
                nn.init.normal_(module.weight, std=0.02)
            else:
                nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
        patches = self.x_embedder.proj
        nn.init.xavier_uniform_(patches.weight.view(len(patches.weight), -1))
        if patches.bias is not None:
            nn.init.zeros_(patches.bias)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
