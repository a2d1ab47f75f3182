"""The residual stream between two operators: tokens, and a gated branch that is yet to be added.

Who normalises the sum reads tokens and branch anyway, and adds in the same pass.

Letters: B images, N tokens, D width.
"""

from typing import NamedTuple

from torch import Tensor

from speed_engine.ops import block_operators_for, gated_residual


class OpenSum(NamedTuple):
    """tokens + gate branch."""

    tokens: Tensor  # (B, N, D)
    branch: Tensor | None = None  # (B, N, D); None adds nothing
    gate: Tensor | None = None  # (B, D)
    bias: Tensor | None = None  # (D,) of ``BlockOperators.linear``

    def adaln(self, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """(B, D), (B, D) -> the sum and its norm, scaled and shifted; each (B, N, D)."""
        op = block_operators_for(self.tokens.device)
        if self.branch is None:
            return self.tokens, op.adaln(self.tokens, shift, scale)
        return op.gated_residual_adaln(*self[:3], shift, scale, self.bias)

    def closed(self) -> Tensor:
        """(B, N, D) the sum."""
        if self.branch is None or self.gate is None:
            return self.tokens
        return gated_residual(self.tokens, self.branch, self.gate, self.bias)


def opened(x: Tensor | OpenSum) -> OpenSum:
    """Tokens as a sum to which nothing is to be added; an open sum as it is."""
    return x if isinstance(x, OpenSum) else OpenSum(x)
