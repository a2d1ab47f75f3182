"""A run and its folder: start it, continue it, and read what it left.

RUN/config.json         resolved configuration; what ``--resume`` reads
RUN/environment.json    versions, hardware, command
RUN/metrics.jsonl       records; RUN/tensorboard the same
RUN/checkpoints/        see training/checkpoint.py
RUN/samples/            images of the averaged model, one row per class, as PNG; latents as npy
RUN/ema.safetensors     the averaged model, once the run is complete

Several processes, started by torchrun, train one run together; the first one writes.
"""

import os
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn

from speed_engine.build import (
    attention_shapes,
    build_engine,
    build_evaluator,
    build_model,
    build_process,
)
from speed_engine.config import TrainConfig, from_json, to_json
from speed_engine.data.training_data import TrainingData
from speed_engine.models.layouts.files import load_pretrained
from speed_engine.runtime import machine
from speed_engine.runtime.attention_check import settle_attention
from speed_engine.runtime.checks import UserError, require_shapes
from speed_engine.runtime.determinism import deterministic
from speed_engine.runtime.files import write_durably
from speed_engine.runtime.kernels import settle_kernels
from speed_engine.runtime.memory import keep_freed_memory
from speed_engine.runtime.sharding import COMPUTE_DTYPES
from speed_engine.runtime.world import ALONE, World, join
from speed_engine.training import checkpoint
from speed_engine.training.ema import EMA, average_group
from speed_engine.training.trainer import CHECKPOINTS, EMA_FILE, Loop, Trainer

CONFIG_FILE = "config.json"


def start(config: TrainConfig, folder: Path, console: Console) -> None:
    """Train a new run; torchrun restarting its processes continues the one that it started.

    Args:
        config: of the run.
        folder: of the run; must not exist.
        console: what the first process prints to.

    Raises:
        UserError: the folder exists, or the configuration does not fit the data.
    """
    with deterministic(config.deterministic):
        trainer = _begun(config, folder, console)
        if trainer is not None:
            trainer.train()


def _begun(config: TrainConfig, folder: Path, console: Console) -> Trainer | None:
    """The trainer at its first step, or where it was before a restart; None if it was complete."""
    world = join(machine.torch_device(config.device).type)
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    if world.from_first(folder.exists):
        if restarted and world.from_first((folder / EMA_FILE).exists):
            if world.is_first:  # a process died on its way out
                console.print(f"{folder} was complete before the restart.", markup=False)
            return None
        if restarted and world.from_first(lambda: (folder / CONFIG_FILE).exists()):
            return _continued(read_config(folder), folder, console, world)
        raise UserError(
            f"{folder} exists already; continue it with `speed-engine train --resume {folder}`, "
            "or name another folder with --run."
        )
    trainer, config = build_trainer(config, folder, console, world, config.init_from)
    if world.is_first:
        text = to_json(config)
        folder.mkdir(parents=True)
        write_durably(folder / CONFIG_FILE, text.encode())
    return trainer


def resume(folder: Path, console: Console, steps: int | None = None) -> None:
    """Continue a run from its newest complete checkpoint, or from its start if there is none yet.

    Args:
        folder: of the run.
        console: what the first process prints to.
        steps: optimizer steps of the whole run; by default those it was started with.

    Raises:
        UserError: the folder is not a run, its checkpoint is of another model or other data, or
            there is nothing left to do.
    """
    config = read_config(folder)
    if steps is not None:
        config = replace(config, steps=steps)
    with deterministic(config.deterministic):
        world = join(machine.torch_device(config.device).type)
        _continued(config, folder, console, world).train()


def _continued(config: TrainConfig, folder: Path, console: Console, world: World) -> Trainer:
    """The trainer from the newest complete checkpoint, or from the start if there is none yet."""
    saved = world.from_first(lambda: any((folder / CHECKPOINTS).glob("step-*")))
    if not saved and world.from_first((folder / EMA_FILE).exists):
        raise UserError(f"{folder} is complete, and its checkpoints are gone; start a new run.")
    init_from = None if saved else config.init_from
    trainer, _ = build_trainer(config, folder, console, world, init_from)
    if not saved and world.is_first:
        console.print(f"{folder} has no checkpoint yet; training from its start.", markup=False)
    if saved:
        trainer.load(Path(world.from_first(lambda: str(newest_checkpoint(folder)))))
    if world.is_first:
        write_durably(folder / CONFIG_FILE, to_json(config).encode())
    return trainer


def machine_choices(
    config: TrainConfig, world: World = ALONE, num_bytes: int | None = None
) -> machine.Choices:
    """What the machine decides of a run; ``num_bytes`` of its data set, if known."""
    return machine.choose(
        device=config.device,
        steps=config.steps,
        compile=config.compile,
        attention=config.attention,
        kernels=config.kernels,
        parallel=config.parallel,
        update=config.optimizer.update,
        resident=config.data.resident,
        data_mode=config.data.mode,
        workers=config.data.workers,
        world=world,
        num_bytes=num_bytes,
    )


