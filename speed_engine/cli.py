"""The command line of ``speed-engine``: one function per command."""

import json
import logging
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NoReturn

import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from speed_engine.config import TrainConfig, cache_folder
from speed_engine.models.config import DiTConfig
from speed_engine.presets import PRESETS
from speed_engine.runtime.checks import UserError

USAGE = """\
usage: speed-engine COMMAND ...

  train PRESET [options]   train a model; speed-engine train --help lists the presets
  train --resume RUN       continue a run exactly where its newest checkpoint stands
  plan PRESET --gpus N     what a run would take on N GPUs: memory, communication, time
  sample RUN               draw images from a trained model
  evaluate RUN             measure a trained model against its data
  compare PRESET           train methods at equal budget, several seeds each, and report
  consistency RUN_A RUN_B  how alike two models draw from the same noise
  export RUN --out PATH    write a trained model's weights for DiT's own code or diffusers
  shards COMMAND           prepare, index and verify data
  methods                  which methods there are, on which processes, and what they do
  doctor                   what will be used on this machine, and why

Each command explains its options with --help.
"""


@dataclass(frozen=True, kw_only=True)
class TrainCommand:
    """Train a model."""

    preset: tyro.conf.Suppress[str]
    config: Annotated[TrainConfig, tyro.conf.arg(name="")]
    run: Path | None = None
    """Folder of the run, which must not exist; default runs/PRESET-METHOD-SEED."""
    dry_run: bool = False
    """Train nothing: print what the run would take in memory and arithmetic."""
    gpu: Literal["a100", "h100", "h200", "b200", "l40s", "a6000", "rtx4090"] = "h200"
    """Of --dry-run: the device of the expected step time."""


@dataclass(frozen=True, kw_only=True)
class PlanCommand:
    """What a run would take on many GPUs; nothing is trained."""

    preset: tyro.conf.Suppress[str]
    config: Annotated[TrainConfig, tyro.conf.arg(name="")]
    gpus: int = 8
    """GPUs of all nodes together."""
    gpu: Literal["a100", "h100", "h200", "b200", "l40s", "a6000", "rtx4090"] = "h200"
    """Which kind."""
    per_node: int = 8
    """GPUs of one node."""
    efficiency: float = 0.45
    """Share of the peak rate that the arithmetic reaches; measure it on one GPU first."""


@dataclass(frozen=True)
class ResumeCommand:
    """Continue a run exactly where its newest complete checkpoint stands."""

    resume: Path
    """Folder of the run."""
    steps: int | None = None
    """Optimizer steps of the whole run, to train longer than it was set to."""


@dataclass(frozen=True)
class ExportCommand:
    """Write the averaged model of a run for another library."""

    run: tyro.conf.Positional[Path]
    """Folder of the run."""
    out: Path
    """What to write: a .safetensors file for original, a folder for diffusers."""
    layout: Literal["original", "diffusers"] = "original"
    """Names as in the model's original code (facebookresearch/DiT), or DiTTransformer2DModel."""
    average: str = "ema"
    """Which average of the run to write: ema, or one of its optimizer.averages."""


@dataclass(frozen=True)
class MethodsCommand:
    """List the methods and the processes that each works on; print or draw what they do."""

    process: str = "linear"
    """Noise process of --json and --figures."""
    num_timesteps: int = 1000
    """Its timesteps; in continuous time, the resolution."""
    json: bool = False
    """Print P and w of every method on the process as JSON, in place of the table."""
    figures: Path | None = None
    """Folder to write two pictures of the process into: its methods and its increments."""


@dataclass(frozen=True)
class DoctorCommand:
    """Print what will be used on this machine, and why."""


def main(arguments: list[str] | None = None) -> None:
    """Entry point of ``speed-engine``; bad input exits with status 2 and one message."""
    arguments = sys.argv[1:] if arguments is None else arguments
    # Before torch loads OpenMP: its threads wait for each other spinning, and on a machine that is
    # busy elsewhere would spin most of the time (two cores, one neighbour: 240 images/s of the
    # digits preset against 1,300 with this limit; alone, 4,000 either way).
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")
    # Compiled code is kept from run to run; Inductor's own default is in /tmp.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder() / "inductor"))
    os.environ.setdefault("TRITON_CACHE_DIR", str(cache_folder() / "triton"))
    # torch's checkpoints warn, in two ways, that there is one process; that is no news.
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    console = Console()
    # Plain lines: a path that is wrapped can neither be copied nor searched for.
    for level in (logging.WARNING, logging.ERROR):
        logging.addLevelName(level, logging.getLevelName(level).lower())
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    commands: dict[str, Callable[[list[str], Console], None]] = {
        "train": _train,
        "plan": _plan,
        "sample": _sample,
        "evaluate": _evaluate,
        "compare": _compare,
        "consistency": _consistency,
        "export": _export,
        "shards": _shards,
        "methods": _methods,
        "doctor": _doctor,
    }
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        return
    if arguments[0] not in commands:
        _fail(f"unknown command {arguments[0]!r}; choose from {', '.join(commands)}.")
    try:
        commands[arguments[0]](arguments[1:], console)
        if distributed := sys.modules.get(
            "speed_engine.runtime.world"
        ):  # not every command needs it
            distributed.leave()
    except BrokenPipeError:  # whoever reads the output has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (UserError, OSError, FloatingPointError) as error:
        _fail(str(error))
    except KeyboardInterrupt:
        _fail(
            "interrupted; `speed-engine train --resume RUN` continues a run from its last "
            "checkpoint; `sample`, `evaluate`, `compare` and `shards` continue by the same command."
        )


