"""Stopping on request: Ctrl-C, or SIGTERM or SIGUSR1, as a cluster sends before it takes a machine.

Every process of the run stops after the same step, whichever of them was asked and when. What is
long and can be done again, such as an evaluation, is given up at once.
"""

import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, Self

import torch
from torch import Tensor, nn

from speed_engine.runtime.world import World

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
# Steps between asking the others and reading their answer: it has long arrived by then, so that the
# host need not wait for the device, and the host cannot run further ahead of it than this.
LAG = 2


class Stopped(BaseException):
    """What was under way is given up; as of KeyboardInterrupt, no error handler catches it."""


class StopRequest:
    """A context manager that turns the signals into a question to ask once per step.

    The first signal is answered with a line at once; a second Ctrl-C is a KeyboardInterrupt.

    Args:
        world: the processes of the run; each has one of these.
        device: of the run.
    """

    def __init__(self, world: World, device: torch.device) -> None:
        self.signal: signal.Signals | None = None
        self._world, self._device = world, device
        self._answers: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()
        self._handlers: dict[signal.Signals, object] = {}
        self._interrupts = False

    def agreed(self) -> bool:
        """Whether to stop now; every process calls it equally often and hears the same."""
        if self._world.size == 1:
            return self.signal is not None
        self._answers.append(self._ask())
        if len(self._answers) <= LAG:
            return False
        answer, arrived = self._answers.popleft()
        if arrived is not None:
            arrived.synchronize()
        return bool(answer)

    def agreed_at_once(self) -> bool:
        """The same without delay; it waits for the slowest process."""
        if self._world.size == 1:
            return self.signal is not None
        answer, arrived = self._ask()
        if arrived is not None:
            arrived.synchronize()
        return bool(answer)

    @contextmanager
    def interrupting(self, here: bool) -> Iterator[None]:
        """Raise ``Stopped`` as soon as this process is asked to stop.

        Args:
            here: whether to; what other processes take part in cannot be given up by one.
        """
        if here and self.signal is not None:
            raise Stopped
        self._interrupts = here
        try:
            yield
        finally:
            self._interrupts = False

    def watched(self, model: nn.Module) -> nn.Module:
        """A model that all processes call together: all raise ``Stopped`` at the same call."""
        return _Watched(model, self)

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
        if self.signal is signal.SIGINT and number == signal.SIGINT:
            raise KeyboardInterrupt
        says = self.signal is None and self._world.is_first
        self.signal = signal.Signals(number)
        if says:
            again = "; Ctrl-C again stops at once" if number == signal.SIGINT else ""
            text = f"\n{self.signal.name}: saving a checkpoint{again}\n"
            with suppress(Exception):  # whoever read it may be gone, and the checkpoint must be
                os.write(sys.stderr.fileno(), text.encode())
        if self._interrupts:
            raise Stopped

    def __enter__(self) -> Self:
        self._handlers = {}
        if threading.current_thread() is not threading.main_thread():
            return self  # Python gives signals to the main thread only
        # A shell starts what it runs in the background with SIGINT ignored; so it stays.
        heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        self._handlers = {number: signal.signal(number, self._remember) for number in heard}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]


class _Watched(nn.Module):
    def __init__(self, model: nn.Module, stop: StopRequest) -> None:
        super().__init__()
        self.model, self.stop = model, stop

    def forward(self, *arguments: Any, **conditions: Any) -> Any:
        if self.stop.agreed():
            raise Stopped
        return self.model(*arguments, **conditions)
