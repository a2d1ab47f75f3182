"""Multi-head self-attention over tokens."""

import torch.nn.functional as F
from torch import Tensor, nn

from speed_engine.ops import block_operators_for


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
        return self.proj(self._attend(x))

    def open(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The answer, and the bias of ``BlockOperators.linear``."""
        return block_operators_for(x.device).linear(self.proj, self._attend(x))

    def _attend(self, x: Tensor) -> Tensor:
        op = block_operators_for(x.device)
        qkv, bias = op.linear(self.qkv, x)
        q, k, v = op.split_heads(qkv, self.num_heads, bias)  # each (B, H, N, D / H)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
