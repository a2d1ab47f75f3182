"""Probabilities P over T cells: masses of published densities, exact where their CDF is known.

Every function returns (T,) float64 that adds to one. Densities over time live on u in [0, 1], the
coordinate that the process's baseline draws uniformly; cell i is [i/T, (i+1)/T).
"""

import math

import torch
from torch import Tensor

from speed_engine.diffusion.schedule import NoiseSchedule
from speed_engine.runtime.checks import UserError


def uniform(num_cells: int) -> Tensor:
    """All cells alike."""
    return torch.full((num_cells,), 1 / num_cells, dtype=torch.float64)


def asymmetric(num_cells: int, tau: float, k: float = 5.0) -> Tensor:
    """P(t), k times higher up to tau than in the convergence area beyond (SpeeD, Eq. 3).

    Args:
        num_cells: T.
        tau: border in the paper's t (counted from 1): indices below tau are the frequent ones.
        k: ratio of the two probabilities, at least 1.

    Raises:
        UserError: k is outside [1, 10^30] or tau outside [1, T].
    """
    if not 1 <= k <= 1e30:
        raise UserError(f"k={k}: the sampling ratio must lie in [1, 10^30].")
    if not 1 <= tau <= num_cells:
        raise UserError(f"tau={tau} is outside [1, {num_cells}], the process's timesteps.")
    t = torch.arange(1, num_cells + 1, dtype=torch.float64)
    # k has the precision of float32, so that runs of every version draw the same timesteps.
    ratio = torch.tensor([1.0, k], dtype=torch.float32).double()
    return _normalised(ratio[(t <= tau).long()])


def log_normal(schedule: NoiseSchedule, mean: float = -1.2, std: float = 1.2) -> Tensor:
    """log sigma ~ N(mean, std**2) for data of standard deviation 0.5 (Karras et al. 2022).

    The noise level is rescaled to the process's data, so that the signal-to-noise ratio follows
    their distribution; EDM2 uses -0.4 and 1.0 (Karras et al. 2024).

    Raises:
        UserError: std is not positive.
    """
    _positive(std)
    log_sigma = schedule.edges + math.log(0.5 / schedule.sigma_data)
    return _normalised(torch.special.ndtr((log_sigma - mean) / std).diff())


def logit_normal(num_cells: int, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """u = sigmoid(N(mean, std**2)) (Esser et al. 2024, SD3).

    Raises:
        UserError: std is not positive.
    """
    _positive(std)
    return _normalised(torch.special.ndtr((torch.logit(_edges(num_cells)) - mean) / std).diff())


def mode(num_cells: int, scale: float = 1.29) -> Tensor:
    """u = 1 - x - scale (cos(pi x / 2)**2 - 1 + x), x uniform: more of the middle (SD3).

    Raises:
        UserError: scale is outside [-1, 2 / (pi - 2)], where u is not monotone in x.
    """
    largest = 2 / (math.pi - 2)
    if not -1 <= scale <= largest:
        raise UserError(f"scale={scale}: mode sampling needs one in [-1, {largest:.3f}].")
    edges = _edges(num_cells)
    low, high = torch.zeros_like(edges), torch.ones_like(edges)
    for _ in range(60):  # bisection: u falls from 1 to 0 as x rises
        x = (low + high) / 2
        above = 1 - x - scale * ((math.pi * x / 2).cos().square() - 1 + x) > edges
        low, high = torch.where(above, x, low), torch.where(above, high, x)
    return _normalised((-low.diff()).clamp(min=0))


def shifted(num_cells: int, shift: float = 3.0) -> Tensor:
    """u = shift x / (1 + (shift - 1) x), x uniform (Esser et al. 2024, Eq. 23).

    Raises:
        UserError: shift is not positive.
    """
    if not (shift > 0 and math.isfinite(shift)):
        raise UserError(f"shift={shift}: must be a positive number.")
    edges = _edges(num_cells)
    return _normalised((edges / (shift - (shift - 1) * edges)).diff())


def gaussian(num_cells: int, mean: float, std: float) -> Tensor:
    """Normal in u, cut off at 0 and 1.

    Raises:
        UserError: std is not positive.
    """
    _positive(std)
    return _normalised(torch.special.ndtr((_edges(num_cells) - mean) / std).diff())


def _edges(num_cells: int) -> Tensor:
    return torch.arange(num_cells + 1, dtype=torch.float64) / num_cells


def _positive(std: float) -> None:
    if not (std > 0 and math.isfinite(std)):
        raise UserError(f"std={std}: a standard deviation must be a positive number.")


def _normalised(masses: Tensor) -> Tensor:
    if not float(masses.sum()) > 0:
        raise UserError("the density has no mass on the timesteps of this process; widen it.")
    return masses / masses.sum()
