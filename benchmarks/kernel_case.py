"""A case of the kernel benchmark: one operation in several implementations, and its inputs."""

import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

DRY = "--dry-run" in sys.argv
DEVICE = torch.device("cpu" if DRY or not torch.cuda.is_available() else "cuda")
CACHE_BYTES = 128 * 2**20  # inputs of a replayed graph together exceed this, up to MOST_SETS
MOST_SETS = 1 if DRY else 16


class Case(NamedTuple):
    """One operation in several implementations; each takes the number of a set of inputs."""

    name: str
    num_bytes: int
    providers: dict[str, Callable[[int], object]]
    num_sets: int
    check: Callable[[], None]
    facts: Mapping[str, Any] = {}  # for the result file


def compiled(function: Callable) -> Callable:
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False, backend="aot_eager" if DRY else "inductor")


def sets_for(num_bytes: int) -> int:
    return min(MOST_SETS, -(-CACHE_BYTES // num_bytes))


def require(what: str, actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Relative error in the norm, against float64."""
    error = (actual.double() - expected.double()).norm() / expected.double().norm()
    assert error <= tolerance, f"{what}: relative error {error:.2e}, allowed {tolerance:.0e}"
