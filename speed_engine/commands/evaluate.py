"""``speed-engine evaluate``: measure the EMA of a run's parameters, once per setting.

Its records stand in RUN/metrics.jsonl beside those of training, with ``"evaluated": true``. What
was measured before with the same settings, in training or here, is found there and not generated
again.
"""

import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from rich.console import Console
from rich.table import Table

from speed_engine.build import build_evaluator, build_process
from speed_engine.commands.options import read_options
from speed_engine.config import TrainConfig
from speed_engine.encoders.hub import sha256_of
from speed_engine.evaluation.evaluator import Evaluator
from speed_engine.evaluation.generate import GRID_COLUMNS, GRID_ROWS, save_grid
from speed_engine.evaluation.image_set import ImageSet
from speed_engine.evaluation.metrics import ENOUGH, FIGURES, HELD_OUT, METRICS, title, written
from speed_engine.evaluation.metrics import HELP as METRICS_HELP
from speed_engine.evaluation.parts import ImageParts, generate_in_parts, held_parts
from speed_engine.models.layers.blocks import compiled
from speed_engine.run.averages import load_average
from speed_engine.run.folder import newest_checkpoint, read_config
from speed_engine.runtime import machine
from speed_engine.runtime.checks import UserError
from speed_engine.runtime.progress import SampleProgress, announced
from speed_engine.runtime.records import RECORDS, append_record, as_json, read_records
from speed_engine.runtime.world import World, join
from speed_engine.training import checkpoint
from speed_engine.training.ema import EMA

# What begins the names of metrics -> the real images that they compare with, and their number
PARTS = {"": ("training", "num_reference"), HELD_OUT: ("held-out", "num_held_out")}


@dataclass(frozen=True)
class EvaluateCommand:
    """Measure the EMA of a run's parameters against its data, and record it in metrics.jsonl."""

    run: tyro.conf.Positional[Path]
    """Folder of the run."""
    checkpoint: int | None = None
    """Step of the checkpoint to measure; RUN/checkpoints lists them. By default the newest."""
    num_images: int | None = None
    """Number of images to generate. By default that of the run."""
    batch_size: int | None = None
    """Number of images that a process generates at a time, and what a kill costs at most. By
    default that of the run."""
    average: str = EMA
    """Which EMA of the parameters to measure: ema, or one that the run's optimizer.averages
    names."""
    solver: str | None = None
    """Solver that generates the images, SOLVER[+OPTION=VALUE ...], such as ddim+eta=0.5;
    --evaluation.solver of `speed-engine train --help` lists them. By default that of the run."""
    solver_steps: int | None = None
    """Number of model evaluations per image. By default that of the run."""
    guidance: float | None = None
    """Scale of classifier-free guidance; 1 is without guidance. By default that of the run."""
    guidance_interval: tuple[float, float] | None = None
    """Lower and upper noise level sigma / alpha between which guidance acts. By default that of the
    run."""
    guidance_channels: int | None = None
    """Number of channels, the first ones, that guidance acts on; DiT's published samples have 3. By
    default that of the run."""
    features: Literal["classifier", "inception", "dinov2"] | None = None
    """Features that the metrics compare: those of a classifier trained on the run's data, those of
    the standard Inception network, or those of DINOv2. By default those of the run."""
    inception_weights: Path | None = None
    """Weights file of the Inception network. By default it is searched in the cache of torch
    hub."""
    dinov2_weights: Path | None = None
    """Folder of the DINOv2 network, as transformers has it. By default facebook/dinov2-large is
    searched in the cache of the Hugging Face hub."""
    reference: str | None = None
    """Real pictures to compare with, as shards, a folder of pictures, or an .npz;
    --evaluation.reference of `speed-engine train --help` says which. By default what the run names,
    else its own data."""
    vae: str | None = None
    """The autoencoder that decodes latents, a diffusers AutoencoderKL as a folder or a name on the
    Hugging Face hub. By default that of the run."""
    metrics: Annotated[tuple[str, ...] | None, tyro.conf.arg(help=METRICS_HELP)] = None
    clip_model: str | None = None
    """Model that the metric clip uses: a CLIPModel with its processor, as a folder or a name on the
    Hugging Face hub. By default that of the run."""
    json: bool = False
    """Print the record as JSON instead of a table."""


