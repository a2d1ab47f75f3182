"""What a person sees while work is done: one live line in a terminal, plain lines elsewhere."""

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
        self._bar.console.print(text, highlight=False, markup=False, emoji=False, soft_wrap=True)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()


class SampleProgress:
    """A context manager that shows how many samples of a known number are done.

    Args:
        console: where to write; whether it is a terminal decides the form.
        total: samples.
        interval: seconds between plain lines.
    """

    def __init__(self, console: Console, total: int, interval: float = 30.0) -> None:
        self._total, self._interval = total, interval
        self._begun: float | None = None
        self._at_begin = self._done = 0
        self._said = time.monotonic()
        self._bar = Progress(
            TextColumn("{task.completed:,}/{task.total:,} samples"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[figures]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=total, figures="")

    def advance(self, samples: int) -> None:
        """So many more; the first call says what was there already."""
        now = time.monotonic()
        self._done += samples
        if self._begun is None:
            self._begun, self._at_begin = now, self._done
        rate = (self._done - self._at_begin) / max(now - self._begun, 1e-9)
        remaining = (self._total - self._done) / rate if rate else 0
        text = f"{rate:,.0f}/s  ETA {_clock(remaining)}"
        self._bar.update(self._task, completed=self._done, figures=text)
        if self._bar.disable and now - self._said > self._interval:
            self._said = now
            line = f"{self._done:,}/{self._total:,} samples  {text}"
            self._bar.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
