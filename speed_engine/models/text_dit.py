"""DiT conditioned on text: every block attends to the tokens of a text encoder, too.

As in PixArt-alpha (Chen et al. 2023, section 2.2): the tokens go through two layers to the model's
width, and every block attends to them between its self-attention and its feed-forward layers,
without a gate, from a projection that starts at zero. Unlike there, every block keeps DiT's own
modulation, and the mean token joins the timestep in it.

Letters: B images, C channels, H x W pixels, N tokens of the image, D width, L tokens of the text,
E their width.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from speed_engine.models.dit import Block, DiT
from speed_engine.models.layers.blocks import recomputable
from speed_engine.models.layers.fused import FusedLinear
from speed_engine.models.layers.open_sum import OpenSum, opened


class CrossAttention(nn.Module):
    """Tokens of the image attend to those of the text; starts as zero.

    Args:
        dim: width D.
        num_heads: attention heads; divides D.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim)
        self.kv = FusedLinear(dim, 2 * dim, 2)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        """(B, N, D), (B, L, D) -> (B, N, D)."""
        batch, num_tokens, dim = x.shape
        heads = self.num_heads, dim // self.num_heads
        q = self.q(x).view(batch, num_tokens, *heads).transpose(1, 2)
        k, v = self.kv(text).view(batch, -1, 2, *heads).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v)
        return self.proj(attended.transpose(1, 2).reshape(batch, num_tokens, dim))


class TextBlock(Block):
    """DiT's block with attention to the text in its middle; arguments as of ``Block``."""

    def __init__(self, dim: int, num_heads: int, *arguments: Any) -> None:
        super().__init__(dim, num_heads, *arguments)
        self.cross_attn = CrossAttention(dim, num_heads)

    @recomputable
    def forward(
        self, x: Tensor | OpenSum, condition: Tensor, text: Tensor, *rotation: Tensor
    ) -> Tensor | OpenSum:
        """(B, N, D), (B, D), (B, L, D) -> (B, N, D); the rest as in ``Block``."""
        modulation = self.adaLN_modulation(condition).chunk(6, dim=1)
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = modulation
        tokens, y = opened(x).adaln(shift_attn, scale_attn)
        branch, bias = self.attn.open(y, *rotation)
        tokens = OpenSum(tokens, branch, gate_attn, bias).closed()
        tokens = tokens + self.cross_attn(tokens, text).to(tokens.dtype)
        branch, bias = self.mlp.open(opened(tokens).adaln(shift_mlp, scale_mlp)[1])
        after = OpenSum(tokens, branch, gate_mlp.clone(), bias)
        return after if isinstance(x, OpenSum) else after.closed()


class TextDiT(DiT):
    """DiT on an image or latent, conditioned on a text.

    Args:
        token_dim: E.
        dim: width D.
        arguments: the others of ``DiT``, which has no classes here.

    Raises:
        UserError: as ``DiT``.
    """

    block_class = TextBlock

    def __init__(self, *, token_dim: int, dim: int, **arguments: Any) -> None:
        super().__init__(dim=dim, num_classes=None, **arguments)
        self.text_embedder = nn.Sequential(
            nn.Linear(token_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim)
        )
        self.pooled_embedder = nn.Linear(dim, dim)
        for module in self.modules():
            if isinstance(module, CrossAttention):
                nn.init.zeros_(module.proj.weight)
        for layer in (*self.text_embedder, self.pooled_embedder):
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, t: Tensor, tokens: Tensor) -> Tensor:
        """(B, C, H, W), (B,) timesteps, (B, L, E) -> (B, C or 2C, H, W)."""
        text = self.text_embedder(tokens)
        condition = self.t_embedder(t) + self.pooled_embedder(text.mean(1))
        stream = self.through(self.blocks, self.embed(x), condition, text, *self.rotation())
        return self.answer(stream, condition)
