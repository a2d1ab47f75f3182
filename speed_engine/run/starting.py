"""Start a run, or continue it.

Several processes, started by torchrun, train one run together; the first one writes.
"""

import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from torch import nn

from speed_engine.build import (
    build_engine,
    build_evaluator,
    build_model,
    build_process,
    settle_operators,
    spelled,
    training_inputs,
)
from speed_engine.config import TrainConfig, flat, to_json
from speed_engine.data.format.remote import is_url
from speed_engine.data.training_data import TrainingData
from speed_engine.evaluation.conditions import class_names
from speed_engine.models.layouts.files import load_parameters, load_pretrained, require_shift
from speed_engine.planning.gpus import gpu_called
from speed_engine.planning.launching import launching
from speed_engine.planning.memory import STATE_BYTES, fitting_images, kept_on_gpu
from speed_engine.run import changes
from speed_engine.run.folder import CONFIG_FILE, newest_checkpoint, of_newest, read_config
from speed_engine.runtime import machine
from speed_engine.runtime.checks import UserError, shortened
from speed_engine.runtime.determinism import deterministic
from speed_engine.runtime.files import write_durably
from speed_engine.runtime.locks import held
from speed_engine.runtime.loggers import check_loggers, open_loggers
from speed_engine.runtime.memory import keep_freed_memory
from speed_engine.runtime.progress import announced
from speed_engine.runtime.sharding import LAYOUTS
from speed_engine.runtime.world import ALONE, World, join
from speed_engine.training import checkpoint
from speed_engine.training.checkpoint import CHECKPOINTS, EMA_FILE
from speed_engine.training.ema import EMA, average_group
from speed_engine.training.trainer import Loop, Trainer

log = logging.getLogger(__name__)
_training = partial(held, doing="trained")  # two would overwrite each other's checkpoints


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
            with _nothing_left_of_a_failed_start(trainer), _training(folder, world=trainer.world):
                trainer.train()


@contextmanager
def _nothing_left_of_a_failed_start(trainer: Trainer) -> Iterator[None]:
    """The folder of a run that fails in its first step is removed: there is nothing to resume."""
    try:
        yield
    except Exception:
        if trainer.world.is_first and trainer.engine.steps_done == 0:
            shutil.rmtree(trainer.folder, ignore_errors=True)
        raise


def _begun(config: TrainConfig, folder: Path, console: Console) -> Trainer | None:
    """The trainer at its first step, or where it was before a restart; None if it was complete."""
    world = join(machine.torch_device(config.device).type)
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    if world.from_first(folder.exists):
        if restarted and world.from_first((folder / EMA_FILE).exists):
            if world.is_first:  # a process died on its way out
                console.print(
                    f"{folder} was complete before the restart.", markup=False, emoji=False
                )
            return None
        if restarted and world.from_first(lambda: (folder / CONFIG_FILE).exists()):
            return _continued(read_config(folder), folder, console, world)
        if world.from_first(lambda: not (folder / CONFIG_FILE).exists()):
            raise UserError(f"{folder} exists and is no run; name another folder with --run.")
        raise UserError(
            f"{folder} exists already; continue it with `speed-engine train --resume {folder}`, "
            "which takes changed options, or name another folder with --run."
        )
    config = _with_absolute_paths(config)
    trainer, config = build_trainer(config, folder, console, world, config.init_from)
    if world.is_first:
        text = to_json(config)
        folder.mkdir(parents=True)
        try:
            write_durably(folder / CONFIG_FILE, text.encode())
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
    return trainer


def resume(
    folder: Path,
    console: Console,
    steps: int | None = None,
    *,
    changed: TrainConfig | None = None,
) -> None:
    """Continue a run from its newest complete checkpoint, or from its start if there is none yet.

    Args:
        folder: of the run.
        console: what the first process prints to.
        steps: optimizer steps of the whole run; by default those it was started with.
        changed: the configuration to continue with; by default that of the run.

    Raises:
        UserError: the folder is not a run, its checkpoint is of another model or other data, the
            changed configuration is of another run, or there is nothing left to do.
    """
    before = _with_absolute_paths(read_config(folder))
    config = before if changed is None else _with_absolute_paths(changed)
    if steps is not None:
        config = replace(config, steps=steps)
    changed_options = changes.between(before, config)
    changes.refuse_another_run(changed_options, folder)
    with deterministic(config.deterministic):
        world = join(machine.torch_device(config.device).type)
        with _training(folder, world=world):
            trainer = _continued(config, folder, console, world)
            if changed_options and world.is_first:
                changes.record(changed_options, folder, trainer.engine.steps_done)
            trainer.train()


