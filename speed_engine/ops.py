"""The operators that have a kernel. Only this module imports ``speed_kernels``.

They come in families, each a value with the definitions in PyTorch and one with the kernels, see
``FAMILIES``. Kernels run on CUDA, except those of families that ``use_kernels`` has left out;
elsewhere the definitions run.
"""

import functools
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.compiler.config
import torch.nn.functional as F
from torch import Tensor, nn

from speed_kernels import adamw_ema as _adamw_ema
from speed_kernels import group_norm_silu as _group_norm_silu
from speed_kernels import philox as _philox
from speed_kernels import qk_norm_rope as _qk_norm_rope
from speed_kernels.adaln import (
    adaln,
    adaln_reference,
    gated_residual_adaln,
    gated_residual_adaln_reference,
)
from speed_kernels.adaln import gated_residual_reference as gated_residual
from speed_kernels.attention import attention, attention_reference
from speed_kernels.clean_images import clean_images, clean_images_reference, from_pixels
from speed_kernels.gelu import gelu, gelu_by_sigmoid, gelu_reference
from speed_kernels.heads import split_heads, split_heads_reference
from speed_kernels.language import HAS_TRITON
from speed_kernels.noising import (
    noised_input,
    noised_input_and_noise,
    noised_input_and_noise_reference,
    noised_input_reference,
)
from speed_kernels.philox import SPECIFICATION, Stream, normal, random_bits
from speed_kernels.variational_bound import hybrid_loss, hybrid_loss_reference
from speed_kernels.weighted_mse import weighted_mse, weighted_mse_reference

__all__ = [
    "ALL_KERNELS", "BLOCK_COMPILED", "BLOCK_FUSED", "BLOCK_REFERENCE", "FAMILIES", "FUSED",
    "HAS_TRITON", "NO_KERNELS", "REFERENCE", "SPECIFICATION", "BlockOperators", "Kernels",
    "NormOperators", "Operators", "RandomOperators", "Stream", "UpdateOperators", "adamw_ema",
    "block_operators_for", "from_pixels", "gated_residual", "group_norm_silu", "kernels_on",
    "normal", "operators_for", "prepare_compiler", "qk_norm_rope", "random_bits", "use_kernels",
]  # fmt: skip


class Kernels(NamedTuple):
    """Which families of operators run by kernel on CUDA."""

    random: bool  # Philox: random bits and normals
    objective: bool  # ``Operators``
    block: bool  # ``BlockOperators``
    norms: bool  # ``NormOperators``
    update: bool  # ``UpdateOperators``


ALL_KERNELS = Kernels(*[True] * len(Kernels._fields))
NO_KERNELS = Kernels(*[False] * len(Kernels._fields))
_on_cuda = ALL_KERNELS if HAS_TRITON else NO_KERNELS


def use_kernels(wanted: Kernels) -> None:
    """From now on, in this process, run these families by kernel on CUDA.

    The others run their definitions in PyTorch, as all do where Triton is not installed.
    """
    global _on_cuda
    _on_cuda = wanted if HAS_TRITON else NO_KERNELS
    _philox.use_kernel(_on_cuda.random)


def kernels_on(device: torch.device) -> Kernels:
    """Which families run by kernel there."""
    return _on_cuda if device.type == "cuda" else NO_KERNELS


@functools.cache
def prepare_compiler() -> None:
    """Tell Inductor, before it compiles, what it would not find out about our operators in time.

    That it has no code of its own for them: torch 2.11 would describe an operator with all that it
    was computed from, which in the last block of a deep model is text of gigabytes. And that code
    which it has kept was made for other operators, where theirs was: it knows them by name only.
    """
    from torch._inductor.lowering import make_fallback, tag_to_layout_constraint
    from torch._library.utils import get_layout_constraint_tag

    torch.compiler.config.cache_key_tag += kernels_sha256()
    for name in torch.ops.speed_kernels:
        operator = getattr(torch.ops.speed_kernels, name).default
        tag = get_layout_constraint_tag(operator, with_default=True)
        make_fallback(operator, layout_constraint=tag_to_layout_constraint(tag), warn=False)


