"""Figures of a run: averaged on the device, read once per interval, recorded in two forms.

metrics.jsonl    one object per record, for programs; a resumed run cuts it back to its checkpoint
tensorboard/     the same figures as curves
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class IntervalMean:
    """Means of per-step scalars since the last reading; adding never waits for the device."""

    def __init__(self, names: tuple[str, ...], device: torch.device) -> None:
        self._names = names
        self._sum = torch.zeros(len(names), device=device)
        self._count = 0

    def add(self, values: tuple[Tensor, ...]) -> None:
        """One () tensor per name."""
        self._sum += torch.stack(values)
        self._count += 1

    def read(self) -> dict[str, float]:
        """Means by name; waits for the device and starts a new interval."""
        means = (self._sum / self._count).tolist()
        self._sum.zero_()
        self._count = 0
        return dict(zip(self._names, means, strict=True))

    def state(self) -> dict[str, Any]:
        """What a checkpoint inside an interval must keep; JSON holds a float32 exactly."""
        return {"sum": self._sum.tolist(), "count": self._count}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Inverse of ``state``."""
        self._sum.copy_(torch.tensor(state["sum"]))
        self._count = state["count"]


class RunLog:
    """Appends records to a run folder.

    Args:
        run: the folder.
        resume_step: records of later steps are dropped; 0 starts anew.
    """

    def __init__(self, run: Path, resume_step: int) -> None:
        # Imported here: it takes a second that other commands need not spend.
        from torch.utils.tensorboard.writer import SummaryWriter

        path = run / "metrics.jsonl"
        kept = [line for line in _lines(path) if json.loads(line)["step"] <= resume_step]
        path.write_text("".join(kept))
        self._file = path.open("a", buffering=1)
        self._curves = SummaryWriter(str(run / "tensorboard"), purge_step=resume_step + 1)

    def write(self, step: int, figures: Mapping[str, float | int | str]) -> None:
        """Record figures at a step."""
        self._file.write(json.dumps({"step": step, **figures}) + "\n")
        for name, value in figures.items():
            if not isinstance(value, str):
                self._curves.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush both files."""
        self._file.close()
        self._curves.close()


def _lines(path: Path) -> list[str]:
    """Complete lines; a killed run can leave half of one."""
    if not path.exists():
        return []
    return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
