"""Group norm, optionally scaled and shifted per image, and SiLU, as in the blocks of a U-Net.

    forward     x_hat = (x - mean) rstd                    mean, variance over S and a group of C
                a     = weight (1 + scale),  b = bias (1 + scale) + shift
                z     = a x_hat + b,  y = z sigmoid(z)     (without scale and shift they are 0)
    backward    dz    = dy sigmoid(z) (1 + z (1 - sigmoid(z)))
                s1, s2 = sums over S of dz, dz x_hat
                dx    = rstd (a dz - mean(a dz) - x_hat mean(a dz x_hat))       means as above
                dshift = s1,  dscale = weight s2 + bias s1
                dweight, dbias = sums over B of (1 + scale) s2, (1 + scale) s1

Letters: B images, C channels, S positions in space, G groups, J chunks of S.
x is (B, C, S...), stored with S innermost (contiguous) or C innermost (channels last); either is
read as it lies, and the result lies the same way.
Saved for backward: x and per group mean and rstd in float32; z is computed again.
Traffic, in tensors like x: forward reads x twice and writes y; backward reads x and dy twice and
writes dx; besides, 2 J float32 partial sums per image and channel, which a kernel of one program
per image and group adds, so that the result does not depend on scheduling.
"""

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.library import custom_op

from speed_kernels.language import runs_kernels, store, tl, triton

TILE = 2048  # elements that a program of 4 warps holds; not tuned on a GPU
TILES = 8  # along S, that it walks through; not tuned on a GPU
CHANNELS = 64  # at most in a tile where they are innermost: 128 bytes of a 16-bit dtype
PARTIALS = 2048  # sums that a program adds at a time
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # others go through the reference


def group_norm_silu_reference(
    x: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """The definition of ``group_norm_silu`` in plain PyTorch."""
    wide = x.to(torch.promote_types(x.dtype, weight.dtype))
    z = torch.nn.functional.group_norm(wide, num_groups, weight, bias, eps)
    if scale is not None and shift is not None:
        per_image = (*scale.shape, *[1] * (x.dim() - 2))
        z = z * (1 + scale.view(per_image)) + shift.view(per_image)
    return torch.nn.functional.silu(z).to(x.dtype)