def run(arguments: list[str], console: Console) -> None:
    """Measure, and show the record."""
    command = read_options(EvaluateCommand, arguments, "speed-engine evaluate")
    config = read_config(command.run)
    if command.vae is not None:
        config = replace(config, data=replace(config.data, vae=command.vae))
    config = config.with_evaluation(
        num_images=command.num_images,
        batch_size=command.batch_size,
        solver=command.solver,
        solver_steps=command.solver_steps,
        guidance=command.guidance,
        guidance_interval=command.guidance_interval,
        guidance_channels=command.guidance_channels,
        metrics=command.metrics,
        features=command.features,
        inception_weights=command.inception_weights,
        dinov2_weights=command.dinov2_weights,
        reference=command.reference,
        clip_model=command.clip_model,
    )
    record = evaluate(command.run, config, command.average, command.checkpoint)
    if record is not None and command.json:
        console.print_json(as_json(record))
    elif record is not None:
        show(record, console)


def evaluate(
    run: Path, config: TrainConfig, average: str = EMA, asked_step: int | None = None
) -> dict[str, Any] | None:
    """The record of a checkpoint under the configured settings; None on other processes.

    Args:
        run: folder.
        config: of the run; its evaluation says how to generate and what to measure.
        average: name of the EMA; the record of another than ``ema`` names it.
        asked_step: of the checkpoint; by default the newest.

    Raises:
        UserError: the run has no such checkpoint or no such EMA, or nothing is to be measured.
    """
    world = join(machine.torch_device(config.device).type)
    newest = partial(_newest_step, run)
    step: int = world.from_first(newest) if asked_step is None else asked_step
    evaluator = build_evaluator(config, build_process(config), world)
    if not evaluator.fields():
        raise UserError(
            f"evaluation.features={config.evaluation.features} measures nothing of "
            f"evaluation.metrics={' '.join(config.evaluation.metrics)}; choose other --features, "
            "or --metrics loss."
        )
    if known := world.from_first(lambda: _known(run, step, evaluator, average)):
        if world.is_first:
            text = f"measured before, at step {step} with these settings"
            _note(f"{text}: {run / RECORDS}")
        return known if world.is_first else None
    placed = machine.torch_device(config.device, world)
    # One process takes a newer one where a run deletes this one meanwhile; several need the same.
    model, step = load_average(run, config, placed, average, step if world.size > 1 else asked_step)
    device = machine.choose_device(config.device).value
    how = machine.choose_generation(config.compile, device).value
    folder = run / "samples" / f"step-{step:08d}.parts"
    weights = sha256_of(model.state_dict())
    forward: Any = compiled(model, how)
    with held_parts(folder, world) if evaluator.needs_images else nullcontext():
        parts = None
        if evaluator.needs_images:
            parts = _generated(evaluator, forward, weights, how, folder, world)
        with announced("computing the validation loss"):
            validation = evaluator.validate(forward)
        if not world.is_first:
            return None
        images = parts and parts.images()
        with announced("comparing generated images with real ones"):
            found = evaluator.measure(images, validation)
        assert found is not None  # some field is measured
        record = {"step": step, "images": step * config.batch_size, **found.record()}
        record |= {} if average == EMA else {"average": average}
        if "copied_share" in found.figures:
            # It compares them.
            assert found.generated is not None and evaluator.training is not None
            path = run / "samples" / f"step-{step:08d}-copies.png"
            _save_copies(found.generated, evaluator.training, path)
            _note(f"the most copied images, above their nearest training images: {path}")
        append_record(run, record | {"evaluated": True})
        if parts is not None:  # only now: a disk may be full
            parts.remove()
    return record


def _newest_step(run: Path) -> int:
    return checkpoint.read_state(newest_checkpoint(run)).step