def _with_absolute_paths(config: TrainConfig) -> TrainConfig:
    """What a run reads, wherever it is resumed from."""
    data, evaluation = config.data, config.evaluation
    vae, clip = data.vae, evaluation.clip_model
    return replace(
        config,
        init_from=_absolute(config.init_from),
        data=replace(
            data,
            source=_absolute_source(data.source),
            test_source=data.test_source and _absolute_source(data.test_source),
            exclude=_absolute(data.exclude),
            vae=_folder_or_hub(vae),
        ),
        evaluation=replace(
            evaluation,
            inception_weights=_absolute(evaluation.inception_weights),
            dinov2_weights=_absolute(evaluation.dinov2_weights),
            clip_model=_folder_or_hub(clip),
            reference=evaluation.reference and _absolute_source(evaluation.reference),
        ),
    )


def _absolute_source(source: str) -> str:
    return source if source == "digits" or is_url(source) else str(_absolute(Path(source)))


def _absolute(path: Path | None) -> Path | None:
    return None if path is None else path.expanduser().absolute()


def _folder_or_hub(name: str | None) -> str | None:
    return str(_absolute(Path(name))) if name and Path(name).expanduser().exists() else name


def _continued(config: TrainConfig, folder: Path, console: Console, world: World) -> Trainer:
    """The trainer from the newest complete checkpoint, or from the start if there is none yet."""
    saved = world.from_first(lambda: any((folder / CHECKPOINTS).glob("step-*")))
    if not saved and world.from_first((folder / EMA_FILE).exists):
        raise UserError(f"{folder} is complete, and its checkpoints are gone; start a new run.")
    init_from = None if saved else config.init_from
    if config.compile == "graphs" and (
        world.size > 1 or machine.choose_device(config.device).value != "cuda"
    ):
        config = replace(config, compile="auto")
        if world.is_first:
            console.print("CUDA graphs are of one process on a GPU; the step is compiled as usual.")
    trainer, config = build_trainer(config, folder, console, world, init_from, resumed=True)
    if not saved and world.is_first:
        console.print(
            f"{folder} has no checkpoint yet; training from its start.", markup=False, emoji=False
        )
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
        launching=_launching(config, world),
    )


def _launching(config: TrainConfig, world: World) -> machine.Launching | None:
    """Of a step on this machine, where it decides how the model is compiled."""
    on_gpu = machine.choose_device(config.device).value == "cuda"
    if config.compile != "auto" or world.size > 1 or not on_gpu:
        return None
    gpu = gpu_called(torch.cuda.get_device_name())
    if gpu is None:
        return None
    with torch.device("meta"):
        model = build_model(config)
        return launching(config, model, training_inputs(model, config, 1), gpu)


