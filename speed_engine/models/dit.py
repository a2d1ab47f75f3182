"""Diffusion transformer (DiT, Peebles and Xie 2022) with adaLN-Zero conditioning.

Parameter names, initialisation and numerics follow facebookresearch/DiT, so its checkpoints load.

Letters: B images, C channels, H x W pixels, P patch size, N tokens, D width.
"""

from torch import Tensor, nn

from speed_engine.models.attention import SelfAttention
from speed_engine.models.embeddings import (
    LabelEmbedding,
    PatchEmbedding,
    TimestepEmbedding,
    position_grid,
    unpatchify,
)


class FeedForward(nn.Module):
    """Two linear layers with a GELU (tanh form) between."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.act = nn.GELU(approximate="tanh")
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    """Attention and feed-forward, each shifted, scaled and gated by the condition."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.attn = SelfAttention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.mlp = FeedForward(dim, int(dim * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """(B, N, D), (B, D) -> (B, N, D)."""
        modulation = self.adaLN_modulation(condition).unsqueeze(1).chunk(6, dim=2)
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = modulation
        x = x + gate_attn * self.attn(self.norm1(x) * (1 + scale_attn) + shift_attn)
        return x + gate_mlp * self.mlp(self.norm2(x) * (1 + scale_mlp) + shift_mlp)


class FinalLayer(nn.Module):
    """Modulated norm and a linear map from tokens to patches."""

    def __init__(self, dim: int, patch_values: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(dim, patch_values)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """(B, N, D), (B, D) -> (B, N, P * P * C)."""
        shift, scale = self.adaLN_modulation(condition).unsqueeze(1).chunk(2, dim=2)
        return self.linear(self.norm_final(x) * (1 + scale) + shift)


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
        self.num_classes = num_classes
        self.x_embedder = PatchEmbedding(patch_size, channels, dim)
        self.t_embedder = TimestepEmbedding(dim)
        self.y_embedder = LabelEmbedding(num_classes, dim)
        self.register_buffer("pos_embed", position_grid(*self.grid, dim))
        self.blocks = nn.ModuleList(Block(dim, num_heads, mlp_ratio) for _ in range(depth))
        self.final_layer = FinalLayer(dim, patch_size**2 * self.out_channels)
        initialise(self)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """(B, C, H, W), (B,) timesteps, (B,) int64 labels -> (B, C or 2C, H, W)."""
        tokens = self.x_embedder(x) + self.pos_embed
        condition = self.t_embedder(t) + self.y_embedder(labels)
        for block in self.blocks:
            tokens = block(tokens, condition)
        return unpatchify(self.final_layer(tokens, condition), self.grid, self.patch_size)


def initialise(model: nn.Module) -> None:
    """DiT's initialisation: every block starts as the identity, the output as zero."""
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        if "adaLN_modulation" in name or name == "final_layer.linear":
            nn.init.zeros_(module.weight)
        elif name.startswith("t_embedder"):
            nn.init.normal_(module.weight, std=0.02)
        else:
            nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
    for module in model.modules():
        if isinstance(module, PatchEmbedding):
            nn.init.xavier_uniform_(module.proj.weight.view(len(module.proj.weight), -1))
            if module.proj.bias is not None:
                nn.init.zeros_(module.proj.bias)
        elif isinstance(module, LabelEmbedding):
            nn.init.normal_(module.embedding_table.weight, std=0.02)
