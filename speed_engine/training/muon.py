"""Muon: momentum, made orthogonal, for the matrices inside a model's blocks (Jordan et al. 2024).

    B <- m B + (1 - m) G                    G the gradient, m the momentum
    U  = (1 - m) G + m B                    Nesterov's look ahead
    W <- (1 - lr decay) W - lr 0.2 sqrt(max(rows, columns)) orthogonal(U)

``orthogonal`` replaces the singular values by values near 1, with a few Newton-Schulz steps. The
factor gives an update the size that AdamW's have (Liu et al. 2025, arXiv 2502.16982), so that
learning rates mean the same for both.

``torch.optim.Muon`` takes one matrix at a time, whole and in bfloat16. This one splits weights that
hold several maps (``fused.Maps``), since the singular values of each should be 1; takes all
matrices of one shape in one batched product, in float32 where bfloat16 is not faster; takes
convolutions as matrices (out, in * height * width); gathers sharded parameters (FSDP2); and skips a
step on the device, as ``Update`` needs it.

Letters: S matrices of one shape.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from speed_engine.models.layers.fused import ONE, Maps
from speed_engine.runtime.precision import COMPUTE_DTYPES
from speed_engine.runtime.sharding import blocks, local
from speed_engine.training.lerp import lerp_in_one_kernel

Quintic = tuple[float, float, float]  # a, b, c of a s + b s^3 + c s^5

# Steep at 0: five bring singular values from 0.002 on to between 0.7 and 1.2. The usual ones.
STEEP: tuple[Quintic, ...] = ((3.4445, -4.7750, 2.0315),) * 5
# The first is nearest to 1 over [0.01, 1], each other one over what is left by the one before it
# (Amsel et al. 2025): values from 0.01 on come within 0.27 of 1.
NARROW_ROWS = 128
NEAREST: tuple[Quintic, ...] = (
    (8.0934, -23.6205, 17.4462),
    (3.6366, -2.7219, 0.5365),
    (2.6613, -1.9772, 0.4526),
)
TINY = 1e-7  # keeps the norm of a matrix of zeros from dividing by it
BATCH_ELEMENTS = 2**26  # of matrices that are orthogonalised at once: bounds their memory


def quintics(rows: int) -> tuple[Quintic, ...]:
    """Those that matrices of so many rows, or columns if they are fewer, go through in turn.

    The root mean square of the singular values is rows ** -0.5 of the matrix's norm, so that those
    of narrow matrices have less far to go.
    """
    return NEAREST if rows <= NARROW_ROWS else STEEP


def orthogonal(matrices: Tensor) -> Tensor:
    """(S, m, n) -> (S, m, n) with the same singular vectors, and values of about 1.

    Args:
        matrices: in any floating-point type, which the products are made in.
    """
    upright = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if upright else matrices
    exact = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.matrix_norm(x, keepdim=True, dtype=exact)
    # Quintics grow fast beyond 1: no rounding, here or in the first of them, may lead there.
    margin = 1 + 2 * torch.finfo(x.dtype).eps
    x = (x / (norm * margin + TINY)).to(x.dtype)
    for a, b, c in quintics(x.shape[-2]):
        gram = x @ x.mT
        x = a * x + torch.baddbmm(gram, gram, gram, beta=b, alpha=c) @ x
    return x.mT if upright else x


def hidden_matrices(model: nn.Module) -> Iterator[tuple[Tensor, Maps]]:
    """The weights that Muon is for, each with the maps that lie in it.

    They are the trained weights of linear maps and convolutions in the model's blocks; embeddings,
    norms, biases and what lies in the model's ``ends``, if it names any, are not.
    """
    ends = {module for end in getattr(model, "ends", ()) for module in end.modules()}
    for block in blocks(model):
        for module in block.modules():
            if (
                isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d))
                and module.weight.requires_grad
                and module not in ends
            ):
                yield module.weight, getattr(module, "maps", ONE)


def step_flops(weight: Tensor, maps: Maps) -> int:
    """Of the products of one step for a weight that holds these maps."""
    count, *sides = maps.apart(weight.flatten(1)).shape
    rows, columns = sorted(sides)
    return count * len(quintics(rows)) * (4 * rows**2 * columns + 2 * rows**3)


class Muon(torch.optim.Optimizer):
    """See the head of this module.

    Args:
        weights: (out, in, ...) each, with the maps that lie in its rows.
        lr: learning rate.
        momentum: m, in [0, 1).
        weight_decay: in units of the learning rate.
    """

    _step_supports_amp_scaling = True  # reads found_inf, () float, where GradScaler leaves it
    found_inf: Tensor | None = None

    def __init__(
        self,
        weights: Sequence[tuple[Tensor, Maps]],
        *,
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
    ) -> None:
        # Not called momentum, which schedules of AdamW's beta1 would set.
        options = {"lr": lr, "muon_momentum": momentum, "weight_decay": weight_decay}
        super().__init__([weight for weight, _ in weights], options)
        self._maps = dict(weights)
        for weight in self._maps:
            self.state[weight]["momentum_buffer"] = torch.zeros_like(weight)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update all weights with a gradient; where ``found_inf`` is 1, nothing changes."""
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            if weights:
                self._step(weights, group["lr"], group["muon_momentum"], group["weight_decay"])

    def _step(self, weights: list[Tensor], lr: float, momentum: float, decay: float) -> None:
        found_inf = self.found_inf
        found_inf = None if found_inf is None else found_inf.to(weights[0].device)
        gradients = [local(weight.grad) for weight in weights]  # pyright: ignore[reportArgumentType]
        buffers = [local(self.state[weight]["momentum_buffer"]) for weight in weights]
        lerp_in_one_kernel(buffers, gradients, 1 - momentum, found_inf)
        ahead = torch._foreach_lerp(gradients, buffers, momentum)  # pyright: ignore[reportPrivateImportUsage]
        torch._fused_sgd_(  # pyright: ignore[reportPrivateImportUsage]
            [local(weight) for weight in weights], self._orthogonal(weights, ahead), [],
            weight_decay=decay, momentum=0.0, lr=lr, dampening=0.0, nesterov=False, maximize=False,
            is_first_step=False, found_inf=found_inf,
        )  # fmt: skip

    def _orthogonal(self, weights: list[Tensor], ahead: Sequence[Tensor]) -> list[Tensor]:
        """Of each weight, this process's part of its scaled orthogonal update, in its own type."""
        rounded = _in_dtype(ahead, COMPUTE_DTYPES.get(weights[0].device.type))
        by_shape: dict[tuple[int, int], list[tuple[int, Tensor]]] = defaultdict(list)
        for i, (weight, update) in enumerate(zip(weights, rounded, strict=True)):
            matrices = self._maps[weight].apart(_gathered(update, weight).flatten(1))
            by_shape[matrices.shape[1], matrices.shape[2]].append((i, matrices))
        found: list[Tensor] = list(ahead)
        for (rows, columns), members in by_shape.items():
            for batch in _batches(members, rows * columns):
                results = orthogonal(torch.cat([matrices for _, matrices in batch]))
                results *= 0.2 * max(rows, columns) ** 0.5
                results = results.to(ahead[0].dtype)
                sizes = [len(matrices) for _, matrices in batch]
                for (i, _), result in zip(batch, results.split(sizes), strict=True):
                    whole = self._maps[weights[i]].together(result).reshape(weights[i].shape)
                    found[i] = _own_part(whole, weights[i])
        return found


