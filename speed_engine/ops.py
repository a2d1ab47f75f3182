"""The operators that have a kernel. Only this module imports ``speed_kernels``."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from speed_kernels.clean_images import clean_images, clean_images_reference
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
    "FUSED", "HAS_TRITON", "REFERENCE", "SPECIFICATION", "Operators", "Stream", "normal",
    "operators_for", "random_bits",
]  # fmt: skip


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
    return FUSED if device.type == "cuda" and HAS_TRITON else REFERENCE
