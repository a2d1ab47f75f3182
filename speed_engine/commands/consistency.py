"""``speed-engine consistency RUN_A RUN_B``: how alike two models' images of the same noise are."""

import json
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor

from speed_engine.build import build_decoder, build_process, picture_shape
from speed_engine.commands.options import read_options
from speed_engine.config import TrainConfig
from speed_engine.data.opening import condition_names
from speed_engine.diffusion.conditions import Conditions
from speed_engine.evaluation.conditions import generation_conditions
from speed_engine.evaluation.consistency import (
    Likeness,
    likeness,
    partners_of,
    side_by_side,
)
from speed_engine.evaluation.generate import GenerationSettings, generate, save_images
from speed_engine.evaluation.image_set import ImageSet
from speed_engine.evaluation.references import real_images
from speed_engine.models.layers.blocks import compiled
from speed_engine.run.averages import load_average_of
from speed_engine.run.folder import read_config
from speed_engine.runtime import machine
from speed_engine.runtime.checks import UserError
from speed_engine.training import checkpoint
from speed_engine.training.checkpoint import CHECKPOINTS


@dataclass(frozen=True)
class ConsistencyCommand:
    """Measure how alike the images are that two models generate from the same noise, over training.

    This is done at every step at which both runs have a checkpoint (--keep-every keeps them), and
    at the end. The result is the mean squared distance and the cosine similarity of images of the
    same noise, beside those of images of the same class and other noise. The images are generated
    by DDIM without guidance.
    """

    run_a: tyro.conf.Positional[Path]
    """Folder of a run."""
    run_b: tyro.conf.Positional[Path]
    """Folder of another run on the same data."""
    count: int = 500
    """Number of images that each model generates at each step, from all classes in turn; it must be
    at least two per class."""
    solver_steps: int | None = None
    """Number of model evaluations per image. By default that of RUN_A."""
    seed: int = 0
    """Seed of the noise."""
    json: bool = False
    """Print JSON instead of a table."""
    out: Path | None = None
    """Picture to write, a row of RUN_A's images over the row of RUN_B's. By default
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
    command = read_options(ConsistencyCommand, arguments, "speed-engine consistency")
    runs = command.run_a, command.run_b
    configs = _configured(runs, command)
    checkpoints = [complete_checkpoints(run) for run in runs]
    _check_same_task(runs, configs, checkpoints)
    data, evaluation = configs[0].data, configs[0].evaluation
    conditions = generation_conditions(data, evaluation.num_images, configs[0].seed)
    partners = partners_of(conditions.get("labels"), command.count)
    extractor = None
    if evaluation.features != "none":
        shape = picture_shape(configs[0], build_decoder(configs[0]))
        on_gpu = machine.torch_device(configs[0].device).type == "cuda"
        extractor = real_images(data, evaluation, shape, on_gpu).extractor
    comparisons: list[Comparison] = []
    for steps in steps_compared(*checkpoints):
        paths = (of_run[step] for of_run, step in zip(checkpoints, steps, strict=True))
        a, b = (
            _generate(config, path, conditions, command.seed)
            for config, path in zip(configs, paths, strict=True)
        )
        of_features = None
        if extractor is not None:
            of_a, of_b = (ImageSet(images, len(images), extractor) for images in (a, b))
            of_features = likeness(of_a.features, of_b.features, partners)
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
        console.print(f"picture: {picture}", highlight=False, markup=False, soft_wrap=True)


def complete_checkpoints(run: Path) -> dict[int, Path]:
    """Those of a run by their step, oldest first; damaged ones are reported and passed over.

    Raises:
        UserError: there is none.
    """
    found = checkpoint.complete(run / CHECKPOINTS)
    if not found:
        raise UserError(f"{run} has no complete checkpoint; train it first.")
    return {checkpoint.read_state(path).step: path for path in found}


def steps_compared(a: Collection[int], b: Collection[int]) -> list[tuple[int, int]]:
    """Steps that both runs have a checkpoint of, and the last of each."""
    both = [(step, step) for step in sorted({*a} & {*b})]
    last = max(a), max(b)
    return both if last in both else [*both, last]


def _configured(runs: Sequence[Path], command: ConsistencyCommand) -> list[TrainConfig]:
    """Of each run, with the same number of images and of steps."""
    configs = [read_config(run) for run in runs]
    steps = command.solver_steps
    steps = configs[0].evaluation.solver_steps if steps is None else steps
    return [of.with_evaluation(num_images=command.count, solver_steps=steps) for of in configs]


def _check_same_task(
    runs: Sequence[Path], configs: Sequence[TrainConfig], checkpoints: Sequence[dict[int, Path]]
) -> None:
    def facts(config: TrainConfig, paths: dict[int, Path]) -> dict[str, object]:
        return {
            "shape": config.data.image_shape,
            "latents": config.data.latents,
            "conditions": sorted(condition_names(config.data)),
            "classes": config.data.num_classes,
            "data (SHA-256)": checkpoint.read_state(paths[max(paths)]).data[:12],
        }

    of_a, of_b = map(facts, configs, checkpoints)
    for name, value in of_a.items():
        if of_b[name] != value:
            raise UserError(
                f"{name} of {runs[0]}: {value}, of {runs[1]}: {of_b[name]}; consistency compares "
                "models that were trained on the same data."
            )


def _generate(config: TrainConfig, path: Path, conditions: Conditions, seed: int) -> Tensor:
    """(N, C, H, W) of one checkpoint, the same noise for image i whichever model generates it."""
    process, device = build_process(config), machine.torch_device(config.device)
    model, _ = load_average_of(path, config, device)
    forward: Any = compiled(model, machine.choose_generation(config.compile, device.type).value)
    images = generate(
        forward,
        process.table,
        conditions,
        torch.arange(config.evaluation.num_images),
        GenerationSettings(steps=config.evaluation.solver_steps),
        image_shape=config.data.image_shape,
        null={},
        seed=seed,
        latents=config.data.latents,
    )
    decode = build_decoder(config)
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
