"""From per-image losses to the loss of a batch: their mean, or weights learned with the model.

A learned weight exp(-u(t)) is balanced by the penalty u(t), as in a Gaussian's likelihood. Its
parameters are trained by the model's optimizer, without weight decay.

Letters: B images, T cells, K clusters.
"""

import torch
from torch import Tensor, nn

from speed_engine.diffusion.schedule import NoiseSchedule
from speed_engine.runtime.checks import UserError


class MeanLoss(nn.Module):
    """The mean; nothing is learned."""

    learning_rate: float | None = None  # of the parameters; None is the model's

    def forward(self, cells: Tensor, loss: Tensor) -> Tensor:
        """(B,) int64, (B,) -> ()."""
        return loss.mean()


class ClusterUncertainty(MeanLoss):
    """ANT-UW: one learned weight per interval of t (Go et al. 2023; mtl_library/uw.py there).

    sum_i (exp(-s_i) l_i + s_i) / 2 with l_i the mean loss of cluster i over K; batches draw each
    cluster equally often, so that sum_i exp(-s_i) l_i is a mean over the batch.

    Args:
        num_cells: T.
        clusters: K intervals of equal size.

    Raises:
        UserError: K is outside [1, T].
    """

    learning_rate = 0.025

    def __init__(self, num_cells: int, clusters: int = 5) -> None:
        super().__init__()
        if not 1 <= clusters <= num_cells:
            raise UserError(f"clusters={clusters}: must lie in [1, {num_cells}].")
        self.num_cells = num_cells
        self.log_variance = nn.Parameter(torch.zeros(clusters, dtype=torch.float32))

    def forward(self, cells: Tensor, loss: Tensor) -> Tensor:
        """(B,) int64, (B,) -> ()."""
        cluster = cells * len(self.log_variance) // self.num_cells
        weighted = loss * torch.exp(-self.log_variance[cluster])
        return (weighted.mean() + self.log_variance.sum()) / 2


class FourierUncertainty(MeanLoss):
    """EDM2: u(t) linear in random Fourier features of the noise level (Karras et al. 2024, Sec. 2).

    mean of exp(-u(t)) loss + u(t); u starts at zero and sees log(sigma / alpha) / 4.

    Args:
        schedule: the process.
        features: cosines of random frequency and phase.
    """

    def __init__(self, schedule: NoiseSchedule, features: int = 128) -> None:
        super().__init__()
        t = schedule.timesteps
        level = (schedule.sigma(t) / schedule.alpha(t)).log() / 4
        generator = torch.Generator().manual_seed(0)  # features are constants, not a choice of runs
        kind = {"generator": generator, "dtype": torch.float32, "device": "cpu"}
        frequency = 2 * torch.pi * torch.randn(features, **kind).double()
        phase = 2 * torch.pi * torch.rand(features, **kind).double()
        table = (level[:, None] * frequency + phase).cos() * 2**0.5
        self.register_buffer("_features", table.float(), persistent=False)
        self.weight = nn.Parameter(torch.zeros(features, dtype=torch.float32))

    def forward(self, cells: Tensor, loss: Tensor) -> Tensor:
        """(B,) int64, (B,) -> ()."""
        # Not a matrix product: autocast would round it to bfloat16.
        log_variance = (self._features[cells] * self.weight).sum(1) / len(self.weight) ** 0.5
        return (loss * torch.exp(-log_variance) + log_variance).mean()

    _features: Tensor
