"""The work of a training step as facebookresearch/DiT first did it, in bfloat16.

Written anew from the paper and the behaviour of its public code, which it does not copy. Kept are
the costs: timesteps drawn on the host; every coefficient a NumPy array that is copied to the device
when it is needed, which waits for it; separate operations for noise, loss and bound; an
optimizer and an average that go from tensor to tensor; the loss read after every step. Attention is
the model's own.

Letters: B images, C channels, H x W pixels, T timesteps.
"""

import copy
import math

import numpy as np
import torch
from torch import Tensor, nn

from speed_engine.config import TrainConfig
from speed_engine.data.batch import Batch

LABEL_DROPOUT = 0.1


class OriginalStep:
    """Call it with a batch: one optimizer step.

    Args:
        model: answers (B, C or 2C, H, W); trained in place.
        config: its timesteps, learning rate and decay of the average.
    """

    def __init__(self, model: nn.Module, config: TrainConfig) -> None:
        self.model, self.config = model, config
        self.average = copy.deepcopy(model).requires_grad_(False)
        rate = config.optimizer.learning_rate
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0)
        self.weights = np.ones(config.num_timesteps)  # of a sampler of timesteps; uniform
        self.generator = np.random.default_rng(0)
        beta = np.linspace(1e-4, 0.02, config.num_timesteps)
        abar = np.cumprod(1 - beta)
        before = np.append(1.0, abar[:-1])
        posterior = beta * (1 - before) / (1 - abar)
        self.rows = {
            "signal": np.sqrt(abar),
            "noise": np.sqrt(1 - abar),
            "inverse": np.sqrt(1 / abar),
            "noise_ratio": np.sqrt(1 / abar - 1),
            "x0_share": beta * np.sqrt(before) / (1 - abar),
            "x_share": (1 - before) * np.sqrt(1 - beta) / (1 - abar),
            "least": np.log(np.append(posterior[1], posterior[1:])),
            "most": np.log(beta),
        }
        self.running_loss = 0.0

    def __call__(self, batch: Batch) -> None:
        x0, labels = batch.images, batch.conditions["labels"]
        t = self._timesteps(len(x0), x0.device)
        blank = torch.rand(len(x0), device=x0.device) < LABEL_DROPOUT
        labels = torch.where(blank, self.config.data.num_classes, labels)
        noise = torch.randn_like(x0)
        x = self._row("signal", t) * x0 + self._row("noise", t) * noise
        with torch.autocast(x0.device.type, torch.bfloat16):
            answer = self.model(x, t, labels=labels)
        loss = self._loss(answer.float(), x0, x, noise, t).mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self._follow()
        self.running_loss += loss.item()

    def _timesteps(self, size: int, device: torch.device) -> Tensor:
        """(B,) drawn from the weights on the host."""
        drawn = self.generator.choice(
            len(self.weights), size=size, p=self.weights / self.weights.sum()
        )
        return torch.from_numpy(drawn).long().to(device)

    def _row(self, name: str, t: Tensor) -> Tensor:
        """(B, 1, 1, 1) of a coefficient, its whole array copied to the device."""
        return torch.from_numpy(self.rows[name]).to(t.device)[t].float()[:, None, None, None]

    def _loss(self, answer: Tensor, x0: Tensor, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """(B,) squared error, and the bound where the variance is learned."""
        if answer.shape[1] == x0.shape[1]:
            return (noise - answer).square().mean((1, 2, 3))
        epsilon, share = answer.chunk(2, dim=1)
        bound = self._bound(epsilon.detach(), share, x0, x, t)
        return (noise - epsilon).square().mean((1, 2, 3)) + bound * len(self.weights) / 1000

    def _bound(self, epsilon: Tensor, share: Tensor, x0: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """(B,) in bits per element: divergence of the reverse step, at t = 0 the likelihood."""
        true_mean = self._row("x0_share", t) * x0 + self._row("x_share", t) * x
        true_log = self._row("least", t)
        share = (share + 1) / 2
        log = share * self._row("most", t) + (1 - share) * self._row("least", t)
        guess = self._row("inverse", t) * x - self._row("noise_ratio", t) * epsilon
        mean = self._row("x0_share", t) * guess + self._row("x_share", t) * x
        apart = (true_mean - mean).square() * torch.exp(-log)
        divergence = 0.5 * (-1 + log - true_log + torch.exp(true_log - log) + apart)
        both = torch.where(
            (t == 0)[:, None, None, None], -_log_likelihood(x0, mean, 0.5 * log), divergence
        )
        return both.mean((1, 2, 3)) / math.log(2)

    @torch.no_grad()
    def _follow(self) -> None:
        """Every tensor of the average by itself."""
        decay = self.config.optimizer.ema_decay
        current = dict(self.model.named_parameters())
        for name, average in self.average.named_parameters():
            average.mul_(decay).add_(current[name], alpha=1 - decay)


def _log_likelihood(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """(B, C, H, W) of values in steps of 2 / 255 under a Gaussian, by its cumulative function."""
    inverse, half = torch.exp(-log_std), 1 / 255
    above, below = (_normal_cdf(inverse * (x - mean + side)) for side in (half, -half))
    inside = (above - below).clamp(min=1e-12).log()
    low, high = above.clamp(min=1e-12).log(), (1 - below).clamp(min=1e-12).log()
    return torch.where(x < -0.999, low, torch.where(x > 0.999, high, inside))


def _normal_cdf(x: Tensor) -> Tensor:
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x.pow(3))))