def _in_dtype(tensors: Sequence[Tensor], dtype: torch.dtype | None) -> Sequence[Tensor]:
    """The same numbers rounded to a type, in one launch; None leaves them as they are."""
    if dtype in (None, tensors[0].dtype):
        return tensors
    rounded = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    torch._foreach_copy_(rounded, list(tensors))  # pyright: ignore[reportPrivateImportUsage]
    return rounded


def _batches(
    members: list[tuple[int, Tensor]], elements: int
) -> Iterator[list[tuple[int, Tensor]]]:
    """Members in order, as many at a time as the limit allows, one at least."""
    batch: list[tuple[int, Tensor]] = []
    count = 0
    for i, matrices in members:
        size = len(matrices) * elements
        if batch and count + size > BATCH_ELEMENTS:
            yield batch
            batch, count = [], 0
        batch.append((i, matrices))
        count += size
    yield batch


def _gathered(part: Tensor, like: Tensor) -> Tensor:
    """A whole tensor from the parts of it that processes hold as they hold ``like``."""
    if not hasattr(like, "placements"):
        return part
    from torch.distributed.tensor import DTensor

    assert isinstance(like, DTensor)
    laid_out = DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape,
        stride=like.stride(),
    )  # fmt: skip
    return laid_out.full_tensor()


def _own_part(whole: Tensor, like: Tensor) -> Tensor:
    """This process's part of a tensor that all hold, laid out as ``like``; nothing is sent."""
    if not hasattr(like, "placements"):
        same = whole.stride() == like.stride()
        return whole if same else torch.empty_like(like).copy_(whole)  # channels last
    from torch.distributed.tensor import DTensor, Replicate

    assert isinstance(like, DTensor)
    everywhere = [Replicate()] * like.device_mesh.ndim
    laid_out = DTensor.from_local(whole, like.device_mesh, everywhere, run_check=False)
    return laid_out.redistribute(placements=like.placements).to_local()
