"""Diffusion transformer (DiT, Peebles and Xie 2022) with adaLN-Zero conditioning.

Parameter names, initialisation and numerics follow facebookresearch/DiT, so its checkpoints load.
The modern variant has the same frame with QK-norm, rotary positions and SwiGLU inside the blocks.

Letters: B images, C channels, H x W pixels, P patch size, N tokens, D width, K width of a head.
"""

import re
from collections.abc import Iterable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from speed_engine.models.layers.attention import RotaryAttention, SelfAttention
from speed_engine.models.layers.blocks import recomputable, set_recompute
from speed_engine.models.layers.embeddings import (
    LabelEmbedding,
    PatchEmbedding,
    TimestepEmbedding,
    position_grid,
    rotary_grid,
    unpatchify,
)
from speed_engine.models.layers.feed_forward import FeedForward, SwiGLU
from speed_engine.models.layers.fused import FusedLinear
from speed_engine.models.layers.open_sum import OpenSum, opened
from speed_engine.runtime.checks import UserError


class Size(NamedTuple):
    """Of a transformer."""

    dim: int
    depth: int
    num_heads: int


# Table 1 of the DiT paper; patches of 2, 4 and 8 there.
DIT_SIZES = {
    "S": Size(384, 12, 6),
    "B": Size(768, 12, 12),
    "L": Size(1024, 24, 16),
    "XL": Size(1152, 28, 16),
}


# What a block is made of, by the variant's name.
VARIANTS: dict[str, tuple[type[SelfAttention], type[FeedForward] | type[SwiGLU]]] = {
    "original": (SelfAttention, FeedForward),
    "modern": (RotaryAttention, SwiGLU),
}


