"""Multi-head self-attention over tokens, and the libraries that compute it.

Letters: B images, H heads, N tokens, D width, K = D / H width of a head.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speed_engine.models.layers.fused import FusedLinear
from speed_engine.ops import block_operators_for, kernels_on, qk_norm_rope
from speed_engine.runtime.checks import UserError

# (q, k, v) -> attended, each (B, H, N, K).
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
NORM_EPS = 1e-6  # of queries and keys


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's ``scaled_dot_product_attention``, which picks its kernel itself.

    Args:
        q: (B, H, N, K) queries.
        k: (B, H, N, K) keys.
        v: (B, H, N, K) values.
    """
    few = k.shape[2] <= k.shape[3]  # the scores are no larger than the queries
    wide = q.dtype.itemsize >= 4  # else the scores would be rounded
    if few and wide and q.device.type == "cpu" and torch.compiler.is_compiling():
        return _two_products(q, k, v)
    return F.scaled_dot_product_attention(q, k, v)


def _two_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The definition, of which Inductor makes faster code than PyTorch's kernel for few tokens."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    return scores.softmax(dim=-1) @ v


def xformers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """xFormers' ``memory_efficient_attention``.

    Arguments as of ``sdpa``.

    Raises:
        NotImplementedError: no operator of xFormers takes this device and dtype; lists why.
    """
    from xformers.ops import fmha

    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # tokens first
    return fmha.memory_efficient_attention(q, k, v).transpose(1, 2)


BACKENDS: dict[str, Attend] = {"sdpa": sdpa, "xformers": xformers}


class SelfAttention(nn.Module):
    """Scaled dot-product attention, all tokens of an image to all.

    Args:
        dim: width D.
        num_heads: heads H; must divide D.
        backend: a name of ``BACKENDS``.

    Raises:
        UserError: num_heads does not divide dim, or there is no such backend.
    """

    def __init__(self, dim: int, num_heads: int, backend: str = "sdpa") -> None:
        super().__init__()
        if dim % num_heads:
            divisors = [h for h in range(1, dim + 1) if dim % h == 0]
            raise UserError(
                f"num_heads={num_heads} does not divide the width {dim}; choose from {divisors}."
            )
        if backend not in BACKENDS:
            raise UserError(f"attention={backend!r} is unknown; choose from {', '.join(BACKENDS)}.")
        self.num_heads, self.attend = num_heads, BACKENDS[backend]
        self.qkv = FusedLinear(dim, 3 * dim, 3)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, *rotation: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D); rotation as a subclass takes it."""
        return self.proj(self._mix(x, *rotation))

    def open(self, x: Tensor, *rotation: Tensor) -> tuple[Tensor, Tensor | None]:
        """The answer, and the bias of ``BlockOperators.linear``."""
        return block_operators_for(x.device).linear(self.proj, self._mix(x, *rotation))

    def _mix(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D), before the last projection."""
        op = block_operators_for(x.device)
        if self.attend is sdpa and kernels_on(x.device).block:
            qkv, bias = op.linear(self.qkv, x)
            return op.attention(qkv, self.num_heads, bias)
        return self.attend(*self._heads(x)).transpose(1, 2).flatten(2)

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, N, D) -> queries, keys and values, each (B, H, N, K)."""
        op = block_operators_for(x.device)
        qkv, bias = op.linear(self.qkv, x)
        return op.split_heads(qkv, self.num_heads, bias)


class RotaryAttention(SelfAttention):
    """Self-attention whose queries and keys are normalised, then turned by position.

    QK-norm (Dehghani et al. 2023) keeps attention logits bounded; RoPE (Su et al. 2021) makes them
    depend on relative position. Arguments and errors as of ``SelfAttention``.
    """

    def __init__(self, dim: int, num_heads: int, backend: str = "sdpa") -> None:
        super().__init__(dim, num_heads, backend)
        self.q_norm = nn.RMSNorm(dim // num_heads, eps=NORM_EPS)
        self.k_norm = nn.RMSNorm(dim // num_heads, eps=NORM_EPS)

    def _mix(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """(B, N, D), (N, K), (N, K) -> (B, N, D); cos and sin from ``embeddings.rotary_grid``.

        They are (B, N, K) where tokens stand at other positions in every image.
        """
        q, k, v = self._heads(x)
        tables = cos.float(), sin.float()  # cast where the model was cast as a whole
        q, k = qk_norm_rope(q, k, self.q_norm.weight, self.k_norm.weight, *tables, NORM_EPS)
        return self.attend(q, k, v).transpose(1, 2).flatten(2)


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """(B, N, D) -> (B, H, N, K)."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)
