"""Timestep distributions: P over the T cells of a process, fixed, following the step, or learned.

A distribution is held as thresholds: cell i is drawn by words in [thresholds[i-1], thresholds[i]),
exact in integers on any device. Distributions that learn decide on the device from the losses they
observe, and never wait for it; what they learned is their module state.

Letters: B images, T cells, N stages, K bins of cells.
"""

import math

import torch
from torch import Tensor, nn

from speed_engine.diffusion.probabilities import gaussian, uniform
from speed_engine.runtime.checks import UserError

_WORD = 2**32


class Distribution(nn.Module):
    """A fixed P.

    Args:
        probabilities: (T,) non-negative; normalised here.

    Raises:
        UserError: a probability is negative or not finite, or all are zero.
    """

    def __init__(self, probabilities: Tensor) -> None:
        super().__init__()
        p = probabilities.double()
        if not bool(torch.isfinite(p).all()) or float(p.min()) < 0 or float(p.sum()) == 0:
            raise UserError(
                f"timestep probabilities lie in [{float(p.min()):.3g}, {float(p.max()):.3g}]; "
                "they must be finite, non-negative and not all zero."
            )
        self._probabilities = p / p.sum()
        self.register_buffer("_thresholds", thresholds(self._probabilities), persistent=False)

    @property
    def learns(self) -> bool:
        """Whether P follows what it observes, so that it must be shown every step."""
        return type(self).observe is not Distribution.observe

    def probabilities(self, step: int) -> Tensor:
        """(T,) float64 P at a step, on the host; for reports."""
        return self._probabilities

    def thresholds(self, step: int) -> Tensor:
        """(T,) int64, rising to 2**32."""
        return self._thresholds

    def invert(self, words: Tensor, step: int) -> Tensor:
        """(B,) int64 words -> (B,) int64 cells."""
        return torch.searchsorted(self.thresholds(step), words, right=True)

    def importance(self, cells: Tensor) -> Tensor | float:
        """(B,) -> (B,) factor of the loss; 1 if P is part of the objective."""
        return 1.0

    def observe(self, step: int, cells: Tensor, loss: Tensor) -> None:
        """(B,) cells and (B,) losses of all images of a step."""

    _thresholds: Tensor


class ClimbingDistribution(Distribution):
    """CLTS (arXiv 2404.07946): from uniform to a Gaussian over t, linearly in the step.

    P_n = (1 - n / ramp) U + (n / ramp) N(mean, std**2). The structure is from SpeeD's description
    and code; the paper's width and ramp are not confirmed by a public source.

    Args:
        num_cells: T.
        ramp_steps: steps after which the distribution is the Gaussian alone.
        mean: its mean, in units of T; 0.3 is the paper's optimum.
        std: its standard deviation, in units of T.

    Raises:
        UserError: ramp_steps or std is not positive.
    """

    def __init__(
        self, num_cells: int, ramp_steps: int, mean: float = 0.3, std: float = 0.2
    ) -> None:
        super().__init__(uniform(num_cells))
        if ramp_steps < 1:
            raise UserError(f"ramp_steps={ramp_steps}: must be at least 1.")
        self._ramp = ramp_steps
        self._last = gaussian(num_cells, mean, std)
        travel = thresholds(self._last) - self._thresholds
        self.register_buffer("_travel", travel, persistent=False)

    def probabilities(self, step: int) -> Tensor:
        """Mixture of both."""
        return torch.lerp(self._probabilities, self._last, self._share(step))

    def thresholds(self, step: int) -> Tensor:
        """Mixture of both, rounded."""
        return self._thresholds + (self._travel.double() * self._share(step)).round().long()

    def _share(self, step: int) -> float:
        return min(step / self._ramp, 1.0)

    _travel: Tensor


