"""Images of a trained model in files: ``speed-engine sample``.

Several processes, started by torchrun, share the images; the first one writes the files.

Letters: N images.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from rich.console import Console
from torch import Tensor

from speed_engine.build import build_decoder, build_process
from speed_engine.commands.options import read_options
from speed_engine.config import TrainConfig
from speed_engine.data.opening import null_conditions
from speed_engine.diffusion.conditions import Conditions
from speed_engine.encoders.hub import sha256_of
from speed_engine.evaluation.conditions import (
    class_names,
    generation_conditions,
    generation_settings,
    of_classes,
    prompted,
)
from speed_engine.evaluation.generate import (
    GRID_ROWS,
    check_guidance,
    generate,
    grid_rows,
    save_images,
)
from speed_engine.evaluation.image_files import write_archive, write_pictures
from speed_engine.evaluation.parts import ImageParts, generate_in_parts, held_parts, is_begun
from speed_engine.models.layers.blocks import compiled
from speed_engine.run.averages import load_average
from speed_engine.run.folder import newest_checkpoint, read_config
from speed_engine.runtime import machine
from speed_engine.runtime.checks import UserError, check_between
from speed_engine.runtime.progress import SampleProgress
from speed_engine.runtime.world import join
from speed_engine.training.checkpoint import read_state
from speed_engine.training.ema import EMA

OTHER_FILES = (".jpg", ".jpeg", ".webp", ".gif", ".npy", ".zip", ".tar", ".pt", ".safetensors")


@dataclass(frozen=True)
class SampleCommand:
    """Generate images with the EMA of a run's parameters."""

    run: tyro.conf.Positional[Path]
    """Folder of the run."""
    count: int = 100
    """Number of images, from all classes or prompts in turn. The picture shows the first ten of
    each."""
    classes: Annotated[tuple[str, ...], tyro.conf.arg(name="class")] = ()
    """Classes to generate in turn, by name or number. By default all that have samples."""
    checkpoint: int | None = None
    """Step of the checkpoint to generate with; RUN/checkpoints lists them. By default the
    newest."""
    average: str = EMA
    """Which EMA of the parameters generates: ema, or one that the run's optimizer.averages
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
    prompt: tuple[str, ...] = ()
    """Texts to generate from in turn; each has one row in the picture. By default the texts are
    those of the data."""
    text_encoder: str | None = None
    """The CLIP text model that encoded the run's data, as a folder or a name on the Hugging Face
    hub; --prompt needs it."""
    seed: int = 0
    """Seed of the noise; image i depends on the seed, on i and on its conditions only."""
    batch_size: int = 500
    """Number of images that a process generates at a time."""
    device: Literal["auto", "cpu", "cuda"] | None = None
    """Where to compute. By default as the run."""
    compile: Literal["auto", "on", "blocks", "off"] = "auto"
    """How torch.compile is used: on compiles the whole model, blocks compiles block by block. auto
    compiles block by block on a GPU, and on a CPU where that was measured to pay."""
    out: Path | None = None
    """What to write: FILE.png is one picture of the first images, FILE.npz holds all images as
    ADM's evaluator reads them, and a folder holds a PNG of each image. The same command continues
    what was interrupted. By default RUN/samples/sample-seed-SEED.png, with another number at its
    end where that is there already."""


def run(arguments: list[str], console: Console) -> None:
    """Generate the images."""
    command = read_options(SampleCommand, arguments, "speed-engine sample")
    config = read_config(command.run).with_evaluation(
        num_images=command.count,
        solver=command.solver,
        solver_steps=command.solver_steps,
        guidance=command.guidance,
        guidance_interval=command.guidance_interval,
        guidance_channels=command.guidance_channels,
    )
    if command.device is not None:
        config = replace(config, device=command.device)
    generate_files(
        config,
        command.run,
        command.out or _free(command.run / "samples" / f"sample-seed-{command.seed}.png"),
        console,
        step=command.checkpoint,
        classes=command.classes,
        average=command.average,
        seed=command.seed,
        batch_size=command.batch_size,
        compile=command.compile,
        prompts=command.prompt,
        text_encoder=command.text_encoder,
    )


def generate_files(
    config: TrainConfig,
    run: Path,
    out: Path,
    console: Console,
    *,
    step: int | None = None,
    classes: Sequence[str] = (),
    average: str = EMA,
    seed: int = 0,
    batch_size: int = 500,
    compile: Literal["auto", "on", "blocks", "off"] = "auto",
    prompts: Sequence[str] = (),
    text_encoder: str | None = None,
) -> None:
    """Generate ``evaluation.num_images`` images with an EMA of a run's parameters.

    They are kept in ``OUT.parts`` until all are there; what was interrupted continues from
    there.

    Args:
        config: of the run; its evaluation says how.
        run: folder.
        out: ``.npz`` for ADM's evaluator; ``.png`` for one picture of the first images; else a
            folder of pictures.
        console: for the first process.
        step: of the checkpoint; by default the newest.
        classes: to generate in turn, by name or number; none takes the conditions of the run.
        average: name of the EMA.
        seed: root of the noise.
        batch_size: images at a time and process.
        compile: the model or its blocks, see ``SampleCommand``.
        prompts: texts to generate from in turn; none takes the conditions of the run.
        text_encoder: of the prompts.

    Raises:
        UserError: before anything is generated, for what does not fit the model, a file that is
            there already, or the first parts of other images.
    """
    check_between("batch_size", batch_size, 1, 10**9)
    world = join(machine.torch_device(config.device).type)
    console = console if world.is_first else Console(quiet=True)
    if not out.name:
        raise UserError(f"--out {out}: name FILE.png, FILE.npz, or a folder that is not there yet.")
    folder = out.with_name(f"{out.name}.parts")
    _check_out(config, out, folder)
    total, settings = config.evaluation.num_images, generation_settings(config.evaluation)
    if prompts and classes:
        raise UserError("--class and --prompt: a model is conditioned on one of them; leave one.")
    if classes:
        conditions = of_classes(config.data, total, classes)
        _check_known(config, conditions["labels"])
        null = null_conditions(config.data)
    elif prompts:
        conditions, null = prompted(config.data, total, prompts, text_encoder)
    else:
        conditions = generation_conditions(config.data, total, config.seed)
        null = null_conditions(config.data)
    check_guidance(settings.guidance, conditions, null)
    device = machine.choose_device(config.device).value
    # Of all processes together: any number of them goes on with the parts of another number.
    batches = -(-total // batch_size)
    how = machine.choose_compile(compile, device, batches * settings.steps).value
    on = machine.torch_device(config.device, world)
    if step is None and world.size > 1:  # the run may save meanwhile, and all need the same
        step = world.from_first(lambda: read_state(newest_checkpoint(run)).step)
    model, step = load_average(run, config, on, average, step)
    process, decode = build_process(config), build_decoder(config, world)
    forward: Any = compiled(model, how)

    def part(ids: Tensor) -> Tensor:
        images = generate(
            forward,
            process.table,
            {name: value[ids] for name, value in conditions.items()},
            ids,
            settings,
            image_shape=config.data.image_shape,
            null=null,
            seed=seed,
            latents=config.data.latents,
            batch_size=batch_size,
        )
        return images if decode is None else decode(images)

    decides = {
        "step": step,
        "weights": sha256_of(model.state_dict()),
        "conditions": sha256_of(conditions | {f"null {name}": null[name] for name in null}),
        **settings.record(),
        "seed": seed,
        "device": device,
        "compile": how,
    }
    with held_parts(folder, world):
        with SampleProgress(console, -(-total // world.size)) as progress:
            advance = progress.advance
            images = generate_in_parts(part, total, batch_size, folder, decides, world, advance)
        if not world.is_first:
            return
        rows = torch.arange(total) % len(prompts) if prompts else grid_rows(total, conditions)
        where = _write(images, rows, conditions.get("labels"), out)
        images.remove()
    console.print(
        f"{total} images of step {step}: {where}", highlight=False, markup=False, soft_wrap=True
    )
    if rows_are := _rows_named(config, conditions, where):
        console.print(rows_are, highlight=False, markup=False, soft_wrap=True)


def _rows_named(config: TrainConfig, conditions: Conditions, where: Path) -> str:
    """Which class each row of the picture is of, where classes have names and rows."""
    names, labels = class_names(config.data), conditions.get("labels")
    if _kind(where) != ".png" or labels is None or not names:
        return ""
    shown = labels.unique().tolist()
    if len(shown) > GRID_ROWS or max(shown) >= len(names):
        return ""
    return f"rows: {', '.join(names[label] for label in shown)}"


def _free(path: Path) -> Path:
    """The path, or one with another number at its end where it, or what latents become, exists."""
    for number in itertools.count(1):
        candidate = path if number == 1 else path.with_stem(f"{path.stem}-{number}")
        if not _is_there(candidate):
            return candidate
    raise AssertionError("numbers do not end")


def _kind(out: Path) -> str:
    return out.suffix.lower()


def _is_there(out: Path) -> bool:
    return out.exists() or (_kind(out) == ".png" and out.with_suffix(".npy").exists())


def _check_known(config: TrainConfig, labels: Tensor) -> None:
    """Whether the model knows these classes: the data set may name more than it is trained on."""
    highest, count = int(labels.max()), config.data.num_classes
    if highest >= count:
        raise UserError(
            f"--class {class_names(config.data)[highest]} is class {highest} of the data set, and "
            f"this model knows the first {count} (data.num_classes); choose from these."
        )


def _check_out(config: TrainConfig, out: Path, folder: Path) -> None:
    if _is_there(out) and not is_begun(folder):
        raise UserError(f"{out} exists already; delete it or choose another --out.")
    if _kind(out) == ".png":
        return
    if _kind(out) in OTHER_FILES:
        raise UserError(
            f"{out}: images are written as FILE.png, FILE.npz, or a folder of PNGs, which does not "
            f"end in {out.suffix}."
        )
    if config.data.latents and config.data.vae is None:
        raise UserError(
            f"{out} is to hold pictures, and this run generates latents; its data.vae is not set. "
            "--out FILE.png writes the latents themselves, as FILE.npy."
        )


def _write(images: ImageParts, rows: Tensor, labels: Tensor | None, out: Path) -> Path:
    if _kind(out) == ".png":
        return save_images(images.images(), rows, out)
    classes = None if labels is None else labels.numpy()
    if _kind(out) == ".npz":
        write_archive(images, classes, out)
    else:
        write_pictures(images, classes, out)
    return out
