"""The books of the null device, and stand-ins for what it does not fake: cuDNN and NVRTC.

Import this before anything is run on the device.

Letters: B images, H heads, N tokens, D channels of a head.
"""

import ctypes
import warnings
from typing import NamedTuple

import torch
from torch import Tensor

LAUNCHES = ("kernel", "triton", "gemm", "library")
_device = ctypes.CDLL("libcuda.so.1")
_VISITOR = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_long, ctypes.c_double)


class Entry(NamedTuple):
    """What was done ``count`` times.

    Attributes:
        kind: ``kernel`` of PyTorch, ``triton``, ``gemm`` of cuBLAS, ``library`` for a stand-in;
            ``copy``, ``fill``, ``graph``; ``malloc``, ``free``, ``pinned`` (host memory); ``sync``.
        name: of the kernel, or of the function of CUDA; of a copy, as ``DtoH sync``.
        count: how often.
        amount: bytes, or the FLOPs of matrix products, all of them together.
    """

    kind: str
    name: str
    count: int
    amount: float


class Books(list[Entry]):
    """Everything since the last reset."""

    def count(self, *kinds: str) -> int:
        """How often something of these kinds was done."""
        return sum(entry.count for entry in self if entry.kind in kinds)

    def launches(self) -> int:
        """Kernels; a call of a stand-in counts as one."""
        return self.count(*LAUNCHES)

    def host_copies(self) -> dict[str, int]:
        """Copies from or to the host, by name."""
        copies = [entry for entry in self if entry.kind == "copy" and "H" in entry.name.split()[0]]
        return {entry.name: entry.count for entry in copies}


def reset() -> None:
    """Begin new books."""
    _device.null_device_reset()


def read() -> Books:
    """The books since the last reset, what was done most often first."""
    found = Books()
    visit = _VISITOR(
        lambda kind, name, count, amount: found.append(
            Entry(kind.decode(), name.decode(), count, amount)
        )
    )
    _device.null_device_visit(visit)
    found.sort(key=lambda entry: -entry.count)
    return found


def _note(name: str) -> None:
    _device.null_device_note_library(name.encode())


def _order(images: Tensor, weight: Tensor) -> torch.memory_format:
    """Of everything that a convolution computes: channels last if the images or the weights are."""
    last = any(_channels_last(tensor) for tensor in (images, weight))
    return torch.channels_last if last else torch.contiguous_format


def convolution(
    x, weight, bias, stride, padding, dilation, transposed, output_padding, groups
) -> Tensor:
    """Allocates as cuDNN does."""
    assert not transposed
    _note("convolution")
    sizes = [
        (side + 2 * pad - dilated * (kernel - 1) - 1) // step + 1
        for side, pad, dilated, kernel, step in zip(
            x.shape[2:], padding, dilation, weight.shape[2:], stride, strict=True
        )
    ]
    result = x.new_empty((x.shape[0], weight.shape[0], *sizes))
    return result.contiguous(memory_format=_order(x, weight))


def convolution_backward(
    gradient, x, weight, bias_sizes, stride, padding, dilation, transposed, output_padding, groups,
    wanted,
):  # fmt: skip
    """Gradients of images, weight and bias; cuDNN computes the first two by a call each.

    Both are laid out as the result of the forward is.
    """
    for name, each in zip(("images", "weight", "bias"), wanted, strict=True):
        if each:
            _note(f"convolution backward of {name}")
    order = _order(x, weight)
    return (
        torch.empty_like(x, memory_format=order) if wanted[0] else None,
        torch.empty_like(weight, memory_format=order) if wanted[1] else None,
        weight.new_empty(weight.shape[0]) if wanted[2] else None,
    )


def attention(
    query, key, value, bias, with_logsumexp, dropout=0.0, causal=False, debug=False, *, scale=None
):
    """(B, H, N, D) each; the result lies in memory as the queries do."""
    _note(f"attention {tuple(query.shape)}")
    logsumexp = (*query.shape[:3], 1) if with_logsumexp else (0,)
    random = torch.empty((), dtype=torch.int64, device=query.device)
    return (
        _like(query, (*query.shape[:3], value.shape[3])),
        query.new_empty(logsumexp, dtype=torch.float32),
        None,
        None,
        query.shape[2],
        key.shape[2],
        random,
        random.clone(),
        None,
    )


def attention_backward(gradient, query, key, value, *rest, scale=None):
    """Gradients of queries, keys and values."""
    _note(f"attention backward {tuple(query.shape)}")
    return tuple(torch.empty_like(each) for each in (query, key, value))


def batch_norm(x, weight, bias, mean, variance, training, momentum, epsilon):
    """The result, and what only a backward pass would read."""
    _note("batch norm")
    nothing = x.new_empty(0)
    return torch.empty_like(x), nothing, nothing.clone(), nothing.new_empty(0, dtype=torch.uint8)


def ndtri(x) -> Tensor:
    """PyTorch has NVRTC compile this one when it is first used."""
    _note("ndtri")
    return torch.empty_like(x)


def _channels_last(tensor: Tensor) -> bool:
    last = tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    return last and not tensor.is_contiguous()


def _like(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Of a shape, its axes in the order in memory that they have in ``tensor``."""
    order = sorted(range(tensor.dim()), key=lambda axis: -tensor.stride(axis))
    dense = tensor.new_empty([shape[axis] for axis in order])
    return dense.permute([order.index(axis) for axis in range(tensor.dim())])


STAND_INS = {
    "convolution": convolution,
    "convolution_backward": convolution_backward,
    "_scaled_dot_product_cudnn_attention": attention,
    "_scaled_dot_product_cudnn_attention_backward": attention_backward,
    "cudnn_batch_norm": batch_norm,
    "special_ndtri": ndtri,
}
_registered = torch.library.Library("aten", "IMPL")  # they are there as long as it is
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # that they override others is the purpose
    for name, stand_in in STAND_INS.items():
        _registered.impl(name, torch.compiler.disable(stand_in), "CUDA")