class TaskCurriculum(Distribution):
    """From noisy, easy timesteps to all (Kim et al. 2024, arXiv 2403.10348).

    Stage n draws uniformly from the n noisiest of N clusters. The next stage begins when the mean
    loss of a step has not improved for ``patience`` steps. Defaults follow third-party code.

    Args:
        num_cells: T.
        clusters: N, intervals of equal size.
        patience: steps.

    Raises:
        UserError: N is outside [1, T], or patience below 1.
    """

    def __init__(self, num_cells: int, clusters: int = 20, patience: int = 200) -> None:
        super().__init__(uniform(num_cells))
        if not 1 <= clusters <= num_cells:
            raise UserError(f"clusters={clusters}: must lie in [1, {num_cells}].")
        if patience < 1:
            raise UserError(f"patience={patience}: must be at least 1 step.")
        self._patience = patience
        cells = torch.arange(num_cells)
        first = [num_cells - stage * num_cells // clusters for stage in range(1, clusters + 1)]
        self._stages = torch.stack([(cells >= f).double() / (num_cells - f) for f in first])
        tables = torch.stack([thresholds(p) for p in self._stages])
        self.register_buffer("_tables", tables, persistent=False)
        self.register_buffer("stage", torch.zeros((), dtype=torch.int64))
        self.register_buffer("best_loss", torch.full((), math.inf, dtype=torch.float32))
        self.register_buffer("steps_without_gain", torch.zeros((), dtype=torch.int64))

    def probabilities(self, step: int) -> Tensor:
        """Of the present stage; reads the device."""
        return self._stages[int(self.stage)]

    def thresholds(self, step: int) -> Tensor:
        """Of the present stage."""
        return self._tables.index_select(0, self.stage.view(1))[0]  # a scalar index would wait

    def observe(self, step: int, cells: Tensor, loss: Tensor) -> None:
        """Compare the step's mean loss with the best one."""
        mean = loss.float().mean()
        waited = torch.where(mean < self.best_loss, 0, self.steps_without_gain + 1)
        advance = (waited >= self._patience) & (self.stage < len(self._tables) - 1)
        self.best_loss.copy_(torch.where(advance, math.inf, torch.minimum(self.best_loss, mean)))
        self.steps_without_gain.copy_(torch.where(advance, 0, waited))
        self.stage += advance

    _tables: Tensor
    stage: Tensor
    best_loss: Tensor
    steps_without_gain: Tensor


class AdaptiveDistribution(Distribution):
    """Cells drawn in proportion to the root mean square of their loss, the loss divided by as much.

    Importance sampling keeps the objective and lowers the variance of its gradient (Nichol and
    Dhariwal 2021, ``LossSecondMomentResampler``). Bins of neighbouring cells share statistics,
    which enter every ``interval`` steps; until then the distribution is uniform.

    Args:
        num_cells: T.
        bins: K, at most T.
        interval: steps between changes of P.
        floor: share of the draws that stays uniform, in (0, 1].

    Raises:
        UserError: an argument is out of range.
    """

    keep = 0.5  # share of the old second moment that is kept at each change

    def __init__(
        self, num_cells: int, bins: int = 50, interval: int = 50, floor: float = 0.1
    ) -> None:
        super().__init__(uniform(num_cells))
        if not (bins >= 1 and interval >= 1 and 0 < floor <= 1):
            raise UserError(
                f"bins={bins}, interval={interval}, floor={floor}: need bins and interval at least "
                "1, floor in (0, 1]."
            )
        bins = min(bins, num_cells)
        self._interval, self._floor = interval, floor
        bin_of_cell = torch.arange(num_cells) * bins // num_cells
        share = 1 / torch.bincount(bin_of_cell).double()
        self.register_buffer("_bin_of_cell", bin_of_cell, persistent=False)
        self.register_buffer("_share_in_bin", share[bin_of_cell], persistent=False)
        for name in ("squares", "counts", "second_moment"):
            self.register_buffer(name, torch.zeros(bins, dtype=torch.float64))
        self.register_buffer("cell_probabilities", self._probabilities.clone())

    def probabilities(self, step: int) -> Tensor:
        """As learned so far; reads the device."""
        return self.cell_probabilities.cpu()

    def thresholds(self, step: int) -> Tensor:
        """As learned so far."""
        return thresholds(self.cell_probabilities)

    def importance(self, cells: Tensor) -> Tensor:
        """(B,) -> (B,) uniform probability over the present one."""
        return (1 / (self.cell_probabilities[cells] * len(self.cell_probabilities))).float()

    def observe(self, step: int, cells: Tensor, loss: Tensor) -> None:
        """Add to the statistics; change P at the end of an interval."""
        bins = torch.arange(len(self.squares), device=cells.device)
        # A masked sum: index_add_ would be summed in another order each time on a GPU.
        mine = self._bin_of_cell[cells][:, None] == bins
        self.squares += (mine * loss.double().square()[:, None]).sum(0)
        self.counts += mine.sum(0)
        if (step + 1) % self._interval == 0:
            self._learn()

    def _learn(self) -> None:
        seen, known = self.counts > 0, self.second_moment > 0
        mean = self.squares / self.counts.clamp(min=1)
        moved = torch.where(known, self.keep * self.second_moment + (1 - self.keep) * mean, mean)
        self.second_moment.copy_(torch.where(seen, moved, self.second_moment))
        root = self.second_moment.sqrt()
        learned = root / root.sum()
        uniform_bins = 1 / len(root)
        mixed = self._floor * uniform_bins + (1 - self._floor) * learned
        ready = (self.second_moment > 0).all()
        by_bin = torch.where(ready, mixed, uniform_bins)
        self.cell_probabilities.copy_(by_bin[self._bin_of_cell] * self._share_in_bin)
        self.squares.zero_()
        self.counts.zero_()

    _bin_of_cell: Tensor
    _share_in_bin: Tensor
    squares: Tensor
    counts: Tensor
    second_moment: Tensor
    cell_probabilities: Tensor


def thresholds(probabilities: Tensor) -> Tensor:
    """(T,) normalised float64 -> (T,) int64 rising to 2**32; any device makes the same integers."""
    # Terms in units of 2**-52 add exactly; only their sum is rounded to a word.
    fine = (probabilities * 2**52).round().long().cumsum(0)
    cumulative = ((fine + 2**19) >> 20).clamp_(max=_WORD)
    cumulative[-1] = _WORD
    return cumulative
