"""A model that computes with bfloat16 copies of its weights instead of casting them every step."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

MATRICES = nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d  # what autocast computes in bfloat16


class ShadowedModel:
    """Calls a model with its matrices, and their biases, replaced by bfloat16 copies.

    Under autocast it gives the bits that the model gives, since autocast would make those copies.
    Gradients arrive at the copies, in bfloat16; the optimizer must write them (``OneSweep``).

    Args:
        model: in float32; after loading a state into it, ``OneSweep.renew_shadows``.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.copies: dict[str, nn.Parameter] = {
            name: nn.Parameter(parameter.detach().to(torch.bfloat16))
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
            and isinstance(model.get_submodule(name.rpartition(".")[0]), MATRICES)
        }

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return functional_call(self.model, dict(self.copies), args, kwargs)

    @property
    def shadows(self) -> dict[Tensor, Tensor]:
        """Parameter -> its copy."""
        parameters = dict(self.model.named_parameters())
        return {parameters[name]: copy for name, copy in self.copies.items()}
