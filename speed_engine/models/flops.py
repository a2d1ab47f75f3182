"""Floating-point operations of a model, counted without computing anything."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


def forward_flops(model: nn.Module, inputs: Mapping[str, Tensor]) -> int:
    """X placeholder until D's."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**inputs)
    return counter.get_total_flops()
