"""``speed-engine consistency RUN_A RUN_B``: how alike two models draw from the same noise."""

import json
import logging
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor

from speed_engine import build, build_evaluation
from speed_engine.config import TrainConfig
from speed_engine.diffusion.conditions import Conditions
from speed_engine.evaluation.consistency import (
    Likeness,
    feature_extraction,
    likeness,
    partners_of,
    side_by_side,
)
from speed_engine.evaluation.generate import generate, save_images
from speed_engine.run import load_average_of, read_config
from speed_engine.runtime import machine
from speed_engine.runtime.checks import UserError
from speed_engine.training import checkpoint
from speed_engine.training.trainer import CHECKPOINTS

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ConsistencyCommand:
    """Measure how alike the images are that two models draw from the same noise, over training.

    At every step at which both runs have a checkpoint (--keep-every keeps them), and at the end:
    the mean squared distance and the cosine similarity of images of the same noise, beside those
    of images of the same class and other noise. Drawn by DDIM without guidance.
    """

    run_a: tyro.conf.Positional[Path]
    """Folder of a run."""
    run_b: tyro.conf.Positional[Path]
    """Folder of another on the same data."""
    count: int = 500
    """Images of each model and step, classes in turn; at least two of each class."""
    solver_steps: int | None = None
    """Model evaluations per image; default that of RUN_A."""
    seed: int = 0
    """Root of the noise."""
    json: bool = False
    """Print JSON in place of the table."""
    out: Path | None = None
    """Picture to write, a row of RUN_A over the same of RUN_B; default
    RUN_A/samples/consistency-RUN_B.png."""


class Comparison(NamedTuple):
    """Of one checkpoint of each run."""

    step_a: int
    step_b: int
    images: Likeness  # pixels, or latents where there is no VAE to decode them
    features: Likeness | None  # None where the run compares no features


def run(arguments: list[str], console: Console) -> None:
    """Run the command.

    Raises:
        UserError: a folder is no run, the runs are not of one data set and shape, or too few
            images are asked for.
    """
    command = tyro.cli(ConsistencyCommand, args=arguments, prog="speed-engine consistency")
    runs = command.run_a, command.run_b
    configs = [_configured(read_config(run), command) for run in runs]
    checkpoints = [complete_checkpoints(run) for run in runs]
    _check_same_task(runs, configs, checkpoints)
    conditions = build_evaluation.drawn_conditions(configs[0])
    partners = partners_of(conditions.get("labels"), command.count)
    compared = configs[0].evaluation.features != "none"
    extractor = build_evaluation.references(configs[0])[0].extractor if compared else None
    features = None if extractor is None else feature_extraction(extractor)
    comparisons: list[Comparison] = []
    for steps in steps_compared(*checkpoints):
        paths = (of_run[step] for of_run, step in zip(checkpoints, steps, strict=True))
        a, b = (
            _draw(config, path, conditions, command.seed)
            for config, path in zip(configs, paths, strict=True)
        )
        of_features = features and likeness(features(a), features(b), partners)
        comparisons.append(Comparison(*steps, likeness(a, b, partners), of_features))
    name = f"consistency-{command.run_b.resolve().name}.png"
    picture = save_images(*side_by_side(a, b), command.out or command.run_a / "samples" / name)
    if command.json:
        facts = {"count": command.count, "seed": command.seed, "picture": str(picture)}
        facts["solver_steps"] = configs[0].evaluation.solver_steps
        facts["extractor"] = extractor and extractor.name
        print(json.dumps({**facts, "comparisons": [_as_json(c) for c in comparisons]}))
    else:
        _print(comparisons, console)
        console.print(f"picture: {picture}", highlight=False, soft_wrap=True)


def complete_checkpoints(run: Path) -> dict[int, Path]:
    """Those of a run by their step, oldest first; damaged ones are reported and passed over.

    Raises:
        UserError: there is none.
    """
    found: dict[int, Path] = {}
    for path in sorted((run / CHECKPOINTS).glob("step-*")):
        try:
            checkpoint.verify(path)
        except checkpoint.InvalidCheckpoint as damage:
            _log.warning("%s; it is left out.", damage)
        else:
            found[checkpoint.read_state(path)["step"]] = path
    if not found:
        raise UserError(f"{run} has no complete checkpoint; train it first.")
    return found


def steps_compared(a: Collection[int], b: Collection[int]) -> list[tuple[int, int]]:
    """Steps that both runs have a checkpoint of, and the last of each."""
    both = [(step, step) for step in sorted({*a} & {*b})]
    last = max(a), max(b)
    return both if last in both else [*both, last]


def _configured(config: TrainConfig, command: ConsistencyCommand) -> TrainConfig:
    steps = command.solver_steps or config.evaluation.solver_steps
    evaluation = replace(config.evaluation, num_images=command.count, solver_steps=steps)
    return replace(config, evaluation=evaluation)


def _check_same_task(
    runs: Sequence[Path], configs: Sequence[TrainConfig], checkpoints: Sequence[dict[int, Path]]
) -> None:
    def facts(config: TrainConfig, paths: dict[int, Path]) -> dict[str, object]:
        return {
            "shape": config.data.image_shape,
            "latents": config.data.latents,
            "conditions": sorted(build.told_names(config)),
            "classes": config.data.num_classes,
            "data (SHA-256)": checkpoint.read_state(paths[max(paths)])["data"][:12],
        }

    of_a, of_b = map(facts, configs, checkpoints)
    for name, value in of_a.items():
        if of_b[name] != value:
            raise UserError(
                f"{name} of {runs[0]}: {value}, of {runs[1]}: {of_b[name]}; consistency compares "
                "models that were trained on the same data."
            )


def _draw(config: TrainConfig, path: Path, conditions: Conditions, seed: int) -> Tensor:
    """(N, C, H, W) of one checkpoint, the same noise for image i whichever model draws it."""
    process = build.build_process(config)
    images = generate(
        load_average_of(path, config, machine.torch_device(config.device))[0],
        process.schedule,
        process.table,
        conditions,
        torch.arange(config.evaluation.num_images),
        image_shape=config.data.image_shape,
        null={},
        seed=seed,
        num_steps=config.evaluation.solver_steps,
        latents=config.data.latents,
    )
    decode = build_evaluation.build_decoder(config)
    return images if decode is None else decode(images)


def _as_json(comparison: Comparison) -> dict[str, object]:
    spaces = {"images": comparison.images, "features": comparison.features}
    return {
        "step_a": comparison.step_a,
        "step_b": comparison.step_b,
        **{name: s and {**asdict(s), "ratio": s.ratio} for name, s in spaces.items()},
    }


def _print(comparisons: Sequence[Comparison], console: Console) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0))
    heads = "step of A", "of B", "compared", "distance", "unpaired", "ratio", "cosine", "unpaired"
    for head in heads:
        table.add_column(head, justify="left" if head == "compared" else "right")
    for comparison in comparisons:
        for name, space in (("images", comparison.images), ("features", comparison.features)):
            if space is not None:
                distances = f"{space.distance:.4g}", f"{space.distance_unpaired:.4g}"
                cosines = f"{space.cosine:.3f}", f"{space.cosine_unpaired:.3f}"
                steps = f"{comparison.step_a:,}", f"{comparison.step_b:,}"
                table.add_row(*steps, name, *distances, f"{space.ratio:.3f}", *cosines)
    console.print(table, highlight=False)
    console.print("unpaired: another noise, the same class; ratio: distance / unpaired")
