"""What the benchmarks of the training step train: configurations, batches, engines, FLOPs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from speed_engine import ops
from speed_engine.build import build_model, build_objective, build_process
from speed_engine.config import TrainConfig
from speed_engine.data.batch import Batch
from speed_engine.models.config import DiTConfig
from speed_engine.planning.flops import forward_flops
from speed_engine.presets import PRESETS
from speed_engine.training.configured import build_averages, build_update
from speed_engine.training.engine import Engine

DITS = ("DiT-S/2", "DiT-B/2", "DiT-L/2", "DiT-XL/2")
CPU_BATCH = {"DiT-S/2": 8, "unet": 4}  # images of 32 x 32 x 4 per step on two cores


def gpu_cases() -> dict[str, TrainConfig]:
    """As published: learned variance, 256 images a step, latents of 32 x 32 x 4, 1000 classes."""
    dit, unet = PRESETS["imagenet256-dit-xl2"][1], PRESETS["imagenet256-unet"][1]
    sized = {size: replace(dit, model=DiTConfig(size=size, learn_sigma=True)) for size in DITS}
    return {**sized, "unet": unet}


def cpu_cases() -> dict[str, TrainConfig]:
    """Without a learned variance, which diffusers' loop does not train."""
    cases = gpu_cases()
    plain = {
        name: replace(
            cases[name], batch_size=size, model=replace(cases[name].model, learn_sigma=False)
        )
        for name, size in CPU_BATCH.items()
    }
    return {"digits": PRESETS["digits"][1], "cifar16": PRESETS["cifar16"][1], **plain}


def tiny(config: TrainConfig) -> TrainConfig:
    """The same kind of model, small enough to prove a script by."""
    model = config.model
    small: dict[str, Any] = {"size": None, "learn_sigma": model.learn_sigma}
    if isinstance(model, DiTConfig):
        small |= {"dim": 32, "depth": 1, "num_heads": 2}
    channels = config.data.image_shape[0]
    data = replace(config.data, image_shape=(channels, 8, 8))
    return replace(config, batch_size=4, model=type(model)(**small), data=data)


def synthetic_batch(config: TrainConfig, device: torch.device, size: int | None = None) -> Batch:
    """One batch of random images with their classes, on the device."""
    size = size or config.batch_size
    images = torch.rand(size, *config.data.image_shape, device=device) * 2 - 1
    counters = torch.arange(size, device=device)
    return Batch(images, {"labels": counters % config.data.num_classes}, counters)


def training_flops(model: nn.Module, inputs: dict[str, torch.Tensor]) -> float:
    """Of one image: three forward passes."""
    return 3.0 * forward_flops(model, inputs)


def model_inputs(config: TrainConfig) -> dict[str, torch.Tensor]:
    """Of our models, for one image."""
    long = torch.zeros(1, dtype=torch.int64)
    return {"x": torch.zeros(1, *config.data.image_shape), "t": torch.zeros(1), "labels": long}


def make_engine(
    config: TrainConfig,
    device: torch.device,
    *,
    forward: Callable[[Any], Any],
    update: str = "separate",
    memory_format: torch.memory_format | None = None,
) -> Engine:
    """The engine of a run, as ``Trainer`` builds it for one process.

    Args:
        config: of the run.
        device: to train on.
        forward: model -> what is called in its place.
        update: as ``optimizer.update``.
        memory_format: of the weights of convolutions.
    """
    with device:  # a large model is initialised faster there
        model = build_model(config)
    if memory_format is not None:
        model = model.to(memory_format=memory_format)  # pyright: ignore[reportCallIssue]
    objective = build_objective(config, build_process(config), model, device.type == "cpu")
    objective.to(device)
    updates = build_update(
        config.optimizer,
        model,
        objective,
        build_averages(config.optimizer, model),
        steps=config.steps,
        update=update,
        momentum_decay="none",
        loss_learning_rate=None,
    )
    return Engine(model, objective, updates, forward=forward(model))


@contextmanager
def kernels(wanted: bool) -> Iterator[None]:
    """Run operators by their kernels where they run, or by their definitions in PyTorch.

    The random bits always run by their kernel: they are of the engine, not of what is compared.
    """
    before = ops.kernels_on(torch.device("cuda"))
    if not wanted:
        ops.use_kernels(ops.NO_KERNELS._replace(random=before.random))
    try:
        yield
    finally:
        ops.use_kernels(before)
