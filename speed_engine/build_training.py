"""What a run trains with, made from its configuration: the engine, and the batches it is given."""

from collections.abc import Generator
from pathlib import Path
from typing import Any

import torch

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
from speed_engine.data.facts import refuse_unlike, refuse_unlike_values
from speed_engine.data.loading.device import on_device
from speed_engine.data.loading.loader import Loader
from speed_engine.data.loading.order import Feed
from speed_engine.data.loading.resident import Resident, resident_bytes
from speed_engine.diffusion.method import Method
from speed_engine.models.layers.blocks import compile_each, compiled
from speed_engine.models.layouts.files import load_pretrained
from speed_engine.runtime.checks import UserError
from speed_engine.runtime.machine import Choices
from speed_engine.runtime.sharding import blocks, distribute
from speed_engine.runtime.world import World
from speed_engine.training.ema import EMA, Ema, decay_of, warming_up
from speed_engine.training.engine import Engine
from speed_engine.training.one_sweep import OneSweep
from speed_engine.training.optimizers import (
    MOMENTUM_DECAYS,
    OPTIMIZERS,
    Hyperparameters,
    linear_warmup,
)
from speed_engine.training.update import Update

UPDATES: dict[str, type[Update]] = {"separate": Update, "one_sweep": OneSweep}


class TrainingData:
    """The shards of a run, and batches of clean images of them on the device.

    Raises:
        UserError: the data set is damaged, or does not fit the configuration.
    """

    def __init__(self, config: TrainConfig, world: World, device: torch.device) -> None:
        self.config, self.world, self.device = config, world, device
        self.source, self.reader = config.data.source, open_data(config)
        refuse_unlike(config.data, self.reader.dataset)
        self.stored_shape = stored_shape(config, self.reader)
        refuse_unlike_values(config.data, self.reader, self.stored_shape)
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
        choices: of the machine.
        world: the processes that train together.
        device: of this one.
        init_from: weights to start from; None initialises from the seed.

    Raises:
        UserError: an option does not fit another, or the weights are another model's.
    """
    model, averages, forward = _build_model(config, choices, world, device, init_from)
    store_noise = choices.noise.value == "stored"
    objective = build_objective(config, process, model, store_noise).to(device)
    settings = config.optimizer
    if settings.name not in OPTIMIZERS:
        known = ", ".join(OPTIMIZERS)
        raise UserError(f"optimizer.name={settings.name!r} is unknown; choose from {known}.")
    optimizers = OPTIMIZERS[settings.name](
        model,
        objective,
        Hyperparameters(
            learning_rate=settings.learning_rate,
            beta1=settings.beta1,
            beta2=settings.beta2,
            weight_decay=settings.weight_decay,
            loss_learning_rate=process.batch_loss.learning_rate,
        ),
    )
    warmup = linear_warmup(settings.learning_rate, settings.warmup_steps)
    decay = settings.momentum_decay or process.momentum_decay
    momentum = MOMENTUM_DECAYS[decay](settings.beta1, config.steps)
    update = UPDATES[choices.update.value](
        model,
        objective,
        optimizers,
        averages,
        learning_rate=lambda step: warmup(step) * momentum.compensation(step),
        beta1=momentum.beta1,
        grad_clip=settings.grad_clip,
    )
    return Engine(
        model,
        objective,
        update,
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
) -> tuple[torch.nn.Module, dict[str, Ema], Any]:
    """The model, its averages by name, and what is called in its place; laid out over the
    processes.
    """
    settings = config.optimizer
    decays = {EMA: warming_up(settings.ema_decay)}
    decays |= {name: decay_of(name) for name in settings.averages}
    model = build_model(config, choices.attention.value).to(device)
    if init_from is not None:
        load_pretrained(model, init_from)
    averages = {name: Ema(model, decay) for name, decay in decays.items()}
    how, generating = choices.compile.value, choices.generation.value
    if world.size == 1:
        compiled(averages[EMA].model, generating)
        return model, averages, compiled(model, how)
    # The gathering of parameters between blocks cannot be compiled.
    for called, chosen in ((model, how), (averages[EMA].model, generating)):
        if chosen != "off":
            compile_each(blocks(called))
    for laid_out in (model, *(average.model for average in averages.values())):
        distribute(
            laid_out,
            world,
            choices.parallel.value,
            device.type,
            reshard_after_forward=config.reshard,
            offload=config.offload,
        )
    for average in averages.values():
        average.follow(model)
    return model, averages, model
