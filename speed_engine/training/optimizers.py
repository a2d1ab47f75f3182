"""Optimizers by name, and their state by parameter name.

Another optimizer is a function here and its name in ``OPTIMIZERS``. It returns optimizers that
together hold every trained parameter once. Their state is complete before the first step, so that a
checkpoint can be loaded into it, and it consists of tensors that lie where their parameter lies, so
that the device alone can decide whether a step changes them (see update.py).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from speed_engine.runtime.checks import UserError
from speed_engine.training.muon import Muon, hidden_matrices

EPS = 1e-8  # of AdamW


@dataclass(frozen=True, kw_only=True)
class Hyperparameters:
    """What an optimizer is made with.

    Attributes:
        learning_rate: of the model's parameters.
        beta1: decay of the first moment, in [0, 1).
        beta2: decay of the second moment, in [0, 1).
        weight_decay: of the model's parameters, in units of the learning rate.
        loss_learning_rate: of the loss's own parameters; by default that of the model's that AdamW
            trains.
        adamw_learning_rate: of the parameters that Muon leaves to AdamW; by default the model's.
        muon_momentum: of Muon, in [0, 1).
    """

    learning_rate: float
    beta1: float = 0.9
    beta2: float = 0.999
    weight_decay: float = 0.0
    loss_learning_rate: float | None = None
    adamw_learning_rate: float | None = None
    muon_momentum: float = 0.95


def adamw(model: nn.Module, loss: nn.Module, hyper: Hyperparameters) -> list[torch.optim.Optimizer]:
    """AdamW in its fused form: one pass over all parameters, no synchronisation.

    Args:
        model: whose parameters are trained.
        loss: its own parameters, if it has any, are trained without weight decay.
        hyper: learning rates, betas and weight decay.
    """
    return [_adamw(parameter_groups(model, loss, hyper), hyper)]


def muon(model: nn.Module, loss: nn.Module, hyper: Hyperparameters) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the model's blocks, AdamW for all other parameters.

    Arguments are as of ``adamw``; both optimizers have the model's weight decay.

    Raises:
        UserError: the model has no matrices in blocks.
    """
    matrices = list(hidden_matrices(model))
    if not matrices:
        raise UserError(
            f"optimizer.name=muon needs matrices inside blocks; {type(model).__name__} has none: "
            "use adamw."
        )
    hidden = Muon(
        matrices, lr=hyper.learning_rate, momentum=hyper.muon_momentum,
        weight_decay=hyper.weight_decay,
    )  # fmt: skip
    chosen = {weight for weight, _ in matrices}
    rate = hyper.adamw_learning_rate or hyper.learning_rate
    left = replace(hyper, loss_learning_rate=hyper.loss_learning_rate or rate)
    groups = parameter_groups(model, loss, left)
    groups[0]["params"] = [p for p in groups[0]["params"] if p not in chosen]
    groups[0]["lr_scale"] = rate / hyper.learning_rate
    return [hidden, _adamw(groups, hyper)]


OPTIMIZERS: dict[
    str, Callable[[nn.Module, nn.Module, Hyperparameters], list[torch.optim.Optimizer]]
] = {"adamw": adamw, "muon": muon}


def _adamw(groups: list[dict], hyper: Hyperparameters) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(
        groups, lr=hyper.learning_rate, betas=(hyper.beta1, hyper.beta2), eps=EPS,
        weight_decay=hyper.weight_decay, fused=True,
    )  # fmt: skip
    return with_state(optimizer, _moments)


def parameter_groups(model: nn.Module, loss: nn.Module, hyper: Hyperparameters) -> list[dict]:
    """The model's trained parameters first; the loss's, if it has any, second.

    A group's ``lr_scale`` is the factor that ``set_rates`` applies to its learning rate.
    """
    groups: list[dict] = [{"params": [p for p in model.parameters() if p.requires_grad]}]
    learned = list(loss.parameters())
    if learned:
        scale = (hyper.loss_learning_rate or hyper.learning_rate) / hyper.learning_rate
        groups.append({"params": learned, "weight_decay": 0.0, "lr_scale": scale})
    return groups


def with_state(
    optimizer: torch.optim.Optimizer, initial: Callable[[Tensor], dict[str, Tensor]]
) -> torch.optim.Optimizer:
    """Give every parameter of an optimizer the state that precedes its first step.

    Args:
        optimizer: without state.
        initial: parameter -> its state, by the names that the optimizer gives it.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = initial(parameter)
    return optimizer


def _moments(parameter: Tensor) -> dict[str, Tensor]:
    """What AdamW's first step would make; the counter is where the fused kernel expects it."""
    return {
        "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
        "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
        "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
    }


def optimizer_tensors(
    module: nn.Module, optimizers: Sequence[torch.optim.Optimizer]
) -> dict[str, Tensor]:
    """The state that belongs to a module's parameters, ``parameter/name`` -> tensor."""
    return {
        f"{name}/{key}": value
        for name, parameter in module.named_parameters()
        for optimizer in optimizers
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def set_rates(optimizer: torch.optim.Optimizer, learning_rate: float, beta1: float | None) -> None:
    """Set every group's learning rate, in proportion, and the decay of first moments if given.

    The decay is the first of ``betas``; in an optimizer without them, a ``momentum`` that is on.
    """
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("lr_scale", 1.0)
        if beta1 is not None and "betas" in group:
            group["betas"] = (beta1, group["betas"][1])
        elif beta1 is not None and group.get("momentum"):
            group["momentum"] = beta1