def kernels_sha256() -> str:
    """Of the source of all kernels."""
    sources = sorted(Path(_philox.__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()


class RandomOperators(NamedTuple):
    """One implementation of the counter-based generator: (seed, ids, count, stream) -> (B, W)."""

    random_bits: Callable[[Tensor, Tensor, int, int], Tensor]
    normal: Callable[[Tensor, Tensor, int, int], Tensor]


class Operators(NamedTuple):
    """One implementation of each operator of the training step."""

    clean_images: Callable[..., Tensor]
    noised_input: Callable[..., Tensor]
    noised_input_and_noise: Callable[..., tuple[Tensor, Tensor]]
    weighted_mse: Callable[..., tuple[Tensor, Tensor]]
    hybrid_loss: Callable[..., tuple[Tensor, Tensor]]


REFERENCE = Operators(
    clean_images_reference,
    noised_input_reference,
    noised_input_and_noise_reference,
    weighted_mse_reference,
    hybrid_loss_reference,
)
FUSED = Operators(clean_images, noised_input, noised_input_and_noise, weighted_mse, hybrid_loss)


def operators_for(device: torch.device) -> Operators:
    """Kernels where they run, on CUDA; the same definitions in PyTorch elsewhere."""
    return FUSED if kernels_on(device).objective else REFERENCE


class NormOperators(NamedTuple):
    """One implementation of the norms that models call."""

    qk_norm_rope: Callable[..., tuple[Tensor, Tensor]]
    group_norm_silu: Callable[..., Tensor]


NORM_REFERENCE = NormOperators(
    _qk_norm_rope.qk_norm_rope_reference, _group_norm_silu.group_norm_silu_reference
)
NORM_FUSED = NormOperators(_qk_norm_rope.qk_norm_rope, _group_norm_silu.group_norm_silu)


def qk_norm_rope(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """RMS norm of queries and keys, then rotation by position: see ``speed_kernels.qk_norm_rope``.

    q and k are (B, H, N, D), weights (D,), cos and sin (N, D), or (B, N, D) of each image.
    """
    op = NORM_FUSED if kernels_on(q.device).norms else NORM_REFERENCE
    return op.qk_norm_rope(q, k, q_weight, k_weight, cos, sin, eps)


def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    eps: float,
) -> Tensor:
    """Group norm, scale and shift per image, SiLU: see ``speed_kernels.group_norm_silu``.

    x is (B, C, S...), weight and bias (C,), scale and shift (B, C) or None.
    """
    op = NORM_FUSED if kernels_on(x.device).norms else NORM_REFERENCE
    return op.group_norm_silu(x, num_groups, weight, bias, scale, shift, eps)


class BlockOperators(NamedTuple):
    """One implementation of what a transformer block does between its matrix products.

    ``linear`` also returns the bias whose gradient it leaves to the operator that takes the
    product next, and that operator's ``bias`` argument takes it; None where it leaves none.
    """

    linear: Callable[[nn.Linear, Tensor], tuple[Tensor, Tensor | None]]
    adaln: Callable[..., Tensor]
    gated_residual_adaln: Callable[..., tuple[Tensor, Tensor]]
    gelu: Callable[..., Tensor]
    split_heads: Callable[..., tuple[Tensor, Tensor, Tensor]]
    attention: Callable[..., Tensor]


def _linear(layer: nn.Linear, x: Tensor) -> tuple[Tensor, Tensor | None]:
    return layer(x), None


def _linear_without_bias_gradient(layer: nn.Linear, x: Tensor) -> tuple[Tensor, Tensor | None]:
    if layer.bias is None or not layer.bias.requires_grad:
        return _linear(layer, x)
    return F.linear(x, layer.weight, layer.bias.detach()), layer.bias


BLOCK_REFERENCE = BlockOperators(
    _linear,
    adaln_reference,
    gated_residual_adaln_reference,
    gelu_reference,
    split_heads_reference,
    attention_reference,
)
BLOCK_COMPILED = BLOCK_REFERENCE._replace(gelu=gelu_by_sigmoid)
BLOCK_FUSED = BlockOperators(
    _linear_without_bias_gradient, adaln, gated_residual_adaln, gelu, split_heads, attention
)


def block_operators_for(device: torch.device) -> BlockOperators:
    """Kernels on CUDA: a DiT block then moves a third less memory than under ``torch.compile``.

    So it is counted (``benchmarks/traffic.py``); ``bench_kernels.py`` times it on a GPU. Elsewhere
    the definitions, as ``torch.compile`` makes the fastest code of them where it traces.
    """
    if kernels_on(device).block:
        return BLOCK_FUSED
    traced = device.type == "cpu" and torch.compiler.is_compiling()
    return BLOCK_COMPILED if traced else BLOCK_REFERENCE


class UpdateOperators(NamedTuple):
    """One implementation of the optimizer's step with its averages, in place."""

    adamw_ema: Callable[..., None]


UPDATE_REFERENCE = UpdateOperators(_adamw_ema.adamw_ema_reference)
UPDATE_FUSED = UpdateOperators(_adamw_ema.adamw_ema)


def adamw_ema(parameters: Sequence[Tensor], *state: Any, **options: Any) -> None:
    """AdamW and averages in one sweep; arguments as of ``speed_kernels.adamw_ema``."""
    left_out = bool(parameters) and parameters[0].is_cuda and not _on_cuda.update
    op = UPDATE_REFERENCE if left_out else UPDATE_FUSED
    with torch.no_grad():
        op.adamw_ema(parameters, *state, **options)


# family, as in ``Kernels`` -> (its definitions in PyTorch, its kernels)
FAMILIES: dict[str, tuple[Any, Any]] = {
    "random": (
        RandomOperators(_philox.random_bits_reference, _philox.normal_reference),
        RandomOperators(_philox.random_bits_triton, _philox.normal_triton),
    ),
    "objective": (REFERENCE, FUSED),
    "block": (BLOCK_REFERENCE, BLOCK_FUSED),
    "norms": (NORM_REFERENCE, NORM_FUSED),
    "update": (UPDATE_REFERENCE, UPDATE_FUSED),
}
