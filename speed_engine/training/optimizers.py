"""The optimizer, its learning rate and momentum over time, and its state by parameter name."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from speed_engine.ops import adamw_ema
from speed_engine.runtime.checks import UserError
from speed_engine.runtime.sharding import local, whole

EPS = 1e-8  # of AdamW


def adamw(
    model: nn.Module,
    *,
    learning_rate: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
    loss: nn.Module | None = None,
    loss_learning_rate: float | None = None,
) -> torch.optim.AdamW:
    """AdamW in its fused form: one pass over all parameters, no synchronisation.

    Args:
        model: whose parameters are trained.
        learning_rate: of the model.
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        weight_decay: of the model, in units of the learning rate.
        loss: a loss with parameters of its own, trained without weight decay.
        loss_learning_rate: theirs; by default the model's.
    """
    groups = _parameter_groups(model, learning_rate, loss, loss_learning_rate)
    return torch.optim.AdamW(
        groups, lr=learning_rate, betas=(beta1, beta2), eps=EPS, weight_decay=weight_decay,
        fused=True,
    )  # fmt: skip


def one_sweep(
    model: nn.Module,
    *,
    learning_rate: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
    loss: nn.Module | None = None,
    loss_learning_rate: float | None = None,
    shadows: Mapping[Tensor, Tensor] | None = None,
) -> "OneSweep":
    """As ``adamw``, in one sweep with clipping and averages.

    Args:
        model: whose parameters are trained.
        learning_rate: of the model.
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        weight_decay: of the model, in units of the learning rate.
        loss: a loss with parameters of its own, trained without weight decay.
        loss_learning_rate: theirs; by default the model's.
        shadows: parameter -> bfloat16 copy that stands in for it in forward and backward.
    """
    groups = _parameter_groups(model, learning_rate, loss, loss_learning_rate)
    options = dict(lr=learning_rate, betas=(beta1, beta2), eps=EPS, weight_decay=weight_decay)
    return OneSweep(groups, options, shadows or {})


def _parameter_groups(
    model: nn.Module, learning_rate: float, loss: nn.Module | None, loss_learning_rate: float | None
) -> list[dict]:
    """The model's trained parameters first; the loss's, if it has any, second."""
    groups: list[dict] = [{"params": [p for p in model.parameters() if p.requires_grad]}]
    learned = [] if loss is None else list(loss.parameters())
    if learned:
        scale = (loss_learning_rate or learning_rate) / learning_rate
        groups.append({"params": learned, "weight_decay": 0.0, "lr_scale": scale})
    return groups


class OneSweep(torch.optim.Optimizer):
    """AdamW, clipping of the first group, and averages of it, in one sweep over memory.

    Its state has the names and meaning of ``torch.optim.AdamW``'s, so that either continues the
    other's run. It skips an update whose gradients are not all finite; the device decides, and its
    counts of updates fall behind the number of sweeps. Parameters may be distributed (FSDP2): every
    process updates its local shards.

    Args:
        groups: as torch.optim has them.
        options: lr, betas, eps, weight_decay.
        shadows: parameter -> bfloat16 copy, which receives the gradient in its place, and its value
            after each sweep.

    Raises:
        UserError: a parameter is not float32, or a distributed one has a shadow.
    """

    def __init__(self, groups: list[dict], options: dict, shadows: Mapping[Tensor, Tensor]) -> None:
        super().__init__(groups, options)
        self._shadows = shadows
        self._parts = [
            part
            for number, group in enumerate(self.param_groups)
            for part in self._partition(number, group["params"])
        ]
        self.register_load_state_dict_post_hook(lambda _: self._adopt_counts())

    def _partition(self, number: int, parameters: list[Tensor]) -> list["_Part"]:
        """One call of the kernel for parameters with shadows, one for those without."""
        parts = []
        for shadowed in (True, False):
            members = [i for i, p in enumerate(parameters) if (p in self._shadows) == shadowed]
            if not members:
                continue
            chosen = [parameters[i] for i in members]
            steps = torch.zeros(len(members), device=chosen[0].device)
            for parameter, step in zip(chosen, steps, strict=True):
                if parameter.dtype != torch.float32:
                    raise UserError(
                        f"OneSweep: parameters must be float32; one of shape "
                        f"{tuple(parameter.shape)} is {parameter.dtype}."
                    )
                if shadowed and local(parameter) is not parameter:
                    raise UserError(
                        "OneSweep: a distributed parameter has a shadow; use FSDP2's "
                        "MixedPrecisionPolicy(param_dtype=torch.bfloat16) instead."
                    )
                self.state[parameter] = {
                    "step": step,  # () of one vector that the kernel updates
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
            parts.append(_Part(number, members, chosen, steps, shadowed))
        return parts

    def _adopt_counts(self) -> None:
        """Counts that were loaded become parts of one vector again."""
        for part in self._parts:
            for parameter, step in zip(part.parameters, part.steps, strict=True):
                step.copy_(self.state[parameter]["step"])
                self.state[parameter]["step"] = step

    @torch.no_grad()
    def sweep(
        self, averages: Sequence[Sequence[Tensor]], decays: Sequence[float], max_norm: float
    ) -> tuple[Tensor, Tensor]:
        """One update from the gradients, unless one of them is not finite.

        Args:
            averages: for each horizon, one tensor per parameter of the first group.
            decays: for each horizon, the share kept in this step.
            max_norm: of the first group's gradients, larger ones are scaled down to it.

        Returns:
            () norm of the first group's gradients, before clipping; () whether all are finite.

        Raises:
            UserError: a parameter has no gradient.
        """
        gradients = [self._gradients(part.parameters) for part in self._parts]
        norms = [
            _norm([g for part, gs in zip(self._parts, gradients, strict=True) for g in gs
                   if part.group == number])
            for number in range(len(self.param_groups))
        ]  # fmt: skip
        finite = torch.stack(norms).isfinite().all()
        for part, part_gradients in zip(self._parts, gradients, strict=True):
            group, first = self.param_groups[part.group], part.group == 0
            followed = [[average[i] for i in part.members] for average in averages if first]
            states = [self.state[parameter] for parameter in part.parameters]
            adamw_ema(
                _local(part.parameters),
                _local(part_gradients),
                _local([state["exp_avg"] for state in states]),
                _local([state["exp_avg_sq"] for state in states]),
                [_local(tensors) for tensors in followed],
                part.steps,
                torch.where(finite, norms[part.group], math.nan),
                learning_rate=group["lr"],
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                eps=group["eps"],
                weight_decay=group["weight_decay"],
                max_norm=max_norm if first else math.inf,
                decays=decays if first else (),
                shadows=[self._shadows[p] for p in part.parameters] if part.shadowed else (),
            )
        return norms[0], finite

    @torch.no_grad()
    def renew_shadows(self) -> None:
        """Copy the parameters again, after they were set by other hands."""
        for parameter, shadow in self._shadows.items():
            shadow.copy_(parameter)

    def step(self, closure: None = None) -> None:
        """A sweep without clipping and averages."""
        self.sweep((), (), math.inf)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients, those of shadows too."""
        super().zero_grad(set_to_none)
        for shadow in self._shadows.values():
            shadow.grad = None

    def _gradients(self, parameters: list[Tensor]) -> list[Tensor]:
        gradients = []
        for parameter in parameters:
            gradient = self._shadows.get(parameter, parameter).grad
            if gradient is None:
                raise UserError(
                    f"OneSweep: a parameter of shape {tuple(parameter.shape)} has no gradient; one "
                    "sweep updates all of them. Freeze it, or use optimizer.update=separate."
                )
            gradients.append(gradient)
        return gradients


