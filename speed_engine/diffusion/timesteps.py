"""Timestep samplers: which timestep each image is trained on.

A sampler is a distribution, P over the T cells of a process, and a source of uniform 32-bit words.
It inverts the cumulative P, held as integers, at the image's word; in continuous time a second word
places t inside the cell. All of it is a function of (seed, image counter, step, state of the
distribution): the same on every device, in every batch and on any number of processes.

Letters: B images, T cells.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from speed_engine.diffusion.distributions import Distribution
from speed_engine.diffusion.schedule import NoiseSchedule
from speed_engine.ops import Stream, random_bits
from speed_engine.runtime.checks import UserError

Words = Callable[[Tensor, Tensor, int], Tensor]
"""() int64 seed, (B,) int64 image counters, step -> (B,) int64 in [0, 2**32), each uniform."""

_MASK = 0xFFFFFFFF
_GOLDEN = 0x61C88647  # 2**32 (1 - golden ratio): its multiples fill a circle most evenly


class TimestepSampler(nn.Module):
    """Draws timesteps of a process.

    The module's state is the distribution's, and belongs into checkpoints.

    Args:
        schedule: the process.
        distribution: P over its cells.
        words: independent, stratified or by interval.

    Raises:
        UserError: the distribution is over another number of cells.
    """

    def __init__(
        self, schedule: NoiseSchedule, distribution: Distribution, words: Words | None = None
    ) -> None:
        super().__init__()
        if len(distribution.probabilities(0)) != schedule.num_timesteps:
            raise UserError(
                f"the distribution has {len(distribution.probabilities(0))} cells, schedule "
                f"{schedule.name!r} {schedule.num_timesteps}; they must agree."
            )
        self.schedule, self.distribution, self.words = schedule, distribution, words or independent

    def probabilities(self, step: int = 0) -> Tensor:
        """(T,) float64 P at a step (updates done before it), on the host."""
        return self.distribution.probabilities(step)

    def sample(self, seed: Tensor, ids: Tensor, step: int) -> Tensor:
        """() int64, (B,) int64 image counters, updates done so far -> (B,) timesteps."""
        cells = self._cells(seed, ids, step)
        if self.schedule.discrete:
            return cells
        # float32 whatever a loop's default type is: bfloat16 would leave 256 places in a cell.
        inside = random_bits(seed, ids, 2, Stream.TIMESTEP)[:, 1].float() + 0.5
        t = (cells + inside.double() / 2**32) / self.schedule.num_timesteps
        # The largest words round to 2**32; at t = 1 noise may be infinite.
        return t.clamp(max=1 - 2.0**-32)

    def importance(self, t: Tensor) -> Tensor | float:
        """(B,) factor of the loss that keeps the objective where P serves to lower its variance."""
        return self.distribution.importance(self.schedule.cell(t))

    def observe(self, step: int, t: Tensor, loss: Tensor, finite: Tensor | bool = True) -> None:
        """Show the distribution what the images of a step cost; the device is not waited for.

        Nothing is learned from a step whose losses are not finite: one that overflows in half
        precision would leave no distribution.

        Args:
            step: as in ``sample``.
            t: (B,) timesteps of every image of the step. With several processes, gather them in the
                order of the image counters first: then all of them decide alike.
            loss: (B,) weighted errors, detached.
            finite: () bool, whether the step counts; one whose gradient overflowed does not.
        """
        learned = list(self.distribution.buffers())
        before = [buffer.clone() for buffer in learned]
        self.distribution.observe(step, self.schedule.cell(t), loss)
        counts = torch.isfinite(loss).all() & finite
        for now, was in zip(learned, before, strict=True):
            now.copy_(torch.where(counts, now, was))

    def _cells(self, seed: Tensor, ids: Tensor, step: int) -> Tensor:
        return self.distribution.invert(self.words(seed, ids, step), step)


class MirroredSampler(TimestepSampler):
    """Every second image takes the mirrored timestep of the image before it, as SpeeD is released.

    t -> M - t if t < M else t - M (NUS-HPC-AI-Lab/SpeeD, speed/diffusion/speed). Pairs are images
    2j and 2j + 1; there, the second half of a batch mirrors the first, unless the batch has fewer
    than 3 images.

    Args:
        schedule: the process.
        distribution: P of the images that are not mirrored.
        pivot: M, in [1, T - 1].
        words: as in ``TimestepSampler``.
    """

    def __init__(
        self,
        schedule: NoiseSchedule,
        distribution: Distribution,
        pivot: int,
        words: Words | None = None,
    ) -> None:
        super().__init__(schedule, distribution, words)
        if not 1 <= pivot <= schedule.num_timesteps - 1:
            raise UserError(f"pivot={pivot}: must lie in [1, {schedule.num_timesteps - 1}].")
        self.pivot = pivot

    def probabilities(self, step: int = 0) -> Tensor:
        """Half P, half its mirror image."""
        p = self.distribution.probabilities(step)
        mirrored = torch.zeros_like(p).index_add(0, self._mirror(torch.arange(len(p))), p)
        return (p + mirrored) / 2

    def _cells(self, seed: Tensor, ids: Tensor, step: int) -> Tensor:
        odd = ids & 1
        cells = super()._cells(seed, ids - odd, step)
        return torch.where(odd == 1, self._mirror(cells), cells)

    def _mirror(self, cells: Tensor) -> Tensor:
        return (cells - self.pivot).abs()


def independent(seed: Tensor, ids: Tensor, step: int) -> Tensor:
    """A word for each image by itself."""
    return random_bits(seed, ids, 1, Stream.TIMESTEP)[:, 0]


def stratified(seed: Tensor, ids: Tensor, step: int) -> Tensor:
    """Words spread evenly over any run of consecutive images: a golden-ratio lattice.

    One uniform offset per step makes each word uniform by itself; a batch's mean varies far less.
    """
    return (_offset(seed, step, ids.device) + (ids & _MASK) * _GOLDEN) & _MASK


def by_interval(num_intervals: int) -> Words:
    """Images take the intervals of equal mass in turn, as ANT's do (Go et al. 2023).

    A batch of B has B / num_intervals images of each.
    """

    def words(seed: Tensor, ids: Tensor, step: int) -> Tensor:
        interval = (ids + _offset(seed, step, ids.device)) % num_intervals
        return ((interval << 32) + independent(seed, ids, step)) // num_intervals

    return words


def _offset(seed: Tensor, step: int, device: torch.device) -> Tensor:
    """(1,) uniform word of a step: one that no image uses."""
    counter = torch.full((1,), step, dtype=torch.int64, device=device)
    return random_bits(seed, counter, 3, Stream.TIMESTEP)[:, 2]
