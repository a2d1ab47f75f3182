"""Figures of a run: averaged on the device, read once per interval, recorded in two forms.

metrics.jsonl    one JSON object per record, for programs; null is a figure that was not finite; a
                 resumed run cuts the file back to its checkpoint
loggers          the same figures as curves, see loggers.py
"""

import errno
import json
import logging
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from speed_engine.runtime import strict
from speed_engine.runtime.checks import MOST, UserError, check, check_between, shortened
from speed_engine.runtime.files import naming, write_durably
from speed_engine.runtime.loggers import Logger

RECORDS = "metrics.jsonl"
NO_LOGGERS: Mapping[str, Logger] = MappingProxyType({})
_NO_NAMES: Mapping[str, str] = MappingProxyType({})
# Of an evaluation, what depends on no step, so that a curve of it is a line.
CONSTANTS = frozenset(
    """
    images num_generated num_reference num_held_out feature_dim solver_steps guidance
    guidance_channels fid_within fid_within_images held_out_fid_within held_out_fid_within_images
    """.split()
)
LAG = 2  # steps between a question to the device and its answer, see stopping.py
_REMEDY = "Put back the file that the run wrote, or delete the line."
_FIGURE = (int, float, type(None)), "a number"  # of a field that is not named here
_TEXT = (str,), "a text"
_KINDS = {
    "step": ((int,), "a whole number"),
    "images": ((int,), "a whole number"),
    "seconds": ((int, float), "a number"),
    "guidance_interval": ((list,), "a list"),
    "evaluated": ((bool,), "true or false"),
    **dict.fromkeys(
        """
        extractor weights_sha256 clip_weights_sha256 vae_weights_sha256 reference_sha256 solver
        average
        """.split(),
        _TEXT,
    ),
}
log = logging.getLogger(__name__)


class IntervalMean:
    """Means of per-step scalars since the last reading; adding never waits for the device."""

    def __init__(self, names: tuple[str, ...], device: torch.device) -> None:
        self._names = names
        self._sum = torch.zeros(len(names), device=device)
        self._count = torch.zeros((), device=device)

    def add(self, values: Tensor, skipped: Tensor) -> None:
        """One value per name, (len(names),); () float32, 1 for a step that does not count."""
        self._sum += torch.where(skipped > 0, 0.0, values)
        self._count += 1 - skipped

    def read(self) -> dict[str, float]:
        """Means by name, NaN if no step counted; waits for the device, starts a new interval."""
        means = (self._sum / self._count).tolist()
        self._sum.zero_()
        self._count.zero_()
        return dict(zip(self._names, means, strict=True))

    def state(self) -> "Sums":
        """What a checkpoint inside an interval must keep."""
        return Sums(tuple(self._sum.tolist()), self._count.item())

    def load_state(self, state: "Sums") -> None:
        """Inverse of ``state``.

        Raises:
            UserError: it is of other scalars.
        """
        need = f"should have {len(self._names)} items, for {', '.join(self._names)}"
        check("means.sum", state.sum, len(state.sum) == len(self._names), need)
        self._sum.copy_(torch.tensor(state.sum))
        self._count.fill_(state.count)


@dataclass(frozen=True)
class Sums:
    """An interval that is not over; JSON holds a float32 exactly."""

    sum: tuple[float, ...]  # one per scalar
    count: float  # of the steps that count

    def __post_init__(self) -> None:
        check_between("means.count", self.count, 0, MOST)


