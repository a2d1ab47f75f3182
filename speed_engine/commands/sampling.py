"""The command line of what is done with a finished run: generate from it, measure it."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console

from speed_engine import build
from speed_engine.commands.evaluate import evaluate as measure
from speed_engine.commands.evaluate import show
from speed_engine.commands.sample import draw
from speed_engine.config import SolverName, TrainConfig
from speed_engine.evaluation.metrics import HELP as METRICS_HELP
from speed_engine.runtime.records import as_json


@dataclass(frozen=True)
class SampleCommand:
    """Generate images from the averaged model of a run."""

    run: tyro.conf.Positional[Path]
    """Folder of the run."""
    count: int = 100
    """Images, classes or prompts in turn; the picture shows the first ten of each."""
    solver: SolverName | None = None
    """How they are generated; euler is ddim; default that of the run, as for the three below."""
    solver_steps: int | None = None
    """Model evaluations per image."""
    guidance: float | None = None
    """Classifier-free guidance scale; 1 is none."""
    guidance_interval: tuple[float, float] | None = None
    """Noise levels sigma / alpha between which guidance acts."""
    prompt: tuple[str, ...] = ()
    """Texts to generate from, in turn, one row of the picture each; default those of the data."""
    text_encoder: str | None = None
    """The CLIP text model that the run's data were encoded with: a folder, or a name on the hub."""
    seed: int = 0
    """Root of the noise; image i depends on seed, i and its conditions only."""
    batch_size: int = 500
    """Images at a time and process."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile the model; auto does so where that was measured to pay."""
    out: Path | None = None
    """FILE.png, one picture of the first images; FILE.npz, all of them as ADM's evaluator reads
    them; or a folder for a PNG of each. The same command continues what was interrupted. Default
    RUN/samples/sample-seed-SEED.png."""


@dataclass(frozen=True)
class EvaluateCommand:
    """Measure the averaged model of a run against its data; kept in RUN/metrics.jsonl."""

    run: tyro.conf.Positional[Path]
    """Folder of the run."""
    num_images: int | None = None
    """Images generated; default that of the run, as for all below."""
    solver: SolverName | None = None
    """How they are generated; euler is ddim."""
    solver_steps: int | None = None
    """Model evaluations per image."""
    guidance: float | None = None
    """Classifier-free guidance scale; 1 is none."""
    guidance_interval: tuple[float, float] | None = None
    """Noise levels sigma / alpha between which guidance acts."""
    features: Literal["classifier", "inception"] | None = None
    """A classifier trained on the run's data, or the standard Inception network."""
    inception_weights: Path | None = None
    """Its weights file; by default torch hub's cache is searched."""
    metrics: Annotated[tuple[str, ...] | None, tyro.conf.arg(help=METRICS_HELP)] = None
    clip_model: str | None = None
    """Of the metric clip: a CLIPModel with its processor, a folder or a name on the hub."""
    json: bool = False
    """Print the record as JSON, in place of the table."""


def sample(arguments: list[str], console: Console) -> None:
    """``speed-engine sample``."""
    command = tyro.cli(SampleCommand, args=arguments, prog="speed-engine sample")
    config = _with_evaluation(
        build.read_config(command.run),
        num_images=command.count,
        solver=command.solver,
        solver_steps=command.solver_steps,
        guidance=command.guidance,
        guidance_interval=command.guidance_interval,
    )
    draw(
        config,
        command.run,
        command.out or command.run / "samples" / f"sample-seed-{command.seed}.png",
        console,
        seed=command.seed,
        batch_size=command.batch_size,
        compile=command.compile,
        prompts=command.prompt,
        text_encoder=command.text_encoder,
    )


def evaluate(arguments: list[str], console: Console) -> None:
    """``speed-engine evaluate``."""
    command = tyro.cli(EvaluateCommand, args=arguments, prog="speed-engine evaluate")
    config = _with_evaluation(
        build.read_config(command.run),
        num_images=command.num_images,
        solver=command.solver,
        solver_steps=command.solver_steps,
        guidance=command.guidance,
        guidance_interval=command.guidance_interval,
        metrics=command.metrics,
        features=command.features,
        inception_weights=command.inception_weights,
        clip_model=command.clip_model,
    )
    record = measure(command.run, config)
    if record is not None and command.json:
        console.print_json(as_json(record))
    elif record is not None:
        show(record, console)


def _with_evaluation(config: TrainConfig, **options: object) -> TrainConfig:
    """The configuration with the given evaluation options, checked; None keeps a run's own."""
    given = {name: value for name, value in options.items() if value is not None}
    return replace(config, evaluation=replace(config.evaluation, **given))
