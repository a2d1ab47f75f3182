"""Image counters for a loop that has none: which numbers a method's draws in it take.

Draws are functions of image counters, so every image of the run, on every process, needs one of its
own. The images of a process are numbered in the order in which it draws them, and the processes
take the counters in turn, a block of ``BLOCK`` at a time:

    n-th image of process r of W        first + (n // BLOCK * W + r) * BLOCK + n % BLOCK

No two are ever equal, however unequal batches are: after a short last batch, with several draws in
a step, and with processes that hold different numbers of images.

Letters: B images.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from speed_engine.runtime.checks import UserError, check_whole

BLOCK = 64  # even, so that both images of a mirrored pair are of one process


@dataclass
class Draws:
    """What this process has drawn so far.

    Attributes:
        images: how many.
        first: the run's first counter; None before the first draw.
    """

    images: int = 0
    first: int | None = None

    def take(self, batch: int, step: int, rank: int | None, world_size: int | None) -> Tensor:
        """The counters of the next images.

        A run that is resumed without its state must not repeat its beginning: the first counter is
        2**32 times the first step.

        Args:
            batch: B.
            step: optimizer steps done so far.
            rank: of this process; by default torch.distributed's, or 0 where that is not in use.
            world_size: number of processes, likewise.

        Returns:
            (B,) int64.

        Raises:
            UserError: a rank without a world size, or one outside it.
        """
        rank, world_size = _place(rank, world_size)
        if self.first is None:
            self.first = step << 32
        n = torch.arange(self.images, self.images + batch)
        self.images += batch
        return self.first + (n // BLOCK * world_size + rank) * BLOCK + n % BLOCK


def _place(rank: int | None, world_size: int | None) -> tuple[int, int]:
    if (rank is None) != (world_size is None):
        raise UserError(
            f"rank={rank}, world_size={world_size}: give both, or neither, so that they are those "
            "of torch.distributed."
        )
    if rank is None or world_size is None:
        in_use = dist.is_available() and dist.is_initialized()
        return (dist.get_rank(), dist.get_world_size()) if in_use else (0, 1)
    check_whole("rank", rank, 0, 2**31)
    check_whole("world_size", world_size, 1, 2**31)
    if not 0 <= rank < world_size:
        raise UserError(f"rank={rank} of world_size={world_size}: must lie in [0, {world_size}).")
    return rank, world_size
