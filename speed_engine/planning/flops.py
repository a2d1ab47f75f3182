"""Floating-point operations of a model, counted without computing anything."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode


def forward_flops(model: nn.Module, inputs: Mapping[str, Tensor]) -> int:
    """FLOPs of one forward pass: 2 per multiply-add of matrix products, attention, convolutions.

    What the DiT paper calls Gflops are multiply-adds, half of these. A backward pass takes twice
    the forward's.

    Args:
        model: on any device, also the meta device.
        inputs: its arguments by name, of the shapes to count; values do not matter.
    """
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        functional_call(
            model,
            {name: value.to("meta") for name, value in tensors.items()},
            kwargs={name: value.to("meta") for name, value in inputs.items()},
        )
    return counter.get_total_flops()
