"""What a person sees while a run trains: one live line in a terminal, plain lines elsewhere."""

import time
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn


class TrainingProgress:
    """A context manager that shows how far a run is.

    Args:
        console: where to write; whether it is a terminal decides the form.
        first_step: steps done before this process.
        total_steps: of the whole run.
    """

    def __init__(self, console: Console, first_step: int, total_steps: int) -> None:
        self._total, self._first = total_steps, first_step
        self._live = console.is_terminal
        self._begun = time.monotonic()
        self._bar = Progress(
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[figures]}"),
            console=console,
            disable=not self._live,
        )
        self._task = self._bar.add_task("", total=total_steps, completed=first_step, figures="")

    def step(self, step: int) -> None:
        """Move on to a step; cheap."""
        if self._live:
            self._bar.update(self._task, completed=step)

    def figures(self, step: int, loss: float, images_per_second: float) -> None:
        """Show the figures of an interval."""
        remaining = (time.monotonic() - self._begun) * (self._total - step)
        remaining /= max(step - self._first, 1)
        text = f"loss {loss:.4f}  {images_per_second:,.0f} images/s  ETA {_clock(remaining)}"
        if self._live:
            self._bar.update(self._task, figures=text)
        else:
            self.say(f"step {step}/{self._total}  {text}")

    def say(self, text: str) -> None:
        """Print a line; it stays above the live one."""
        self._bar.console.print(text, highlight=False, soft_wrap=True)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
