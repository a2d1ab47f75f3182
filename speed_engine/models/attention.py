"""Multi-head self-attention over tokens."""

import torch.nn.functional as F
from torch import Tensor, nn


class SelfAttention(nn.Module):
    """Scaled dot-product attention, all tokens to all tokens, through PyTorch's SDPA.

    Args:
        dim: width D.
        num_heads: heads H; must divide D.

    Raises:
        ValueError: num_heads does not divide dim.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        if dim % num_heads:
            divisors = [h for h in range(1, dim + 1) if dim % h == 0]
            raise ValueError(
                f"num_heads={num_heads} does not divide the width {dim}; choose from {divisors}."
            )
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        batch, num_tokens, dim = x.shape
        heads = self.qkv(x).view(batch, num_tokens, 3, self.num_heads, dim // self.num_heads)
        q, k, v = heads.permute(2, 0, 3, 1, 4)  # each (B, H, N, D / H)
        attended = F.scaled_dot_product_attention(q, k, v)
        return self.proj(attended.transpose(1, 2).reshape(batch, num_tokens, dim))
