"""A method fitted to one process and one target, as a training loop uses it.

Letters: B images, T timesteps.
"""

import logging
import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, SupportsIndex

import torch
import torch.distributed as dist
from torch import Tensor, nn

from speed_engine.diffusion.distributions import Distribution
from speed_engine.diffusion.draws import Draws
from speed_engine.diffusion.schedule import NoiseSchedule
from speed_engine.diffusion.table import TimestepTable
from speed_engine.diffusion.timesteps import TimestepSampler
from speed_engine.diffusion.uncertainty import MeanLoss
from speed_engine.runtime.checks import UserError, shortened

log = logging.getLogger(__name__)


@dataclass
class _Loop:
    """What a method keeps of the loop that draws from it.

    Attributes:
        draws: the image counters.
        step: of the last draw.
        t: (B,) of the last draw, as the process counts them.
        seen: of a distribution that watches the loss, timesteps and weighted errors of that step,
            of all processes: it is shown a step at a time, however many draws that had.
        start: of a method that learns, what its state was; None once that it learns was seen, or
            the warning that it does not was given.
    """

    draws: Draws = field(default_factory=Draws)
    step: int | None = None
    t: Tensor | None = None
    seen: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    start: dict[str, Tensor] | None = None


@dataclass(frozen=True, eq=False)
class Method:
    """A definition for one process and one target.

    Attributes:
        name: a key of ``METHODS``.
        schedule: the process.
        prediction: the target, a key of ``PREDICTIONS``.
        timesteps: the sampler; its module state is the method's.
        weight: (T,) float64 weight of the target's MSE.
        table: the same with the linear form of process and target, for any timestep.
        weigh_bound: whether the weight multiplies the bound of a learned variance, too.
        batch_loss: from per-image losses to one; its parameters are learned.
        momentum_decay: the optimizer's part.
        seed: () int64, root of ``draw``.
        loop: what ``draw`` keeps from call to call.
    """

    name: str
    schedule: NoiseSchedule
    prediction: str
    timesteps: TimestepSampler
    weight: Tensor
    table: TimestepTable
    weigh_bound: bool
    batch_loss: MeanLoss
    momentum_decay: str
    seed: Tensor
    loop: _Loop = field(default_factory=_Loop)

    @property
    def probabilities(self) -> Tensor:
        """(T,) float64 P at the first step."""
        return self.timesteps.probabilities(0)

    @property
    def is_fixed(self) -> bool:
        """Whether P and weights stay what they are at the first step."""
        return (
            type(self.timesteps.distribution) is Distribution and type(self.batch_loss) is MeanLoss
        )

    def draw(
        self,
        batch: SupportsIndex | Tensor,
        step: SupportsIndex,
        device: torch.device | str | None = None,
        *,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Timesteps and weights of a batch, for any training loop.

        Every call draws other images: the next ones of this process, in a step with several draws
        (gradient accumulation), after a short batch, and on every process of torch.distributed.

        Args:
            batch: B, the number of images of this process; or (B,) int64 image counters, unique in
                the run, of which the results are then a function, with the step and what was
                learned, whatever was drawn before.
            step: optimizer steps done so far.
            device: of the results; by default that of the counters, or the CPU.
            rank: of this process among all that train together; by default torch.distributed's,
                or the only one.
            world_size: how many processes those are, likewise.

        Returns:
            (B,) timesteps as the model and a diffusers scheduler take them, and (B,) float32
            weights of the per-image MSE of ``prediction``. Timesteps are int64 indices, but for
            processes given by their sigmas, which have the type of the scheduler's own (float32),
            and those in continuous time (float64). Methods that learn from the loss need ``loss``
            besides, and warn once where nothing comes back.

        Raises:
            UserError: an impossible batch, step, rank or number of processes.
        """
        step = _whole("step", step, 0, "the number of optimizer steps done so far")
        if not isinstance(batch, Tensor):
            batch = _whole("batch", batch, 1, "the number of images of this process")
            ids = self.loop.draws.take(batch, step, rank, world_size)
        elif batch.ndim == 1 and batch.dtype == torch.int64:
            ids = batch
        else:
            raise UserError(
                f"image counters have shape {tuple(batch.shape)} and type {batch.dtype}; one "
                "dimension of int64 is needed, or the batch size as an int."
            )
        if step != self.loop.step:
            self._learn()
            self._expect_feedback()
        ids = ids if device is None else ids.to(_device(device))
        for module in (self.timesteps, self.table):
            module.to(ids.device)
        t = self.timesteps.sample(self.seed.to(ids.device), ids, step)
        weights = self.table(t)[:, 4] * self.timesteps.importance(t)
        self.loop.step, self.loop.t = step, t
        return self.schedule.model_time(t), weights

    def loss(self, error: Tensor) -> Tensor:
        """The loss of the images drawn last, from which the method learns if it does.

        Call it once after each draw, on every process of torch.distributed. Without anything
        learned it is (weights * error).mean(). Give ``parameters()`` to the optimizer.

        Args:
            error: (B,) MSE of each image, unweighted, on the model's target.

        Returns:
            () float32.

        Raises:
            UserError: the errors are not those of the images that were drawn last.
        """
        t = self.loop.t
        if t is None or not isinstance(error, Tensor) or error.shape != t.shape:
            found = tuple(error.shape) if isinstance(error, Tensor) else shortened(error)
            raise UserError(
                f"losses of shape {found} for "
                f"{'no draw' if t is None else f'a draw of {len(t)} images'}; one mean squared "
                "error is needed for each image of the last draw."
            )
        weighted = self.table(t)[:, 4].to(error.device) * error.float()
        importance = self.timesteps.importance(t)
        if self.timesteps.distribution.learns:
            self.loop.seen.append(_of_all_processes(t, weighted.detach().to(t.device)))
        if isinstance(importance, Tensor):
            importance = importance.to(error.device)
        cells = self.schedule.cell(t).to(error.device)
        return self.batch_loss.to(error.device)(cells, weighted * importance)

    def parameters(self) -> list[nn.Parameter]:
        """The weights that are learned, for an optimizer group without weight decay.

        ``batch_loss.learning_rate`` is their learning rate, where it is not the model's. They lie
        on the CPU until the first loss: ``batch_loss.to(device)`` moves them before an optimizer is
        made or resumed. Where there are several processes, average their gradients in the loop.
        """
        return list(self.batch_loss.parameters())

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run of this method needs, for ``torch.save``; take it between steps."""
        self._learn()
        return {
            "method": self.name,
            "images": self.loop.draws.images,
            "first": self.loop.draws.first,
            "timesteps": self.timesteps.state_dict(),
            "batch_loss": self.batch_loss.state_dict(),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on where ``state_dict`` was taken: the draws are those of a run without a break.

        Raises:
            UserError: it is the state of another method.
        """
        own = self.state_dict()
        known = isinstance(state_dict, Mapping) and state_dict.keys() == own.keys()
        if not known or state_dict["method"] != self.name:
            other = state_dict.get("method") if isinstance(state_dict, Mapping) else None
            raise UserError(
                f"the state is of {shortened(other or 'something else')}, "
                f"the method is {self.name}; build the method as the run did."
            )
        for part in ("timesteps", "batch_loss"):
            if _shapes(state_dict[part]) != _shapes(own[part]):
                raise UserError(
                    f"the state's {part} is of {self.name} with other options or another process, "
                    "or damaged; build the method as the run did."
                )
        images = _whole("images", state_dict["images"], 0, "the number of images drawn so far")
        first = state_dict["first"]
        if first is not None:
            first = _whole("first", first, 0, "the first image counter", 2**63 - 1)
        self.loop.draws = Draws(images, first)
        self.timesteps.load_state_dict(state_dict["timesteps"])
        self.batch_loss.load_state_dict(state_dict["batch_loss"])

    def _learn(self) -> None:
        """Show the distribution what the step cost."""
        if self.loop.seen and self.loop.step is not None:
            t, loss = (torch.cat(parts) for parts in zip(*self.loop.seen, strict=True))
            self.timesteps.observe(self.loop.step, t, loss)
            self.loop.seen.clear()

    def _learned(self) -> dict[str, Tensor]:
        """State that changes only as the method learns."""
        return {**self.timesteps.state_dict(), **self.batch_loss.state_dict()}

    def _expect_feedback(self) -> None:
        """Note the state before the first draw; warn if a step has not changed it."""
        loop = self.loop
        if loop.step is None:
            loop.start = {name: of.detach().cpu().clone() for name, of in self._learned().items()}
            return
        if not loop.start:
            return
        now, before = self._learned().items(), loop.start
        learns = any(parameter.grad is not None for parameter in self.parameters()) or any(
            not torch.equal(of.cpu(), before[name]) for name, of in now
        )
        loop.start = None
        if not learns:
            log.warning(
                "method %r learns from the losses, and has been shown none: it stays as it began. "
                "Compute the loss by method.loss(mse) and give method.parameters() to the "
                "optimizer.", self.name,
            )  # fmt: skip


def _whole(name: str, value: object, least: int, meaning: str, most: int = 2**31 - 1) -> int:
    """A whole number of Python, NumPy or a tensor.

    Raises:
        UserError: it is none, below ``least`` or above ``most``.
    """
    try:
        number = operator.index(value) if isinstance(value, SupportsIndex) else least - 1
    except TypeError:  # of a tensor that holds something else
        number = least - 1
    if number < least or isinstance(value, bool):
        raise UserError(f"{name}={shortened(value)}: must be {meaning}, at least {least}.")
    if number > most:
        raise UserError(f"{name}={shortened(value)}: must be {meaning}, at most {most}.")
    return number


def _device(device: object) -> torch.device:
    """A device by its name.

    Raises:
        UserError: it is none.
    """
    try:
        return torch.device(device)  # pyright: ignore[reportArgumentType, reportCallIssue]
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"device={shortened(device)}: must be a device of torch, such as cuda or cuda:1."
        ) from error


def _shapes(state: object) -> dict[str, object] | None:
    """Of a module's state, by name; None of what is none."""
    if not isinstance(state, Mapping):
        return None
    return {name: getattr(of, "shape", None) for name, of in state.items()}


def _of_all_processes(t: Tensor, loss: Tensor) -> tuple[Tensor, Tensor]:
    """(B,) each -> (all B,) each, in the order of ranks: all processes then decide alike."""
    if not (dist.is_available() and dist.is_initialized()):
        return t, loss
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, (t.cpu(), loss.cpu()))  # batches may differ in size
    ts, losses = zip(*gathered, strict=True)
    return torch.cat(ts).to(t.device), torch.cat(losses).to(loss.device)