class _Part(NamedTuple):
    """Parameters of one group that one call of the kernel updates."""

    group: int
    members: list[int]  # their places in the group
    parameters: list[Tensor]
    steps: Tensor
    shadowed: bool


def _norm(gradients: list[Tensor]) -> Tensor:
    """() float32 norm over all tensors, of all ranks where they are distributed."""
    if local(gradients[0]) is not gradients[0]:
        return whole(nn.utils.get_total_norm(gradients))
    norms = torch._foreach_norm(gradients, 2, dtype=torch.float32)  # pyright: ignore[reportPrivateImportUsage]
    return torch.linalg.vector_norm(torch.stack(norms))


def _local(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [local(tensor) for tensor in tensors]


def set_rates(optimizer: torch.optim.Optimizer, learning_rate: float, beta1: float | None) -> None:
    """Set every group's learning rate, in proportion, and the decay of first moments if given."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("lr_scale", 1.0)
        if beta1 is not None:
            group["betas"] = (beta1, group["betas"][1])


def linear_warmup(learning_rate: float, warmup_steps: int) -> Callable[[int], float]:
    """Step number, from 1 -> learning rate: a linear rise, then constant."""
    return lambda step: learning_rate * min(1.0, step / max(warmup_steps, 1))


class Momentum(NamedTuple):
    """Both are functions of the step number, from 1."""

    beta1: Callable[[int], float]
    compensation: Callable[[int], float]  # factor of the learning rate


def steady(beta1: float, steps: int) -> Momentum:
    """The same momentum throughout."""
    return Momentum(lambda step: beta1, lambda step: 1.0)


def demon(beta1: float, steps: int) -> Momentum:
    """MDLRC: momentum decays to zero over the run, the learning rate is compensated.

    beta_t = b (1 - p) / ((1 - b) + b (1 - p)), p = share of the run (Chen et al. 2019, Demon), and
    lr_t = lr (1 - b) / (1 - beta_t) = lr (1 - b p), which keeps the weight lr (1 - beta) of each
    new gradient. The most consistent reading of arXiv 2404.07946; no code of its authors is public.
    """

    def decayed(step: int) -> float:
        left = beta1 * (1 - (step - 1) / steps)
        return left / ((1 - beta1) + left)

    return Momentum(decayed, lambda step: 1 - beta1 * (step - 1) / steps)


def geometric(beta1: float, steps: int) -> Momentum:
    """MDLRC as a third party has it: beta_t = max(b 0.9995**t, 0.4), no compensation."""
    floor = min(beta1, 0.4)
    return Momentum(lambda step: max(beta1 * 0.9995 ** (step - 1), floor), lambda step: 1.0)


MOMENTUM_DECAYS: dict[str, Callable[[float, int], Momentum]] = {
    "none": steady,
    "demon": demon,
    "geometric": geometric,
}


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The state as one flat dictionary, ``parameter/moment`` -> tensor; complete at any time."""
    tensors = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            for key, value in _state(optimizer, parameter).items():
                tensors[f"{name}/{key}"] = value
    return tensors


def _state(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """AdamW's state of a parameter; what its first step would make, if it had none."""
    state = optimizer.state[parameter]
    if not state:
        # The counter stays where the fused kernel expects it: with its parameter.
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
    return state
