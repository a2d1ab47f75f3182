"""The providers of the training step: the engine, eager and compiled, and diffusers' loop."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

import diffusers_step
from speed_engine.config import TrainConfig
from speed_engine.models.layers.blocks import compiled
from speed_engine.runtime.memory import keep_freed_memory
from speed_engine.training.engine import Engine
from train_cases import make_engine, synthetic_batch

Step = Callable[[], object]
HOW = {"eager": "off", "compiled": "on"}  # of torch.compile
CPU_PROVIDERS = ("eager", "eager, memory kept", "compiled", "compiled, Muon", "diffusers")


def engine_of(name: str, config: TrainConfig, device: torch.device) -> Engine:
    """The engine of a run; name is a key of ``HOW``."""
    return make_engine(config, device, forward=partial(compiled, how=HOW[name]))


def cpu_provider(name: str, config: TrainConfig) -> Step:
    """One of ``CPU_PROVIDERS``, for a process of its own; all float32.

    The trainer keeps freed memory, eager or compiled; ``eager`` and ``diffusers`` are PyTorch as
    it comes. All but one update by AdamW.
    """
    device = torch.device("cpu")
    batch = synthetic_batch(config, device)
    if name == "diffusers":
        return diffusers_step.step_on(config, device, batch)
    how, _, rest = name.partition(", ")
    if name != "eager":
        keep_freed_memory()
    if rest == "Muon":
        config = replace(config, optimizer=replace(config.optimizer, name="muon"))
    return partial(engine_of(how, config, device).step, batch)
