"""What lies in a run's folder: its configuration, and the checkpoints that it keeps."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from speed_engine.config import TrainConfig, from_json
from speed_engine.runtime.checks import UserError
from speed_engine.training import checkpoint
from speed_engine.training.checkpoint import CHECKPOINTS

_Read = TypeVar("_Read")

CONFIG_FILE = "config.json"


def read_config(run: Path) -> TrainConfig:
    """The resolved configuration of a run.

    Raises:
        UserError: the folder is not a run, or what is wrong with its configuration.
    """
    path = run / CONFIG_FILE
    if not path.is_file():
        raise UserError(f"{run} is not a run folder: it has no {CONFIG_FILE}.")
    try:
        return from_json(path.read_bytes())
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def kept_steps(run: Path) -> list[int]:
    """The steps whose checkpoints a run keeps, in ascending order."""
    return list(checkpoint.by_step(run / CHECKPOINTS))


def newest_checkpoint(run: Path) -> Path:
    """Of a run.

    Raises:
        UserError: there is none.
    """
    try:
        return checkpoint.newest(run / CHECKPOINTS)
    except FileNotFoundError as error:
        raise UserError(str(error)) from error


def of_newest(run: Path, read: Callable[[Path], _Read]) -> _Read:
    """What is read of a run's newest complete checkpoint, while the run may go on training.

    Raises:
        UserError: there is none.
    """
    while True:
        path = newest_checkpoint(run)
        try:
            return read(path)
        except Exception:
            if path.exists():
                raise
            # Deleted while it was read, by a run that is training: it has newer ones.
