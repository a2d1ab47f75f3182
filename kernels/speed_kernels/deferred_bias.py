"""The gradient of a bias, left by the linear layer that adds it to the operator that comes next.

    y     = x W^T + detach(b)                  what the layer computes
    db    = sum over R of dy                   what autograd would need another pass over dy for

An operator that takes ``bias`` beside y has dy in its hands as it writes it, and sums it there.

Letters: R rows (tokens of all images), D width.
"""

import torch
from torch import Tensor


def with_bias_gradient(y: Tensor, bias: Tensor | None) -> Tensor:
    """(..., D), (D,) -> y itself, whose gradient the bias gets as well; the plain way to do it."""
    return y if bias is None else _WithBiasGradient.apply(y, bias)


class _WithBiasGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, bias):
        ctx.bias_dtype = bias.dtype
        return y.view_as(y)

    @staticmethod
    def backward(ctx, dy):
        return dy, dy.reshape(-1, dy.shape[-1]).sum(dim=0).to(ctx.bias_dtype)
