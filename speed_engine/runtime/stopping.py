"""Stopping on request: SIGTERM or SIGUSR1, as a cluster sends before it takes the machine away.

Every process of the run stops after the same step, whichever of them was asked and when.
"""

import signal
from collections import deque
from types import FrameType
from typing import Self

import torch
from torch import Tensor

from speed_engine.runtime.world import World

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
# Steps between asking the others and reading their answer: it has long arrived by then, so that the
# host need not wait for the device, and the host cannot run further ahead of it than this.
LAG = 2


class StopRequest:
    """A context manager that turns the signals into a question to ask once per step.

    Args:
        world: the processes of the run; each has one of these.
        device: of the run.
    """

    def __init__(self, world: World, device: torch.device) -> None:
        self.signal: signal.Signals | None = None
        self._world, self._device = world, device
        self._answers: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()
        self._handlers: dict[signal.Signals, object] = {}

    def agreed(self) -> bool:
        """Whether to stop now; every process calls it after every step and hears the same."""
        if self._world.size == 1:
            return self.signal is not None
        self._answers.append(self._ask())
        if len(self._answers) <= LAG:
            return False
        answer, arrived = self._answers.popleft()
        if arrived is not None:
            arrived.synchronize()
        return bool(answer)

    def _ask(self) -> tuple[Tensor, torch.cuda.Event | None]:
        """The largest flag of all processes, on its way to the host."""
        flag = torch.full((), float(self.signal is not None), device=self._device)
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
        if flag.device.type != "cuda":
            return flag, None
        answer = torch.empty((), pin_memory=True).copy_(flag, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        return answer, arrived

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number)

    def __enter__(self) -> Self:
        self._handlers = {number: signal.signal(number, self._remember) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]
