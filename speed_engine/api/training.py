"""Training from Python: the runs of ``speed-engine train``."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from speed_engine.api.loading import Device, of_run
from speed_engine.api.model import Model
from speed_engine.arena.recipes import RecipeName
from speed_engine.commands.config_file import origin
from speed_engine.commands.evaluate import evaluate
from speed_engine.commands.train import run_folder
from speed_engine.config import TrainConfig, check_whole, with_values
from speed_engine.run import starting
from speed_engine.run.folder import read_config
from speed_engine.runtime.progress import announcing
from speed_engine.runtime.records import read_records
from speed_engine.training.ema import EMA


@dataclass(frozen=True)
class Run:
    """A run and its folder, of ``speed_engine.train`` or of the command line.

    Attributes:
        folder: of the run.
    """

    folder: Path

    @property
    def config(self) -> TrainConfig:
        """The whole configuration.

        Raises:
            UserError: the folder is not a run.
        """
        return read_config(Path(self.folder))

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """What is recorded so far, oldest first: one dict per record, as a row of a table.

        Records hold ``step``, ``images`` and ``seconds``, and those of training ``loss``, those of
        an evaluation ``fid`` and others; a figure that was not finite is None.

        Examples:
            >>> run = se.Run("runs/mine")
            >>> [record["step"] for record in run.metrics if "loss" in record]
            [10, 20]
            >>> table = pandas.DataFrame(run.metrics).set_index("step")

        Raises:
            UserError: the folder is not a run.
        """
        read_config(Path(self.folder))  # refuses what is no run
        return read_records(Path(self.folder))

    def model(
        self, average: str = EMA, *, checkpoint: int | None = None, device: Device = "auto"
    ) -> Model:
        """The model of a checkpoint.

        Args:
            average: which EMA of the parameters: ``ema``, or one of ``optimizer.averages``.
            checkpoint: its step, one of those that the run keeps. By default the newest.
            device: where to compute; auto takes a GPU if there is one.

        Raises:
            UserError: the run has no such checkpoint, or none yet, or no such EMA.

        Examples:
            >>> se.Run("runs/mine").model().facts.step
            20
        """
        return of_run(Path(self.folder), average, device, checkpoint)

    def resume(self, *, console: Console | None = None, **changes: Any) -> "Run":
        """Continue from the newest checkpoint, as ``speed-engine train --resume`` does.

        Args:
            console: where the progress is shown. By default standard output, or the notebook.
            changes: fields of the configuration that a resumed run may change, as ``train`` takes
                them, such as ``steps=5000``, or ``optimizer={"learning_rate": 1e-3}``.

        Returns:
            The run itself.

        Raises:
            UserError: a field that the run keeps is changed, it is complete, or its data are not
                those that it was trained on.
            FloatingPointError: too many steps in a row were not finite.

        Examples:
            >>> quick = {"features": "none", "num_images": 10, "solver_steps": 2}
            >>> run = se.train("digits", "runs/longer", steps=2, evaluation=quick)
            ... # doctest: +ELLIPSIS
            run       runs/longer
            ...
            >>> run = run.resume(steps=3)  # doctest: +ELLIPSIS
            run       runs/longer
            ...
            >>> run.metrics[-1]["step"]
            3
        """
        changed, console = with_values(self.config, changes), console or Console()
        with announcing(console):
            starting.resume(Path(self.folder), console, changed=changed)
        return self

    def evaluate(
        self,
        average: str = EMA,
        *,
        checkpoint: int | None = None,
        vae: str | None = None,
        **changes: Any,
    ) -> dict[str, Any]:
        """Measure a checkpoint, as ``speed-engine evaluate`` does, and record it.

        What was measured before with the same settings is not generated again.

        Args:
            average: which EMA of the parameters.
            checkpoint: its step, one of those that the run keeps. By default the newest.
            vae: the autoencoder that decodes latents, a diffusers AutoencoderKL as a folder or a
                name on the Hugging Face hub. By default that of the run.
            changes: fields of the configuration's ``evaluation``, such as ``num_images=1000``.

        Returns:
            The record; empty on all but the first of several processes.

        Raises:
            UserError: a field or a checkpoint that does not exist, or what cannot be measured.

        Examples:
            >>> record = se.Run("runs/mine").evaluate(num_images=500, solver_steps=4)
            >>> record["fid"] > 0
            True
        """
        data = {} if vae is None else {"vae": vae}
        config = with_values(self.config, {"data": data, "evaluation": changes})
        return evaluate(Path(self.folder), config, average, checkpoint) or {}


def train(
    config: str | Path | TrainConfig,
    folder: str | Path | None = None,
    *,
    recipe: RecipeName | None = None,
    console: Console | None = None,
    **changes: Any,
) -> Run:
    """Train a model, as ``speed-engine train`` does, and come back when it is done.

    Args:
        config: the name of a preset, the path of a configuration file (.toml or .json), or a
            configuration.
        folder: of the run; must not exist. By default runs/NAME-METHOD-SEED, or
            runs/NAME-RECIPE-SEED with a recipe.
        recipe: how it is trained, in place of what ``config`` says of method, process, target,
            optimizer and the schedule of its rate; ``changes`` take precedence over it, and another
            process among them brings its own target.
        console: where the progress is shown. By default standard output, or the notebook.
        changes: fields of the configuration in place of those of ``config``. A section is a
            mapping of its own fields: ``optimizer={"learning_rate": 2e-3}``.

    Returns:
        The run; it is not complete if a signal stopped it, and ``Run.resume`` continues it.

    Raises:
        UserError: a field or a value that does not exist, data that do not fit, or the folder is
            there already.
        FloatingPointError: too many steps in a row were not finite.

    Examples:
        >>> quick = {"num_images": 500, "solver_steps": 4}
        >>> run = se.train("digits", "runs/two", steps=2, model={"depth": 1}, evaluation=quick)
        ... # doctest: +ELLIPSIS
        run       runs/two
        ...
        >>> run.metrics[-1]["step"]
        2
    """
    start = origin(config, recipe=recipe)
    whole = start.config(changes)
    check_whole(whole)
    place = run_folder(start.name, whole, recipe) if folder is None else Path(folder).expanduser()
    console = console or Console()
    with announcing(console):
        starting.start(whole, place, console)
    return Run(place)