class TrainingClock:
    """Seconds that a run has trained, evaluations left out, over all its resumptions.

    Args:
        before: seconds trained before it was resumed.
    """

    def __init__(self, before: float = 0.0) -> None:
        self._before = before
        self._since: float | None = None

    def start(self) -> None:
        """From now on time counts."""
        self._since = time.perf_counter()

    @property
    def seconds(self) -> float:
        """So far; stands still while paused."""
        return self._before + (0.0 if self._since is None else time.perf_counter() - self._since)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside does not count."""
        self._before, self._since = self.seconds, None
        yield
        self.start()


class SkippedSteps:
    """Counts the steps that were skipped; adding never waits for the device."""

    def __init__(self, device: torch.device) -> None:
        self._counts = torch.zeros(3, device=device)  # all, in a row, most in a row
        self._answers: deque[tuple[Tensor, torch.cuda.Event]] = deque()  # on their way to the host

    def add(self, skipped: Tensor) -> None:
        """() float32, 1 if the step was skipped."""
        total, row, most = self._counts.unbind()
        row = (row + 1) * skipped
        self._counts = torch.stack([total + skipped, row, torch.maximum(most, row)])

    def read(self) -> tuple[int, int]:
        """(steps skipped in the run, most of them in a row); waits for the device."""
        total, _, most = self._counts.int().tolist()
        return total, most

    def may_have(self, most: int, wait: bool) -> bool:
        """Whether so many steps in a row were skipped, as far as the host knows; to call each step.

        On a GPU the answer is a few steps old.

        Args:
            most: steps in a row.
            wait: for the answer of ``LAG`` steps ago, so that all processes hear the same.
        """
        if not self._counts.is_cuda:
            return int(self._counts[2]) >= most
        if len(self._answers) <= LAG:
            answer = torch.empty((), pin_memory=True).copy_(self._counts[2], non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
            self._answers.append((answer, arrived))
        answer, arrived = self._answers[0]
        if wait and len(self._answers) > LAG:
            arrived.synchronize()
        if not (len(self._answers) > LAG if wait else arrived.query()):
            return False
        self._answers.popleft()
        return int(answer) >= most

    def state(self) -> tuple[float, float, float]:
        """What a checkpoint must keep."""
        total, row, most = self._counts.tolist()
        return total, row, most

    def load_state(self, state: tuple[float, float, float]) -> None:
        """Inverse of ``state``, but for the most in a row, which a resumed run may limit anew."""
        total, row, _ = state
        self._counts.copy_(torch.tensor((total, row, row)))


class RunLog:
    """Appends records to a run folder, and shows them to loggers.

    A disk that is full costs records, not the run: that is logged once, and later records are tried
    again. A logger that fails, whose service is gone or whose disk is full, is left out from then
    on.

    Args:
        run: the folder.
        resume_step: records of later steps are dropped; 0 starts anew.
        loggers: by name.
    """

    def __init__(
        self, run: Path, resume_step: int, loggers: Mapping[str, Logger] = NO_LOGGERS
    ) -> None:
        path = run / RECORDS
        kept = [line for line, record in _records(path) if record["step"] <= resume_step]
        write_durably(path, "".join(kept).encode())
        self._file = path.open("ab", buffering=0)
        self._loggers = dict(loggers)
        self.lost = 0

    def write(
        self, step: int, figures: Mapping[str, Any], curves: Mapping[str, str] = _NO_NAMES
    ) -> None:
        """Record figures at a step.

        Args:
            step: optimizer steps done.
            figures: by their names in metrics.jsonl.
            curves: the names that loggers show some of them by.
        """
        self._append(as_json({"step": step, **figures}).encode() + b"\n", step)
        numbers = {
            curves.get(name, name): of
            for name, of in figures.items()
            if isinstance(of, int | float) and name not in CONSTANTS
        }
        self._tell(f"at step {step}", lambda logger: logger.figures(step, numbers))

    def picture(self, step: int, path: Path) -> None:
        """Show loggers a picture of generated images, a PNG file."""
        self._tell(f"at step {step}", lambda logger: logger.picture(step, path))

    def _append(self, line: bytes, step: int) -> None:
        end = self._file.seek(0, os.SEEK_END)
        try:
            if self._file.write(line) == len(line):
                return
            error: str | OSError = "the disk is full"
        except OSError as caught:
            error = caught
        self._file.truncate(end)  # half a record would spoil the next one
        if self.lost == 0:
            log.error("records from step %d on could not be written: %s", step, error)
        self.lost += 1

    def _tell(self, when: str, tell: Callable[[Logger], None]) -> None:
        for name, logger in list(self._loggers.items()):
            try:
                tell(logger)
            except Exception as error:  # of many kinds, by service: none is worth the run
                log.error("what the logger %s shows ends %s: %s", name, when, error)
                del self._loggers[name]

    def close(self) -> None:
        """Flush the file and the loggers."""
        self._file.close()
        self._tell("before the last step", lambda logger: logger.close())


def read_records(run: Path) -> list[dict[str, Any]]:
    """Those of metrics.jsonl, oldest first, figures that are not finite as None.

    Half a line that a kill left is no record. NaN and Infinity, which older versions wrote and JSON
    does not have, are None, too.

    Raises:
        UserError: a line is no record; names it and the field.
    """
    return [record for _, record in _records(run / RECORDS)]


def as_json(record: Mapping[str, Any]) -> str:
    """One line of JSON; a figure that is not finite is null, for JSON has no NaN."""
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in record.items()
    }
    return json.dumps(finite, allow_nan=False)


def append_record(run: Path, record: Mapping[str, Any]) -> None:
    """Add one to metrics.jsonl, after half a line, if a kill left one, is gone.

    Raises:
        OSError: the disk is full, for example; no part of the record is left behind.
    """
    line, path = as_json(record).encode() + b"\n", run / RECORDS
    with naming(path), path.open("a+b", buffering=0) as file:
        file.seek(0)
        known = file.readall()
        complete = known.rfind(b"\n") + 1
        if complete < len(known):
            file.truncate(complete)
        if file.write(line) < len(line):
            file.truncate(complete)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The complete lines and what they say; a killed run can leave half of one."""
    if not path.exists():
        return
    try:
        lines = path.read_text().splitlines(keepends=True)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no text ({error}); {_REMEDY}") from error
    for number, line in enumerate(lines, start=1):
        if line.endswith("\n"):
            try:
                yield line, _checked(strict.parse(line, _finite_or_none))
            except UserError as error:
                raise UserError(f"{path}, line {number}: {error} {_REMEDY}") from error


def _checked(record: Any) -> dict[str, Any]:
    """A record whose fields are of their kinds."""
    if not isinstance(record, dict):
        raise UserError(f"it is {shortened(record)}: should be an object.")
    in_training = "extractor" in record and "evaluated" not in record
    needed = {"step", "images", "seconds"} if in_training else {"step"}
    if missing := needed - record.keys():
        raise UserError(f"it has no field {min(missing)!r}.")
    for name, value in record.items():
        kind, need = _KINDS.get(name, _FIGURE)
        if type(value) not in kind:
            raise UserError(f"{shortened(name)}={shortened(value)}: should be {need}.")
        if type(value) is int:
            check_between(shortened(name), value, -(2**62), 2**62)
    check_between("step", record["step"], 0, MOST)
    return record


def _finite_or_none(text: str) -> float | None:
    return value if math.isfinite(value := float(text)) else None
