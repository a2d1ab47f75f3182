"""What a step keeps on a GPU between its forward and its backward pass, counted without a GPU.

The model runs on tensors that have a device, a shape and a dtype, and no memory, with a GPU's
operators, autocast and fused attention. Counted are the storages that are alive afterwards.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

STATE_BYTES = 20  # per parameter: itself, gradient, two moments, average; float32
# Of the memory that training may plan with. The rest is for what comes and goes: an H200 held 11 %
# more than is estimated of cifar10-edm (benchmarks/results/nvidia-h200/gpu_defaults.json).
USED_SHARE = 0.88
FLASH_WIDTH = 256  # of the heads that flash attention takes

# The model's arguments on so many images, in every forward pass of a step.
Inputs = Callable[[int], list[dict[str, Tensor]]]


class Kept(NamedTuple):
    """Bytes that the backward pass waits for."""

    per_image: int
    weights: int  # the parameters once more, in the precision of the products


def kept_on_gpu(model: nn.Module, inputs: Inputs) -> Kept:
    """Of a model under bfloat16 autocast.

    Args:
        model: on the meta device; it is left without a device that anything can be computed on.
        inputs: on the current default device.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cuda")
        with torch.device("cuda"), _FusedAttention():
            one, two = (kept_bytes(model, inputs(n), _autocast) for n in (1, 2))
    return Kept(per_image=two - one, weights=2 * one - two)


def kept_bytes(
    model: nn.Module,
    passes: list[dict[str, Tensor]],
    precision: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> int:
    """Of the storages made by forward passes and alive after them, for the backward.

    Args:
        model: on a device without memory.
        passes: its arguments in each.
        precision: in which they are made; what it keeps for itself is gone afterwards.
    """
    with _Storages(model) as storages:
        with precision():
            answers = [model(**inputs) for inputs in passes]
        kept = storages.bytes_alive()
    del answers
    return kept


def fitting_images(kept: Kept, state_bytes: float, images: int, memory: float) -> int:
    """The images that go through the model at a time: all, or a half, a quarter ... that fits.

    Args:
        kept: for the backward pass.
        state_bytes: of parameters, gradients, optimizer and averages.
        images: of a step, on the device.
        memory: bytes that are free before any of this is there.

    Returns:
        1 where nothing fits.
    """
    room = USED_SHARE * memory - state_bytes - kept.weights
    while images > 1 and images * kept.per_image > room:
        images = (images + 1) // 2
    return images


class _FusedAttention(TorchFunctionMode):
    """What a GPU chooses: where there is none, PyTorch's choice would keep every logit."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            return _fused(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """PyTorch's ``scaled_dot_product_attention``, by its fused kernels."""
    ops, (query, key, value) = torch.ops.aten, (x.bfloat16() for x in (query, key, value))
    if attn_mask is None and query.shape[-1] <= FLASH_WIDTH:
        answer = ops._scaled_dot_product_flash_attention(
            query, key, value, dropout_p, is_causal, False, scale=scale
        )
    else:
        mask = None if attn_mask is None else attn_mask.bfloat16()
        answer = ops._scaled_dot_product_efficient_attention(
            query, key, value, mask, True, dropout_p, is_causal, scale=scale
        )
    return answer[0]


@contextmanager
def _autocast() -> Iterator[None]:
    """A GPU's, which ``torch.autocast`` refuses where there is none."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])


class _Storages(TorchDispatchMode):
    """Watches what is allocated beside a model, by whatever it is held: autograd, or a cache."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        tensors = (*model.parameters(), *model.buffers())
        self._own = {tensor.untyped_storage()._cdata for tensor in tensors}
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in self._own:
                storage = leaf.untyped_storage()
                self._made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return result

    def bytes_alive(self) -> int:
        """Of the storages that are still held."""
        return sum(size for reference, size in self._made.values() if not reference.expired())
