"""``speed-engine methods``: which methods there are, on which processes, and what they do."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from speed_engine.commands.options import read_options
from speed_engine.diffusion.grammar import Spelling
from speed_engine.diffusion.method import SHARED, options_of
from speed_engine.diffusion.methods import METHODS
from speed_engine.diffusion.processes import build_schedule
from speed_engine.evaluation import method_report
from speed_engine.runtime.checks import check_between

MOST_SHOWN = 20_000  # timesteps: each of some hundred pairs has a table of them


@dataclass(frozen=True)
class MethodsCommand:
    """List the methods and the processes that each works on; print or plot what they do."""

    process: str = "linear"
    """Noise process that --json and --figures are about; `speed-engine train --help` lists them at
    --schedule."""
    num_timesteps: int = 1000
    """Number of timesteps of that process; in continuous time, the resolution of the output."""
    json: bool = False
    """Print the timestep distribution P(t) and the loss weights w(t) of every method on the process
    as JSON, instead of the table."""
    figures: Path | None = None
    """Folder to write two pictures of the process into: one of its methods, and one of its
    increments."""


def run(arguments: list[str], console: Console) -> None:
    """Print the table or the arrays, and write the figures."""
    command = read_options(MethodsCommand, arguments, "speed-engine methods")
    check_between("num_timesteps", command.num_timesteps, 2, MOST_SHOWN)
    build_schedule(command.process, command.num_timesteps)  # names a bad one before any output
    if command.figures is not None:
        method_report.check_libraries()
    if command.json:
        print(json.dumps(method_report.arrays(command.process, command.num_timesteps)))
    else:
        _print_methods(method_report.compatibility(command.num_timesteps), console)
    if command.figures is not None:
        for path in method_report.draw_figures(
            command.process, command.num_timesteps, command.figures
        ):
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
        (_with_defaults(method), (recipe.__doc__ or "").splitlines()[0])
        for method, recipe in METHODS.items()
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
