"""What a person sees of work: one live line in terminals and notebooks, plain lines elsewhere."""

import importlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

log = logging.getLogger(__name__)
SILENCE = 2.0  # seconds after which a person wonders what is done
INTERVAL = 30.0  # seconds between plain lines
NOTEBOOK_INTERVAL = 1.0  # between changes of a notebook's line, each of which is a message


@contextmanager
def announced(text: str) -> Iterator[None]:
    """Say what is done inside, if it takes longer than ``SILENCE``; logged at the level INFO."""
    timer = threading.Timer(SILENCE, log.info, ("%s", text))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextmanager
def announcing(console: Console) -> Iterator[None]:
    """Print what ``announced`` says inside, where the log is not shown, as in a notebook.

    Args:
        console: what the first of several processes prints to.
    """
    if log.isEnabledFor(logging.INFO) or os.environ.get("RANK", "0") != "0":
        yield
        return
    handler, level = _Lines(console), log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False  # the handlers of others would show it again
    try:
        yield
    finally:
        log.propagate = True
        log.setLevel(level)
        log.removeHandler(handler)


class _Lines(logging.Handler):
    """Prints each message as a line."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        text = f"{record.getMessage()} ..."
        self._console.print(text, highlight=False, markup=False, emoji=False, soft_wrap=True)


class _NotebookLine:
    """A line of a notebook's output that takes the place of the one before it.

    rich's own live line would need the library ipywidgets.
    """

    def __init__(self) -> None:
        self._shown: Any = None

    def show(self, text: str) -> None:
        content = {"text/plain": text}
        if self._shown is None:
            display: Any = importlib.import_module("IPython.display").display
            self._shown = display(content, raw=True, display_id=True)
        else:
            self._shown.update(content, raw=True)


class TrainingProgress:
    """A context manager that shows how far a run is.

    Args:
        console: where to write; whether it is a terminal decides the form.
        first_step: steps done before this process.
        total_steps: of the whole run.
    """

    def __init__(self, console: Console, first_step: int, total_steps: int) -> None:
        self._first, self._total = first_step, total_steps
        self._silent_since: float | None = None  # until the first figures
        self._live = console.is_terminal
        self._line = _NotebookLine() if console.is_jupyter else None
        self._newest, self._shown_at = "", time.monotonic()  # of a notebook's line
        self._bar = Progress(
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[figures]}"),
            console=console,
            disable=not self._live,
        )
        self._task = self._bar.add_task("", total=total_steps, completed=first_step, figures="")

    def step(self, step: int) -> None:
        """Move on to a step; cheap. In plain lines, says once how slow slow steps are."""
        if self._live:
            self._bar.update(self._task, completed=step)
        elif self._line is not None:
            if time.monotonic() - self._shown_at >= NOTEBOOK_INTERVAL:
                self._show(f"step {step}/{self._total}  {self._newest}".rstrip())
        elif self._silent_since is not None:
            passed = time.monotonic() - self._silent_since
            if passed > INTERVAL:
                self._silent_since = None
                each = passed / (step - self._first)
                remaining = _clock(each * (self._total - step))
                self._show(f"step {step}/{self._total}  {each:.1f} s a step  ETA {remaining}")

    def figures(self, step: int, loss: float, rate: float, step_seconds: float) -> None:
        """Show the figures of an interval.

        Args:
            step: that it ends with.
            loss: its mean.
            rate: images per second in it.
            step_seconds: of one of its steps, from which the remaining time follows; evaluations
                that are to come are not in it.
        """
        self._silent_since = None
        remaining = step_seconds * (self._total - step)
        text = f"loss {loss:.4f}  {_rate(rate)} images/s  ETA {_clock(remaining)}"
        if self._live:
            self._bar.update(self._task, figures=text)
        else:
            self._newest = text
            self._show(f"step {step}/{self._total}  {text}")

    def evaluating(self, step: int, images: int) -> Callable[[float], None]:
        """What to call with the number of images, or parts of one, that were generated since.

        Args:
            step: that is evaluated.
            images: that this process generates.
        """
        interval = INTERVAL if self._line is None else NOTEBOOK_INTERVAL
        done, said = 0.0, time.monotonic() - interval + min(interval, SILENCE)

        def advance(more: float) -> None:
            nonlocal done, said
            done, now = done + more, time.monotonic()
            text = f"evaluating: {min(done, images):,.0f}/{images:,} images"
            if self._live:
                self._bar.update(self._task, figures=text)
            elif now - said > interval:
                said = now
                self._show(f"step {step}/{self._total}  {text}")

        return advance

    def say(self, text: str) -> None:
        """Print a line; it stays above the live one."""
        self._bar.console.print(text, highlight=False, markup=False, emoji=False, soft_wrap=True)

    def _show(self, text: str) -> None:
        """How far the run is, where rich shows no live line."""
        if self._line is None:
            self.say(text)
        else:
            self._shown_at = time.monotonic()
            self._line.show(text)

    def __enter__(self) -> Self:
        self._silent_since = time.monotonic()
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

    def __init__(self, console: Console, total: int, interval: float = INTERVAL) -> None:
        self._total, self._interval = total, interval
        self._line = _NotebookLine() if console.is_jupyter else None
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
        text = ""
        if rate:
            text = f"{_rate(rate)}/s  ETA {_clock((self._total - self._done) / rate)}"
        self._bar.update(self._task, completed=self._done, figures=text)
        line = f"{self._done:,}/{self._total:,} samples  {text}".rstrip()
        if self._line is not None:
            self._line.show(line)
        elif self._bar.disable and now - self._said > self._interval:
            self._said = now
            self._bar.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()


def _rate(per_second: float) -> str:
    """Two digits of a slow one, whole numbers of others."""
    return f"{per_second:,.0f}" if per_second >= 10 else f"{per_second:.2g}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
