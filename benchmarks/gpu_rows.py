"""Rows of measurements that end in time and are kept one by one."""

import json
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from harness import facts_of_run

GRACE = 10  # seconds in which an interrupted row ends


class OutOfTime(BaseException):
    """No Exception: a row that goes on after one of its own must not go on after this."""


class Rows:
    """A result file that is rewritten after every row, so that a kill loses one row at most.

    Args:
        path: of the JSON file.
        seconds: from now on; a row that would not end in them is left out, one that takes longer
            than was thought is interrupted, and where that has no effect the process ends.
    """

    def __init__(self, path: Path, seconds: float) -> None:
        self.path, self.begin, self.seconds = path, time.monotonic(), seconds
        self.figures: dict[str, Any] = {"environment": facts_of_run(), "rows": {}}
        path.parent.mkdir(parents=True, exist_ok=True)

    def left(self) -> float:
        """Seconds."""
        return self.begin + self.seconds - time.monotonic()

    def row(self, name: str, needs: float, measure: Callable[[], dict[str, Any]]) -> None:
        """Measure, print and keep; an error is a row, too, since the others go on.

        Args:
            name: of the row.
            needs: seconds that it may take.
            measure: returns what JSON can hold.
        """
        start = time.monotonic()
        if self.left() < needs:
            why = f"needs {needs:.0f} s, {self.left():.0f} s left"
            self._keep(name, {"left_out": why}, start)
            return
        signal.signal(signal.SIGALRM, _late)
        # Python hears no signal while autograd's thread compiles the gradient's graph.
        last = threading.Timer(self.left() + GRACE, self._end, [name, start])
        last.daemon = True
        last.start()
        try:
            signal.setitimer(signal.ITIMER_REAL, self.left())
            found = measure()
        except (Exception, OutOfTime) as error:  # whatever a first contact brings
            traceback.print_exc()
            found = _failed(error)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            last.cancel()
        self._keep(name, found, start)

    def _keep(self, name: str, found: dict[str, Any], start: float) -> None:
        found["seconds"] = round(time.monotonic() - start, 1)
        self.figures["rows"][name] = found
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.figures, indent=1) + "\n")
        partial.replace(self.path)
        print(
            f"[{self.seconds - self.left():5.0f} s] {name}: {json.dumps(found)[:900]}", flush=True
        )

    def _end(self, name: str, start: float) -> None:
        self._keep(name, _failed(OutOfTime("it heard no interrupt")), start)
        os._exit(1)


def _failed(error: BaseException) -> dict[str, Any]:
    return {"failed": f"{type(error).__name__}: {str(error)[:500]}"}


def _late(signum: int, frame: FrameType | None) -> NoReturn:
    raise OutOfTime("the seconds of the section are over")
