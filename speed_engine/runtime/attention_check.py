"""PyTorch's attention once, forward and backward, in the shapes that a model has it in.

PyTorch chooses among backends by rules that do not try them: on some GPUs it prefers cuDNN, which
may have no plan for wide heads, as U-Nets have, and says so in the middle of a step only.

Letters: B images, H heads, N queries, L keys, K width of a head.
"""

import logging
from collections.abc import Callable, Collection
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from speed_engine.runtime.checks import UserError

log = logging.getLogger(__name__)

IMAGES = 2  # B of a trial
# Those that PyTorch may choose before its own formula ("math"), each with its switch.
BACKENDS: dict[str, tuple[SDPBackend, Callable[[], bool], Callable[[bool], None]]] = {
    "cuDNN": (
        SDPBackend.CUDNN_ATTENTION,
        torch.backends.cuda.cudnn_sdp_enabled,
        torch.backends.cuda.enable_cudnn_sdp,
    ),
    "flash": (
        SDPBackend.FLASH_ATTENTION,
        torch.backends.cuda.flash_sdp_enabled,
        torch.backends.cuda.enable_flash_sdp,
    ),
    "memory-efficient": (
        SDPBackend.EFFICIENT_ATTENTION,
        torch.backends.cuda.mem_efficient_sdp_enabled,
        torch.backends.cuda.enable_mem_efficient_sdp,
    ),
}
# What PyTorch says where it would pass over a backend, rather than fail in it.
UNSUITED = ("No available kernel", "No viable backend")


class AttentionShape(NamedTuple):
    """Of one call of attention, without the images."""

    heads: int
    queries: int
    keys: int
    width: int
    has_bias: bool


class AttentionShapes(TorchFunctionMode):
    """Collects the shapes of the calls of attention that are made while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[AttentionShape] = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            q, k, *_ = args
            bias = (kwargs or {}).get("attn_mask")
            shape = AttentionShape(q.shape[1], q.shape[2], k.shape[2], q.shape[3], bias is not None)
            self.found.add(shape)
        return func(*args, **(kwargs or {}))


def settle_attention(
    shapes: Collection[AttentionShape], device: torch.device, dtype: torch.dtype, quiet: bool
) -> None:
    """Switch off, in this process, the backends of attention that fail in one of the shapes.

    Nothing is switched off where PyTorch's own choice works. What fails is named in a line of the
    log.

    Args:
        shapes: in which a model calls attention.
        device: of the model.
        dtype: in which it computes.
        quiet: whether another process logs the same.

    Raises:
        UserError: attention fails by every backend.
    """
    problems = attention_problems(shapes, device, dtype)
    if not problems:
        return
    failed: dict[str, str] = {}
    for name, (backend, is_enabled, enable) in BACKENDS.items():
        if is_enabled():
            with sdpa_kernel(backend):
                own = attention_problems(shapes, device, dtype)
            if own := [problem for problem in own if not problem.startswith(UNSUITED)]:
                failed[name] = own[0]
                enable(False)
    if not failed or attention_problems(shapes, device, dtype):
        raise UserError(
            f"attention does not run on this GPU: {problems[0]}. Use device=cpu, or for a DiT "
            "attention=xformers."
        )
    if not quiet:
        named = "; ".join(f"{name} fails here: {why}" for name, why in failed.items())
        log.warning("attention goes without some of PyTorch's backends: %s", named)


def attention_problems(
    shapes: Collection[AttentionShape], device: torch.device, dtype: torch.dtype
) -> list[str]:
    """The first lines of what attention raises, of every shape that it does not run in."""
    problems = []
    for shape in sorted(shapes):
        try:
            with torch.enable_grad():
                _attend(shape, device, dtype)
        except Exception as error:  # whatever a library of this machine may raise
            lines = str(error).strip().splitlines() or [type(error).__name__]
            sizes = f"{shape.heads} heads of {shape.width}, {shape.queries} to {shape.keys} tokens"
            problems.append(f"{lines[0]} ({sizes})")
    return problems


def _attend(shape: AttentionShape, device: torch.device, dtype: torch.dtype) -> None:
    """Forward and backward, to the end of what was launched."""

    def tokens(count: int) -> Tensor:
        """(B, H, N, K), stored as (B, N, H, K), as by a projection."""
        x = torch.ones(IMAGES, count, shape.heads, shape.width, device=device, dtype=dtype)
        return x.transpose(1, 2).requires_grad_()

    bias = None
    if shape.has_bias:
        sizes = IMAGES, shape.heads, shape.queries, shape.keys
        bias = torch.zeros(sizes, device=device, dtype=dtype, requires_grad=True)
    q, k, v = tokens(shape.queries), tokens(shape.keys), tokens(shape.keys)
    F.scaled_dot_product_attention(q, k, v, attn_mask=bias).sum().backward()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
