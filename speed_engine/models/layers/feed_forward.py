"""What a transformer does to each token by itself: the feed-forward layers of DiT's blocks.

Letters: B images, N tokens, D width.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from speed_engine.models.layers.fused import FusedLinear
from speed_engine.ops import block_operators_for


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


class SwiGLU(nn.Module):
    """Two linear maps, one gating the other through SiLU, and a third back (Shazeer 2020).

    Two thirds of ``hidden_dim``, rounded up to a multiple of 8, so that parameters and work are
    those of ``FeedForward``; sizes and names as in LightningDiT (Yao et al. 2025).
    """

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        hidden = -(-2 * hidden_dim // 24) * 8
        self.w12 = FusedLinear(dim, 2 * hidden, 2)
        self.w3 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        return self.w3(self._hidden(x))

    def open(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The answer, and the bias of ``BlockOperators.linear``."""
        return block_operators_for(x.device).linear(self.w3, self._hidden(x))

    def _hidden(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)
        return F.silu(gate) * value
