"""``speed-engine methods``: which methods there are, on which processes, and what they do."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from torch import Tensor

from speed_engine.build import build_process, build_validation
from speed_engine.commands.options import read_options
from speed_engine.diffusion.grammar import Spelling
from speed_engine.diffusion.method import SHARED, options_of
from speed_engine.diffusion.methods import METHODS
from speed_engine.diffusion.processes import build_schedule
from speed_engine.evaluation import method_report, timestep_losses
from speed_engine.run.averages import load_average
from speed_engine.run.folder import kept_steps, newest_checkpoint, read_config
from speed_engine.runtime.checks import UserError, check_between
from speed_engine.runtime.machine import torch_device
from speed_engine.runtime.progress import announced

MOST_SHOWN = 20_000  # timesteps: each of some hundred pairs has a table of them


@dataclass(frozen=True)
class MethodsCommand:
    """List the methods and the processes that each works on; print or plot what they do."""

    process: str | None = None
    """Noise process that --json and --figures are about; `speed-engine train --help` lists them at
    --schedule. By default linear."""
    num_timesteps: int | None = None
    """Number of timesteps of that process; in continuous time, the resolution of the output. By
    default 1000."""
    json: bool = False
    """Print the timestep distribution P(t) and the loss weights w(t) of every method on the process
    as JSON, instead of the table."""
    figures: Path | None = None
    """Folder to write two pictures of the process into: one of its methods, and one of its
    increments."""
    run: Path | None = None
    """Folder of a run: print, instead of the table, the loss of its checkpoints in each of SpeeD's
    three areas of its process; with --figures, draw it by timestep. It goes with none of the other
    options."""


def run(arguments: list[str], console: Console) -> None:
    """Print the table or the arrays, and write the figures."""
    command = read_options(MethodsCommand, arguments, "speed-engine methods")
    if command.figures is not None:
        method_report.check_libraries()
    if command.run is not None:
        _check_alone(command)
        _of_run(command.run, command.figures, console)
        return
    process = "linear" if command.process is None else command.process
    num_timesteps = 1000 if command.num_timesteps is None else command.num_timesteps
    check_between("num_timesteps", num_timesteps, 2, MOST_SHOWN)
    build_schedule(process, num_timesteps)  # names a bad one before any output
    if command.json:
        print(json.dumps(method_report.arrays(process, num_timesteps)))
    else:
        _print_methods(method_report.compatibility(num_timesteps), console)
    if command.figures is not None:
        for path in method_report.draw_figures(process, num_timesteps, command.figures):
            print(path, file=sys.stderr)


def _check_alone(command: MethodsCommand) -> None:
    given = {
        "--process": command.process is not None,
        "--num-timesteps": command.num_timesteps is not None,
        "--json": command.json,
    }
    if unused := " and ".join(option for option, is_given in given.items() if is_given):
        raise UserError(
            f"--run {command.run} with {unused}: the losses of a run are of its own process, and "
            "printed as a table; leave one out."
        )


def _of_run(run: Path, figures: Path | None, console: Console) -> None:
    """The losses of its checkpoints, by area as a table and by timestep as a picture."""
    config = read_config(run)
    newest_checkpoint(run)  # refuses a run that has none
    process, device = build_process(config), torch_device(config.device)
    validation = build_validation(config, process)
    curves: dict[str, Tensor] = {}
    for step in kept_steps(run):
        with announced(f"measuring the loss of step {step:,} at {timestep_losses.TIMESTEPS} times"):
            model, _ = load_average(run, config, device, step=step)
            curves[f"step {step:,}"] = timestep_losses.losses(validation, process, model)
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("")
    rows = {name: timestep_losses.by_area(process, errors) for name, errors in curves.items()}
    areas = next(iter(rows.values()))
    for area in areas:
        table.add_column(area, justify="right")
    for name, means in rows.items():
        table.add_row(name, *(f"{means[area]:.4f}" for area in areas))
    target = process.schedule.prediction
    console.print(
        f"mean squared error of {target}, of images not trained on where some are held out"
    )
    console.print(table, highlight=False)
    if figures is not None:
        figures.mkdir(parents=True, exist_ok=True)
        path = figures / f"losses-{config.schedule}.png"
        measured = timestep_losses.measured_increments(process, validation.batch, config.seed)
        timestep_losses.draw(path, process, curves, measured, f"{config.schedule}: {run.name}")
        print(path, file=sys.stderr)


def _print_methods(cells: dict[str, dict[str, str | None]], console: Console) -> None:
    """One row per method, one column per process; reasons for the gaps below."""
    reasons: list[str] = []
    table = Table(box=None, padding=(0, 1, 0, 0))
    table.add_column("method")
    for process in cells:
        table.add_column(process.replace("_", "\n"), justify="center")
    for method in METHODS:
        row = []
        for of_method in cells.values():
            reason = of_method[method]
            if reason is not None and reason not in reasons:
                reasons.append(reason)
            row.append("yes" if reason is None else f"({reasons.index(reason) + 1})")
        table.add_row(method, *row)
    console.print(table, highlight=False)
    for number, reason in enumerate(reasons, 1):
        console.print(f"({number}) {reason}", highlight=False, markup=False, soft_wrap=True)
    lines = [
        (_with_defaults(method), (definition.__doc__ or "").splitlines()[0])
        for method, definition in METHODS.items()
    ]
    for method, summary in lines:
        console.print(f"{method}: {summary}", highlight=False, markup=False, soft_wrap=True)
    shared = "".join(f"+{name}={of.default}" for name, of in SHARED.items())
    console.print(
        f"every method: {shared}, where None is as the method does.",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def _with_defaults(method: str) -> str:
    """A method as it is spelled with all options of its own, at their defaults."""
    own = {name: of for name, of in options_of(method).items() if name not in SHARED}
    return str(Spelling(method, {name: of.default for name, of in own.items()}))