def build_trainer(
    config: TrainConfig,
    folder: Path,
    console: Console,
    world: World = ALONE,
    init_from: Path | None = None,
) -> tuple[Trainer, TrainConfig]:
    """The trainer of a run, and the configuration with the choices that were left open.

    Everything is built and checked before anything is written. The choices belong on record: others
    round differently, and a resumed run must not.

    Args:
        config: of the run.
        folder: of the run.
        console: what the first process prints to.
        world: the processes that train together.
        init_from: weights to start from; None initialises from the seed.

    Raises:
        UserError: an option does not fit another, the machine, or the data.
    """
    keep_freed_memory()
    device = machine.torch_device(config.device, world)
    data = TrainingData(config.data, config.batch_size, config.seed, world, device)
    settle_operators(config, config.kernels, device, world)
    choices = machine_choices(config, world, data.num_bytes)
    process = build_process(config)
    evaluator = build_evaluator(config, process, world)
    model = build_model(config, choices.attention.value).to(device)
    if init_from is not None:
        load_pretrained(model, init_from)
    engine = build_engine(config, process, model, choices, world, device)
    where = choices.device.value
    if world.size > 1:
        where = f"{world.size} x {where}, {choices.parallel.value}"
    parameters = sum(p.numel() for p in engine.model.parameters())
    trainer = Trainer(
        Loop(
            steps=config.steps,
            batch_size=config.batch_size,
            log_every=config.log_every,
            evaluate_every=config.evaluation.every,
            checkpoint_every=config.checkpoint_every,
            keep_checkpoints=config.keep_checkpoints,
            keep_every=config.keep_every,
            on_nonfinite=config.on_nonfinite,
            hang_timeout=config.hang_timeout,
            resident=choices.resident.value == "on",
        ),
        folder,
        engine,
        data,
        evaluator,
        device=device,
        world=world,
        console=console,
        introduction={
            "data": f"{len(data.reader):,} images of shape {config.data.image_shape}",
            "model": f"{parameters:,} parameters on {where}",
            "method": config.method,
            "features": evaluator.extractor.describe() if evaluator.extractor else "none",
        },
    )
    resolved = replace(config, compile=choices.compile.value, attention=choices.attention.value)
    return trainer, resolved


def settle_operators(
    config: TrainConfig, kernels: str, device: torch.device, world: World = ALONE
) -> None:
    """Choose what computes a model's operators and its attention, by trying them on a GPU.

    Args:
        config: of the model.
        kernels: ``auto``, ``on`` or ``off``.
        device: of this process.
        world: the processes of the run.

    Raises:
        UserError: kernels are demanded and fail, or attention does not run.
    """
    settle_kernels(kernels, device.type, world)
    if device.type == "cuda":
        dtype = COMPUTE_DTYPES[device.type]
        settle_attention(attention_shapes(config), device, dtype, quiet=not world.is_first)


def read_config(run: Path) -> TrainConfig:
    """The resolved configuration of a run.

    Raises:
        UserError: the folder is not a run, or what is wrong with its configuration.
    """
    path = run / CONFIG_FILE
    if not path.is_file():
        raise UserError(f"{run} is not a run folder: it has no {CONFIG_FILE}.")
    try:
        return from_json(path.read_bytes())
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def load_average(
    run: Path, config: TrainConfig, device: torch.device, name: str = EMA
) -> tuple[nn.Module, int]:
    """(averaged model, its step) from a run's newest complete checkpoint.

    Args:
        run: folder.
        config: of the run.
        device: of the model.
        name: of the average: ``ema``, or one of ``optimizer.averages``.

    Raises:
        UserError: there is no checkpoint, it belongs to another model, or lacks the average.
    """
    while True:
        path = newest_checkpoint(run)
        try:
            return load_average_of(path, config, device, name)
        except Exception:
            if path.exists():
                raise
            # Deleted while it was read, by a run that is training: it has newer ones.


def load_average_of(
    path: Path, config: TrainConfig, device: torch.device, name: str = EMA
) -> tuple[nn.Module, int]:
    """The same from one checkpoint, which must be complete.

    Raises:
        UserError: it belongs to another model, or lacks the average.
    """
    tensors = checkpoint.load_group(path, average_group(name))
    if not tensors:
        kept = ", ".join((EMA, *config.optimizer.averages))
        raise UserError(f"{path} holds no average {name!r}; this run keeps {kept}.")
    # What a run asked for where it was trained need not be there where it is used.
    settle_operators(config, "off" if config.kernels == "off" else "auto", device)
    model = build_model(config)
    load_parameters(model, tensors, path)
    step = checkpoint.read_state(path)["step"]
    return model.to(device).eval().requires_grad_(False), step


def newest_checkpoint(run: Path) -> Path:
    """Of a run.

    Raises:
        UserError: there is none.
    """
    try:
        return checkpoint.newest(run / CHECKPOINTS)
    except FileNotFoundError as error:
        raise UserError(str(error)) from error


def load_parameters(model: nn.Module, tensors: dict[str, Tensor], source: Path) -> None:
    """Strict load.

    Raises:
        UserError: names or shapes differ; lists them.
    """
    ours = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    require_shapes(ours, {name: tuple(v.shape) for name, v in tensors.items()}, source)
    model.load_state_dict(tensors)
