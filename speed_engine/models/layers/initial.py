"""How layers begin."""

from typing import TypeVar

from torch import nn

Convolution = TypeVar("Convolution", nn.Conv1d, nn.Conv2d)


def zeroed(module: Convolution) -> Convolution:
    """The module with all its parameters zero: what it adds to a skip is nothing at first."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module