class Block(nn.Module):
    """Attention and feed-forward, each shifted, scaled and gated by the condition."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        attention: str = "sdpa",
        variant: str = "original",
    ) -> None:
        super().__init__()
        attention_class, feed_forward_class = VARIANTS[variant]
        self.attn = attention_class(dim, num_heads, attention)
        self.mlp = feed_forward_class(dim, int(dim * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), FusedLinear(dim, 6 * dim, 6))

    @recomputable
    def forward(
        self, x: Tensor | OpenSum, condition: Tensor, *rotation: Tensor
    ) -> Tensor | OpenSum:
        """(B, N, D), (B, D) -> (B, N, D); rotation as the variant's attention takes it.

        Given an open sum, it leaves its own open.
        """
        modulation = self.adaLN_modulation(condition).chunk(6, dim=1)
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = modulation
        tokens, y = opened(x).adaln(shift_attn, scale_attn)
        branch, bias = self.attn.open(y, *rotation)
        tokens, y = OpenSum(tokens, branch, gate_attn, bias).adaln(shift_mlp, scale_mlp)
        branch, bias = self.mlp.open(y)
        after = OpenSum(tokens, branch, gate_mlp.clone(), bias)  # FSDP2 warns of views
        return after if isinstance(x, OpenSum) else after.closed()


class FinalLayer(nn.Module):
    """Modulated norm and a linear map from tokens to patches."""

    def __init__(self, dim: int, patch_values: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, patch_values)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), FusedLinear(dim, 2 * dim, 2))

    def forward(self, x: Tensor | OpenSum, condition: Tensor) -> Tensor:
        """(B, N, D), (B, D) -> (B, N, P * P * C)."""
        shift, scale = self.adaLN_modulation(condition).chunk(2, dim=1)
        return self.linear(opened(x).adaln(shift, scale)[1])


class DiT(nn.Module):
    """Transformer on patches of an image or latent, class-conditional or unconditional.

    Args:
        input_size: (H, W); each a multiple of the patch size.
        channels: C, of the answer.
        patch_size: P.
        dim: width D, a multiple of 4 (two axes, sine and cosine).
        depth: number of blocks.
        num_heads: attention heads; divides D.
        num_classes: labels 0 .. num_classes - 1; num_classes itself means "no label". None takes no
            labels.
        in_channels: of the input; by default C.
        mlp_ratio: hidden width of the feed-forward layers, in units of D.
        learn_sigma: answer with twice the channels, the second half for the variance.
        variant: a name of ``VARIANTS``. In ``modern``, K is a multiple of 4.
        attention: a name of ``attention.BACKENDS``.
        frequency_shift: of the time features, see ``embeddings.sinusoid``; 1 as in diffusers.
        checkpointing: activations to recompute, from 0, none, to 1, see ``blocks.set_recompute``.
        residual_dtype: of the stream of tokens from block to block. None leaves it to PyTorch:
            float32 under autocast, where branches are bfloat16, else the parameters' dtype.
            bfloat16 halves the stream's memory traffic and rounds after every sum.

    Raises:
        UserError: sizes that do not divide as said, an unknown name, a dial outside [0, 1].
    """

    block_class: ClassVar[type[nn.Module]] = Block
    pos_embed: Tensor
    rotary_cos: Tensor
    rotary_sin: Tensor

    def __init__(
        self,
        *,
        input_size: tuple[int, int],
        channels: int,
        patch_size: int,
        dim: int,
        depth: int,
        num_heads: int,
        num_classes: int | None,
        in_channels: int | None = None,
        mlp_ratio: float = 4.0,
        learn_sigma: bool = False,
        variant: str = "original",
        attention: str = "sdpa",
        frequency_shift: float = 0,
        checkpointing: float = 0,
        residual_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        height, width = input_size
        if height % patch_size or width % patch_size:
            raise UserError(
                f"patch_size={patch_size} does not divide the input size {height} x {width}."
            )
        if dim % 4:
            raise UserError(f"dim={dim} is not a multiple of 4, as the position code needs.")
        if variant not in VARIANTS:
            raise UserError(f"variant={variant!r} is unknown; choose from {', '.join(VARIANTS)}.")
        self.patch_size, self.out_channels = patch_size, 2 * channels if learn_sigma else channels
        self.grid = height // patch_size, width // patch_size
        self.num_classes, self.num_heads, self.mlp_ratio = num_classes, num_heads, mlp_ratio
        self.residual_dtype = residual_dtype
        self.x_embedder = PatchEmbedding(patch_size, in_channels or channels, dim)
        self.t_embedder = TimestepEmbedding(dim, frequency_shift)
        self.y_embedder = None if num_classes is None else LabelEmbedding(num_classes, dim)
        self.register_buffer("pos_embed", position_grid(*self.grid, dim))
        self.blocks = nn.ModuleList(
            self.block_class(dim, num_heads, mlp_ratio, attention, variant) for _ in range(depth)
        )
        set_recompute(self.blocks, checkpointing)
        self.rotates = variant == "modern"
        if self.rotates:
            self._register_rotation(dim // num_heads)
        self.final_layer = FinalLayer(dim, patch_size**2 * self.out_channels)
        initialise(self)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """(B, C, H, W), (B,) timesteps, (B,) int64 labels -> (B, C or 2C, H, W)."""
        condition = self.condition(t, labels)
        stream = self.through(self.blocks, self.embed(x), condition, *self.rotation())
        return self.answer(stream, condition)

    def condition(self, t: Tensor, labels: Tensor | None) -> Tensor:
        """(B,) timesteps, (B,) labels -> (B, D), what modulates every block."""
        condition = self.t_embedder(t)
        return condition if self.y_embedder is None else condition + self.y_embedder(labels)

    def embed(self, x: Tensor) -> OpenSum:
        """(B, C, H, W) -> (B, N, D), the stream of tokens before the first block."""
        # The first summand decides the order in memory. Patches, which a convolution leaves
        # channel by channel, would cost a copy of all tokens wherever a kernel reads them.
        tokens = self.pos_embed + self.x_embedder(x)
        return OpenSum(tokens.to(self.residual_dtype or tokens.dtype))

    def through(
        self, blocks: Iterable[nn.Module], stream: OpenSum, condition: Tensor, *context: Tensor
    ) -> OpenSum:
        """(B, N, D) -> (B, N, D) through some of the blocks.

        Args:
            blocks: in their order.
            stream: any number N of tokens.
            condition: (B, D).
            context: what else the blocks take, the rotation of these tokens last.
        """
        for block in blocks:
            # What a block is given is kept for it to recompute: then one tensor, not two.
            given = stream.closed() if block.recompute == "everything" else stream
            stream = opened(block(given, condition, *context))
        return stream

    def answer(self, stream: OpenSum, condition: Tensor) -> Tensor:
        """(B, N, D) after the last block, (B, D) -> (B, C or 2C, H, W)."""
        return unpatchify(self.final_layer(stream, condition), self.grid, self.patch_size)

    def rotation(self) -> tuple[Tensor, ...]:
        """(N, K) cosines and sines by which blocks turn all tokens, or nothing.

        Where images keep other tokens, blocks take (B, n, K) of the n tokens of each.
        """
        return (self.rotary_cos, self.rotary_sin) if self.rotates else ()

    def _register_rotation(self, head_dim: int) -> None:
        if head_dim % 4:
            raise UserError(
                f"a head of width {head_dim} cannot be rotated on two axes; choose num_heads such "
                "that dim / num_heads is a multiple of 4."
            )
        for name, table in zip(("cos", "sin"), rotary_grid(*self.grid, head_dim), strict=True):
            self.register_buffer(f"rotary_{name}", table, persistent=False)


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


def dit_size(name: str) -> dict[str, Any]:
    """Arguments of ``DiT`` by a name: ``DiT-S/2`` to ``DiT-XL/8``, ``DiT-XL/2-modern``.

    Raises:
        UserError: another name.
    """
    match = re.fullmatch(r"DiT-(\w+)/([1-9]\d*)(-modern)?", name)
    if match is None or match[1] not in DIT_SIZES:
        raise UserError(
            f"{name!r} names no DiT; it is DiT-SIZE/PATCH or DiT-SIZE/PATCH-modern, "
            f"with a size from {', '.join(DIT_SIZES)}, such as DiT-XL/2."
        )
    return {
        "patch_size": int(match[2]),
        "variant": "modern" if match[3] else "original",
        **DIT_SIZES[match[1]]._asdict(),
    }