def build_trainer(
    config: TrainConfig,
    folder: Path,
    console: Console,
    world: World = ALONE,
    init_from: Path | None = None,
    *,
    resumed: bool = False,
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
        resumed: whether it was begun before, so that CUDA graphs that cannot go on are given up.

    Raises:
        UserError: an option does not fit another, the machine, or the data.
    """
    _check_name(folder)
    check_loggers(config.logger)
    keep_freed_memory()
    device = machine.torch_device(config.device, world)
    with announced("opening the data set"):
        data = TrainingData(config.data, config.batch_size, config.seed, world, device)
    with announced("trying kernels and attention on this device"):
        settle_operators(config, config.kernels, device, world)
    choices = machine_choices(config, world, data.num_bytes)
    process = build_process(config)
    with announced("reading the real images that generated ones are compared with"):
        evaluator = build_evaluator(config, process, world)
    if device.type == "cuda" and config.microbatch_size is None:
        resident = data.num_bytes if choices.resident.value == "on" else 0
        fits = images_that_fit(config, choices, resident, world)
        if resumed and fits is not None and config.compile == "graphs":
            config = replace(config, compile="blocks")
            console.print(
                "CUDA graphs take all images of a step at once, for which too little of the GPU's "
                "memory is free; the step is compiled by blocks."
            )
        config = replace(config, microbatch_size=fits)
        choices = machine_choices(config, world, data.num_bytes)  # graphs take all images at once
    with announced("making the model"):
        model = build_model(config, choices.attention.value).to(device)
    if init_from is not None:
        _load_weights(model, init_from, world)
    engine = build_engine(config, process, model, choices, world, device)
    where = choices.device.value
    if world.size > 1:
        where = f"{world.size} x {where}, {choices.parallel.value}"
    names = class_names(config.data) if "cls" in config.data.members else []
    classes = f", {len(names)} classes: {shortened(', '.join(names))}" if len(names) > 1 else ""
    parameters = sum(p.numel() for p in engine.model.parameters())
    how = choices.compile.value
    compiling = {
        "compile": f"{how}; the first steps compile, which takes seconds to minutes and is kept"
    }
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
            "data": f"{len(data.reader):,} images of shape {config.data.image_shape}{classes}",
            "model": f"{parameters:,} parameters on {where}",
            "method": spelled(config),
            "features": evaluator.extractor.describe() if evaluator.extractor else "none",
            **(compiling if how != "off" else {}),
        },
        open_loggers=partial(open_loggers, config.logger, folder, flat(config)),
    )
    resolved = replace(config, compile=choices.compile.value, attention=choices.attention.value)
    return trainer, resolved


def images_that_fit(
    config: TrainConfig, choices: machine.Choices, resident: int, world: World = ALONE
) -> int | None:
    """The images that go through the model at a time so that the GPU's memory is enough, by an
    estimate; None if all of a step do.

    Args:
        config: of the run.
        choices: what the machine decides.
        resident: bytes of the data that will be kept on the GPU.
        world: the processes that train together.
    """
    images = -(-config.batch_size // world.size)
    shards = LAYOUTS[choices.parallel.value](world)[1] if world.size > 1 else 1

    def fitting() -> int:
        with torch.device("meta"):
            model = build_model(config)
        parameters = sum(p.numel() for p in model.parameters())
        kept = kept_on_gpu(model, lambda images: training_inputs(model, config, images))
        state = (STATE_BYTES + 4 * len(config.optimizer.averages)) * parameters / shards
        state *= not (config.offload and world.size > 1)  # then it is in the host's memory
        free, _ = torch.cuda.mem_get_info()
        return fitting_images(kept, state, images, free - resident)

    with announced("counting the memory of a step"):
        fits = world.from_first(fitting)
    if fits == images:
        return None
    if world.is_first:
        log.info(
            "of %d images, %d go through the model at a time, since all at once would not fit the "
            "GPU's memory, by an estimate; --microbatch-size decides otherwise",
            images,
            fits,
        )
    return fits


def _load_weights(model: nn.Module, path: Path, world: World = ALONE) -> None:
    """Of a file, or of a run: the EMA of one that is not complete is in its newest checkpoint."""
    is_whole = not (path / CHECKPOINTS).is_dir() or (path / EMA_FILE).is_file()
    if world.from_first(lambda: is_whole):
        load_pretrained(model, path)
        return

    require_shift(model, read_config(path).model)

    def read(newest: Path) -> None:
        load_parameters(model, checkpoint.load_group(newest, average_group(EMA)), newest)

    if world.size == 1:
        of_newest(path, read)
    else:  # the run may save meanwhile, and all processes need the same
        read(Path(world.from_first(lambda: str(newest_checkpoint(path)))))


def _check_name(folder: Path) -> None:
    try:
        str(folder).encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"the run's folder {folder} has a name that is no Unicode, which TensorBoard's curves "
            "need; choose another with --run, or rename it."
        ) from error
