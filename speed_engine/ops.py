"""The operators that have a kernel. Only this module imports ``speed_kernels``.

``Operators`` are the objective's; what models and the optimizer call (``qk_norm_rope``,
``group_norm_silu``, ``adamw_ema``) runs its kernel on CUDA and its reference elsewhere by itself.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from speed_kernels.adamw_ema import adamw_ema
from speed_kernels.group_norm_silu import group_norm_silu
from speed_kernels.language import HAS_TRITON
from speed_kernels.noising import noised_input, noised_input_reference
from speed_kernels.philox import SPECIFICATION, Stream, normal, random_bits
from speed_kernels.qk_norm_rope import qk_norm_rope, qk_norm_rope_reference
from speed_kernels.variational_bound import variational_bound_reference as variational_bound
from speed_kernels.weighted_mse import weighted_mse, weighted_mse_reference

__all__ = [
    "FUSED", "HAS_TRITON", "REFERENCE", "SPECIFICATION", "Operators", "Stream", "adamw_ema",
    "group_norm_silu", "normal", "operators_for", "qk_norm_rope",
    "qk_norm_rope_reference", "random_bits", "variational_bound",
]  # fmt: skip


class Operators(NamedTuple):
    """One implementation of each operator of the training step."""

    noised_input: Callable[..., Tensor]
    weighted_mse: Callable[..., tuple[Tensor, Tensor]]


REFERENCE = Operators(noised_input_reference, weighted_mse_reference)
FUSED = Operators(noised_input, weighted_mse)


def operators_for(device: torch.device) -> Operators:
    """Kernels where they run, on CUDA; the same definitions in PyTorch elsewhere."""
    return FUSED if device.type == "cuda" and HAS_TRITON else REFERENCE