def _train(arguments: list[str], console: Console) -> None:
    from speed_engine.training import trainer

    if any(argument.split("=")[0] == "--resume" for argument in arguments):
        command = tyro.cli(ResumeCommand, args=arguments, prog="speed-engine train")
        trainer.resume(command.resume, console, command.steps)
    else:
        presets = {
            name: (text, TrainCommand(preset=name, config=config))
            for name, (text, config) in PRESETS.items()
        }
        command = tyro.extras.overridable_config_cli(
            presets,
            args=arguments,
            prog="speed-engine train",
            config=(tyro.conf.AvoidSubcommands,),  # the preset has chosen the family of the model
        )
        if command.dry_run:
            from speed_engine.planning import cost

            for name, text in cost.describe(command.config, command.gpu).items():
                console.print(f"{name:12}{text}", highlight=False, soft_wrap=True)
            return
        config = command.config
        run = command.run or Path("runs") / f"{command.preset}-{config.method}-{config.seed}"
        trainer.start(config, run, console)


def _plan(arguments: list[str], console: Console) -> None:
    from speed_engine.planning import cluster

    presets = {
        name: (text, PlanCommand(preset=name, config=config))
        for name, (text, config) in PRESETS.items()
    }
    command = tyro.extras.overridable_config_cli(
        presets, args=arguments, prog="speed-engine plan", config=(tyro.conf.AvoidSubcommands,)
    )
    lines = cluster.describe(
        command.config, command.gpus, command.gpu, command.per_node, command.efficiency
    )
    for name, text in lines.items():
        console.print(f"{name:10}{text}", highlight=False, soft_wrap=True)


def _sample(arguments: list[str], console: Console) -> None:
    from speed_engine.commands import sampling

    sampling.sample(arguments, console)


def _evaluate(arguments: list[str], console: Console) -> None:
    from speed_engine.commands import sampling

    sampling.evaluate(arguments, console)


def _compare(arguments: list[str], console: Console) -> None:
    from speed_engine.commands import compare

    compare.main(arguments, console)


def _export(arguments: list[str], console: Console) -> None:
    import torch

    from speed_engine import build
    from speed_engine.models.layouts.files import save_pretrained

    command = tyro.cli(ExportCommand, args=arguments, prog="speed-engine export")
    config = build.read_config(command.run)
    model, step = build.load_average(command.run, config, torch.device("cpu"), command.average)
    for path in save_pretrained(model, command.out, command.layout):
        console.print(f"weights of step {step}: {path}", highlight=False, soft_wrap=True)
    shift = config.model.frequency_shift if isinstance(config.model, DiTConfig) else 1
    if command.layout == "diffusers" and shift != 1:
        console.print(
            f"diffusers computes time features with a frequency shift of 1, this model with "
            f"{shift:g}: after from_pretrained, call "
            f"speed_engine.models.layouts.dit.set_frequency_shift(transformer, {shift:g}).",
            highlight=False,
            soft_wrap=True,
        )


def _consistency(arguments: list[str], console: Console) -> None:
    from speed_engine.commands import consistency

    consistency.main(arguments, console)


def _shards(arguments: list[str], console: Console) -> None:
    from speed_engine.commands import shards

    shards.main(arguments, console)


def _methods(arguments: list[str], console: Console) -> None:
    from speed_engine.diffusion.processes import build_schedule
    from speed_engine.evaluation import method_report

    command = tyro.cli(MethodsCommand, args=arguments, prog="speed-engine methods")
    build_schedule(command.process, command.num_timesteps)  # names a bad one before any output
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
    from speed_engine.diffusion.methods import METHODS

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
    for method, recipe in METHODS.items():
        summary = (recipe.__doc__ or "").splitlines()[0]
        console.print(f"{method:20} {summary}", highlight=False, markup=False, soft_wrap=True)


def _doctor(arguments: list[str], console: Console) -> None:
    from speed_engine.runtime import machine

    tyro.cli(DoctorCommand, args=arguments, prog="speed-engine doctor")
    facts = machine.describe(["speed-engine", "doctor"])
    packages = ", ".join(f"{name} {version}" for name, version in facts["packages"].items())
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_row("python", facts["python"], packages)
    table.add_row("machine", f"{facts['cores']} cores", facts["cpu"])
    for name, (value, reason) in machine.choices(PRESETS["digits"][1]).items():
        table.add_row(name, f"[bold]{value}[/bold]", reason)
    table.add_row("cache", "", str(cache_folder()))
    console.print(table, highlight=False)


def _fail(message: str) -> NoReturn:
    text = f"[red]error:[/red] {escape(message)}"
    Console(stderr=True).print(text, highlight=False, soft_wrap=True)
    sys.exit(2)