def _generated(
    evaluator: Evaluator, forward: Any, weights: str, how: str, folder: Path, world: World
) -> ImageParts:
    """The images, on disk until all are there: a measurement that was killed goes on there."""
    total, size = evaluator.num_images, evaluator.batch_size
    settings = evaluator.circumstances() | {
        "weights": weights,
        "conditions": sha256_of(evaluator.conditions),
        "seed": evaluator.seed,
    }
    if how != "off":
        settings["compile"] = how
    with SampleProgress(Console(stderr=True), -(-total // world.size)) as progress:
        generate = partial(evaluator.generate_some, forward)
        return generate_in_parts(generate, total, size, folder, settings, world, progress.advance)


def show(record: dict[str, Any], console: Console) -> None:
    """The metrics as a table; of one extractor, since those of two cannot be compared."""
    if "num_generated" in record:
        how = f"{record['solver']}, {record['solver_steps']} steps, guidance {record['guidance']:g}"
        console.print(f"step {record['step']}, {record['num_generated']:,} images by {how}")
    else:
        console.print(f"step {record['step']}, no images generated, for the loss needs none")
    if "extractor" in record:
        console.print(
            f"features of {record['extractor']}", highlight=False, markup=False, soft_wrap=True
        )
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column()
    for prefix, (_, count) in PARTS.items():
        images = f"{record[count]:,} images" if count in record else ""
        is_known = count in record or (not prefix and "reference_sha256" in record)
        table.add_column(f"{_part(prefix, record)}\n{images}" if is_known else "")
    for name in FIGURES:
        fields = [prefix + name for prefix in PARTS]
        if any(field in record for field in fields):
            cells = [written(field, record[field]) if field in record else "" for field in fields]
            table.add_row(title(name, record.get("extractor")), *cells)
    console.print(table, highlight=False)
    for line in _notes(record):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _notes(record: dict[str, Any]) -> Iterator[str]:
    """What the metrics do not say by themselves: how much few images bias them."""
    biased = [
        (prefix + name, prefix, figure)
        for metric in METRICS.values()
        if metric.bias is not None
        for name, figure in metric.figures.items()
        for prefix in PARTS
    ]
    for field, prefix, figure in biased:
        part, count = _part(prefix, record), record.get(PARTS[prefix][1], ENOUGH)
        if field in record and min(record["num_generated"], count) < ENOUGH:
            within = record.get(f"{field}_within")
            sets = f"two random sets of {record.get(f'{field}_within_images')} {part} images"
            example = "" if within is None else f": {sets} have {written(field, within)}"
            yield f"fewer than {ENOUGH:,} images bias {figure.title} upwards{example}"


def _part(prefix: str, record: dict[str, Any]) -> str:
    """The real images that figures compare with, whose names begin with ``prefix``."""
    of_reference = not prefix and "reference_sha256" in record
    return "reference" if of_reference else PARTS[prefix][0]


def _known(run: Path, step: int, evaluator: Evaluator, average: str) -> dict[str, Any] | None:
    """The newest record of the same measurement."""
    settings = {"step": step, **evaluator.circumstances()}
    for record in reversed(read_records(run)):
        same = all(record.get(name) == value for name, value in settings.items())
        same = same and record.get("average", EMA) == average
        if same and evaluator.fields() <= record.keys():
            return record
    return None


def _save_copies(generated: ImageSet, training: ImageSet, path: Path) -> None:
    """The generated images nearest to training images, above those, in pairs of rows."""
    found = generated.nearest_in(training)
    pairs = GRID_COLUMNS * (GRID_ROWS // 2)
    ids = found.distances.argsort()[:pairs]
    row = 2 * (torch.arange(len(ids)) // GRID_COLUMNS)
    both = torch.cat([generated.images[ids], training.images[found.ids[ids]]])
    save_grid(both, torch.cat([row, row + 1]), path)


def _note(text: str) -> None:
    """Beside the figures, which programs may read."""
    print(text, file=sys.stderr)
