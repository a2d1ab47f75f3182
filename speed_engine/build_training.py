"""What a run trains with, made from its configuration: the engine, and the batches it is given."""

from collections.abc import Generator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from speed_engine.build import (
    build_cleaning,
    build_model,
    build_objective,
    condition_shapes,
    open_data,
    stored_shape,
)
from speed_engine.config import TrainConfig
from speed_engine.data.batch import Batch
from speed_engine.data.loading.device import on_device
from speed_engine.data.loading.loader import Loader
from speed_engine.data.loading.order import Feed
from speed_engine.data.loading.resident import Resident, resident_bytes
from speed_engine.diffusion.method import Method
from speed_engine.models.layers.blocks import compile_each, compiled, compiled_blocks
from speed_engine.models.layouts.files import load_pretrained
from speed_engine.runtime.machine import Choices
from speed_engine.runtime.sharding import blocks, distribute
from speed_engine.runtime.world import World
from speed_engine.training.ema import Ema
from speed_engine.training.engine import Engine
from speed_engine.training.optimizers import MOMENTUM_DECAYS, adamw, linear_warmup, one_sweep
from speed_engine.training.shadow import ShadowedModel


class TrainingData:
    """The shards of a run, and batches of clean images of them on the device.

    Raises:
        UserError: the data set is damaged, or does not fit the configuration.
    """

    def __init__(self, config: TrainConfig, world: World, device: torch.device) -> None:
        self.config, self.world, self.device = config, world, device
        self.source, self.reader = config.data.source, open_data(config)
        self.stored_shape = stored_shape(config, self.reader)
        self._loader(start=0).close()  # an unfit data set fails here
        self.cleaning = build_cleaning(config, self.reader, device)
        self.num_bytes = resident_bytes(self.reader, self.stored_shape)

    def batches(self, start: int, resident: bool) -> Generator[Batch]:
        """This process's, endlessly.

        Args:
            start: images consumed before, by all processes.
            resident: whether all images are kept on the device.
        """
        if resident:
            yield from Resident(
                self.reader,
                self.stored_shape,
                self._feed(start),
                self.cleaning,
                num_classes=self.config.data.num_classes,
                on_bad_sample=self.config.data.on_bad_sample,
            )
        else:
            with self._loader(start) as loader:
                yield from map(self.cleaning.batch, on_device(loader, self.device))

    def _feed(self, start: int) -> Feed:
        config, world = self.config, self.world
        return Feed(
            config.batch_size, config.seed, start, world.rank, world.size, config.data.window
        )

    def _loader(self, start: int) -> Loader:
        data = self.config.data
        return Loader(
            self.reader,
            self.stored_shape,
            self._feed(start),
            workers=data.workers,
            num_classes=data.num_classes,
            condition_shapes=condition_shapes(self.config),
            on_bad_sample=data.on_bad_sample,
            mode=data.mode,
        )


def build_engine(
    config: TrainConfig,
    process: Method,
    choices: Choices,
    world: World,
    device: torch.device,
    init_from: Path | None,
) -> Engine:
    """Model, objective and optimizer on the device, laid out over the processes.

    Args:
        config: of the run.
        process: its method.
        choices: as ``environment.choices`` gives them.
        world: the processes that train together.
        device: of this one.
        init_from: weights to start from; None initialises from the seed.

    Raises:
        UserError: an option does not fit another, or the weights are another model's.
    """
    model, ema, forward, shadows = _build_model(config, choices, world, device, init_from)
    settings = config.optimizer
    warmup = linear_warmup(settings.learning_rate, settings.warmup_steps)
    decay = settings.momentum_decay or process.momentum_decay
    momentum = MOMENTUM_DECAYS[decay](settings.beta1, config.steps)
    store_noise = choices.noise.value == "stored"
    objective = build_objective(config, process, model, store_noise).to(device)
    separate = choices.update.value == "separate"
    make_optimizer = adamw if separate else partial(one_sweep, shadows=shadows)
    return Engine(
        model,
        objective,
        make_optimizer(
            model,
            learning_rate=settings.learning_rate,
            beta1=settings.beta1,
            beta2=settings.beta2,
            weight_decay=settings.weight_decay,
            loss=objective,
            loss_learning_rate=process.batch_loss.learning_rate,
        ),
        ema,
        learning_rate=lambda step: warmup(step) * momentum.compensation(step),
        beta1=momentum.beta1,
        grad_clip=settings.grad_clip,
        forward=forward,
        microbatch_size=config.microbatch_size,
        world=world,
        seed=config.seed,
    )


def _build_model(
    config: TrainConfig,
    choices: Choices,
    world: World,
    device: torch.device,
    init_from: Path | None,
) -> tuple[torch.nn.Module, Ema, Any, dict[Tensor, Tensor]]:
    """The model, its average, what is called in its place, and the copies that this computes
    with; laid out over the processes.
    """
    model = build_model(config, choices.attention.value).to(device)
    if init_from is not None:
        load_pretrained(model, init_from)
    ema = Ema(model, config.optimizer.ema_decay)
    how = choices.compile.value
    if world.size == 1:
        if choices.update.value == "one_sweep_bf16":
            shadowed = ShadowedModel(compiled_blocks(model) if how == "blocks" else model)
            forward = torch.compile(shadowed) if how == "on" else shadowed
            return model, ema, forward, shadowed.shadows
        return model, ema, compiled(model, how), {}
    if how != "off":  # the gathering of parameters between blocks cannot be compiled
        compile_each(blocks(model))
    for laid_out in (model, ema.model):
        distribute(
            laid_out,
            world,
            choices.parallel.value,
            device.type,
            reshard_after_forward=config.reshard,
            offload=config.offload,
        )
    ema.follow(model)
    return model, ema, model, {}
