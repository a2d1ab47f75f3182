"""Where the figures and pictures of a run go beside its metrics.jsonl: TensorBoard and services.

A logger sees every record in training, with its step, and every picture of generated images. It
lives in the first process, from the start or resumption of a run to its end.

Both services find their server, project and key in the environment, as they do anywhere:

    wandb    WANDB_API_KEY; WANDB_PROJECT, by default speed_engine; WANDB_MODE=offline
    mlflow   MLFLOW_TRACKING_URI, of a server or of a database file; MLFLOW_EXPERIMENT_NAME, by
             default speed_engine
"""

import importlib
import os
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from speed_engine.runtime.checks import UserError, check_installed
from speed_engine.runtime.files import write_durably

PROJECT = "speed_engine"
_MOST_PARAMETERS = 100  # in one request to MLflow


class Logger(Protocol):
    """What records a run elsewhere; one that raises is closed, and the run goes on without it."""

    def figures(self, step: int, figures: Mapping[str, float | int]) -> None:
        """Record figures of a step, some of which may not be finite."""
        ...

    def picture(self, step: int, path: Path) -> None:
        """Record a picture of generated images, a PNG file."""
        ...

    def close(self) -> None:
        """Send what is not sent yet."""
        ...


class TensorBoard:
    """Curves in RUN/tensorboard.

    Args:
        run: folder.
        resume_step: curves of later steps are dropped.
        config: of the run, by dotted name.
    """

    def __init__(self, run: Path, resume_step: int, config: Mapping[str, Any]) -> None:
        # Imported here: it takes a second that other commands need not spend.
        from torch.utils.tensorboard.writer import SummaryWriter

        self._writer = SummaryWriter(str(run / "tensorboard"), purge_step=resume_step + 1)

    def figures(self, step: int, figures: Mapping[str, float | int]) -> None:
        """One curve for each."""
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def picture(self, step: int, path: Path) -> None:
        """In the tab of images."""
        with Image.open(path) as image:
            self._writer.add_image(
                "samples", np.asarray(image.convert("RGB")), step, dataformats="HWC"
            )

    def close(self) -> None:
        """Flush the file."""
        self._writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases, which a resumed run goes on with; arguments as TensorBoard's."""

    def __init__(self, run: Path, resume_step: int, config: Mapping[str, Any]) -> None:
        wandb = importlib.import_module("wandb")
        self._image = wandb.Image
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=run.name,
            id=_kept(run / "wandb-id", lambda: uuid.uuid4().hex[:12]),
            resume="allow",
            dir=str(run),
            config=dict(config),
        )
        # Its own steps only rise, and those of a run that is resumed go back to its checkpoint.
        self._run.define_metric("*", step_metric="step")

    def figures(self, step: int, figures: Mapping[str, float | int]) -> None:
        """In one row."""
        self._run.log({**figures, "step": step})

    def picture(self, step: int, path: Path) -> None:
        """As a medium of the run."""
        self._run.log({"samples": self._image(str(path)), "step": step})

    def close(self) -> None:
        """Wait until all is sent, or written where it is offline."""
        self._run.finish()


class MLflow:
    """A run of MLflow, which a resumed run goes on with; arguments as TensorBoard's."""

    def __init__(self, run: Path, resume_step: int, config: Mapping[str, Any]) -> None:
        mlflow = importlib.import_module("mlflow")
        self._entities, self._client = mlflow.entities, mlflow.MlflowClient()

        def begun() -> str:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
            known = self._client.get_experiment_by_name(name)
            experiment = (
                self._client.create_experiment(name) if known is None else known.experiment_id
            )
            return self._client.create_run(experiment, run_name=run.name).info.run_id

        is_new = not (run / "mlflow-id").exists()
        self._id = _kept(run / "mlflow-id", begun)
        if not is_new:
            self._client.update_run(self._id, status="RUNNING")
            return
        parameters = [self._entities.Param(name, str(value)) for name, value in config.items()]
        for start in range(0, len(parameters), _MOST_PARAMETERS):
            part = parameters[start : start + _MOST_PARAMETERS]
            self._client.log_batch(self._id, params=part)

    def figures(self, step: int, figures: Mapping[str, float | int]) -> None:
        """In one request."""
        now = time.time_ns() // 1_000_000
        metrics = [self._entities.Metric(name, value, now, step) for name, value in figures.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def picture(self, step: int, path: Path) -> None:
        """As an artifact; its name says the step."""
        self._client.log_artifact(self._id, str(path), "samples")

    def close(self) -> None:
        """Mark the run as finished; a resumed run opens it again."""
        self._client.set_terminated(self._id)


def _kept(path: Path, make: Callable[[], str]) -> str:
    """What a service calls the run, from a file of the run folder, or new."""
    if not path.exists():
        write_durably(path, make().encode())
    return path.read_text()


# name -> how it is opened, and the library that it needs, whose extra has the same name
LOGGERS: dict[str, tuple[Callable[[Path, int, Mapping[str, Any]], Logger], str | None]] = {
    "tensorboard": (TensorBoard, None),
    "wandb": (WeightsAndBiases, "wandb"),
    "mlflow": (MLflow, "mlflow"),
}


def check_loggers(names: Sequence[str]) -> None:
    """Refuse a logger whose library is not installed, before a run begins.

    Raises:
        UserError: it names the extra that has the library.
    """
    for name in names:
        _, library = LOGGERS[name]
        if library is not None:
            check_installed(f"the logger {name}", library, library)


def open_loggers(
    names: Sequence[str], run: Path, config: Mapping[str, Any], resume_step: int
) -> dict[str, Logger]:
    """Loggers by name.

    Args:
        names: keys of ``LOGGERS``.
        run: folder.
        config: of the run, by dotted name.
        resume_step: step that the run goes on from; 0 starts anew.

    Raises:
        UserError: a service refuses to begin, for lack of a key or of a connection.
    """
    opened: dict[str, Logger] = {}
    for name in names:
        try:
            opened[name] = LOGGERS[name][0](run, resume_step, config)
        except Exception as error:  # of many kinds, by service
            for logger in opened.values():
                logger.close()
            raise UserError(
                f"the logger {name} cannot begin: {error}; see that its key and its server are set "
                f"in the environment, or leave it out of --logger."
            ) from error
    return opened
