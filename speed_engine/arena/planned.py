"""A run that a comparison plans, and how far its folder says that it came."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from speed_engine.config import TrainConfig
from speed_engine.training.checkpoint import EMA_FILE

FINAL_FILE = "final.json"  # what is measured of a trained run, see final.py


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run that is to be complete."""

    config: TrainConfig
    folder: Path
    finish: Callable[[Path], object] | None = None  # what else is done with the trained run
    outcome: str = EMA_FILE  # file in the folder that is written last


def is_complete(run: Run) -> bool:
    """Whether nothing is left to do for it."""
    return (run.folder / run.outcome).exists()


def failure(run: Run) -> str:
    """Why a run is not complete: the last line that it printed."""
    path = log_file(run)
    lines = path.read_text(errors="replace").split("\n") if path.exists() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "it has not begun")


def log_file(run: Run) -> Path:
    """What the run prints, beside its folder."""
    return run.folder.with_name(f"{run.folder.name}.log")
