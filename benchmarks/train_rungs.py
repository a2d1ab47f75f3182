"""The rungs of the ladder, from the original step up, and the providers of a CPU.

A rung adds one thing to the rung below it. Each builds a call of one optimizer step.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn

import diffusers_step
from original_step import OriginalStep, stored_attention
from speed_engine.build import build_model
from speed_engine.config import TrainConfig
from speed_engine.data.batch import Batch
from speed_engine.models.config import DiTConfig, ModelConfig, UNetConfig
from speed_engine.models.layers.blocks import compiled
from speed_engine.runtime.memory import keep_freed_memory
from speed_engine.training.engine import Engine
from train_cases import kernels, make_engine, synthetic_batch

Step = Callable[[], object]


@dataclass(frozen=True, kw_only=True)
class Rung:
    """How the engine trains on this rung, or how the original step does."""

    engine: bool = True
    bfloat16: bool = True  # of the original step; the engine's is the device's
    stored_attention: bool = False
    how: str = "on"  # of torch.compile
    mode: str | None = None
    kernels: bool = True
    update: str = "separate"
    channels_last: bool = False
    fp8: bool = False
    family: Any = ModelConfig  # that it is for
    model: dict[str, Any] = field(default_factory=dict)  # options of its configuration

    def obstacle(self, config: TrainConfig) -> str | None:
        """Why this rung is left out; None where it is not."""
        if self.fp8 and importlib.util.find_spec("torchao") is None:
            return "torchao is not installed (the extra fp8)"
        if not isinstance(config.model, self.family):
            return f"it is for model family {self.family.family}"
        return None

    def build(self, config: TrainConfig, device: torch.device, batch: Batch) -> Step:
        """A call of one step on a batch."""
        known = {name: v for name, v in self.model.items() if hasattr(config.model, name)}
        config = replace(config, model=replace(config.model, **known))
        if not self.engine:
            return self._original(config, device, batch)
        engine = self.make_engine(config, device)
        return partial(_with_kernels, self.kernels, engine, batch)

    def make_engine(self, config: TrainConfig, device: torch.device) -> Engine:
        return make_engine(
            config,
            device,
            forward=self._forward,
            update=self.update,
            memory_format=torch.channels_last if self.channels_last else None,
        )

    def _forward(self, model: nn.Module) -> Any:
        if self.fp8:
            from torchao.float8 import (  # pyright: ignore[reportMissingImports]
                convert_to_float8_training,
            )

            convert_to_float8_training(model, module_filter_fn=_fits_fp8)
        if self.mode is not None:
            return torch.compile(model, mode=self.mode)
        return compiled(model, self.how)

    def _original(self, config: TrainConfig, device: torch.device, batch: Batch) -> Step:
        model = build_model(config).to(device)
        for module in model.modules():
            if self.stored_attention and hasattr(module, "attend"):
                module.attend = stored_attention  # pyright: ignore
        step = OriginalStep(model, config, self.bfloat16)
        return partial(_with_kernels, False, step, batch)


def _with_kernels(wanted: bool, step: Engine | OriginalStep, batch: Batch) -> None:
    with kernels(wanted):
        step.step(batch) if isinstance(step, Engine) else step(batch)


def _fits_fp8(module: nn.Module, name: str) -> bool:
    """Both widths multiples of 16, as the products need; tokens, not conditions."""
    return (
        isinstance(module, nn.Linear)
        and module.in_features % 16 == module.out_features % 16 == 0
        and name.startswith("blocks.")
        and "adaLN" not in name
    )


# The GPU's ladder. Kernels, one sweep and what follows keep everything below.
_TOP = Rung(update="one_sweep", model={"residual_dtype": "bfloat16"})
LADDER: dict[str, Rung] = {
    "original, TF32": Rung(engine=False, bfloat16=False, stored_attention=True),
    "+ bfloat16": Rung(engine=False, stored_attention=True),
    "+ SDPA": Rung(engine=False),
    "+ engine, no waiting": Rung(how="off", kernels=False),
    "+ torch.compile": Rung(kernels=False),
    "+ kernels": Rung(),
    "+ one sweep": Rung(update="one_sweep"),
    "+ bfloat16 stream": replace(_TOP, family=DiTConfig),
    "+ CUDA graphs": replace(_TOP, mode="reduce-overhead"),
    "+ channels last": Rung(
        channels_last=True, family=UNetConfig
    ),  # one sweep wants them contiguous
    "+ fp8": replace(_TOP, fp8=True, family=DiTConfig),
    "recomputing the cheap": replace(_TOP, model=_TOP.model | {"checkpointing": 0.5}),
    "recomputing all": replace(_TOP, model=_TOP.model | {"checkpointing": 1.0}),
}
ENGINE = {"eager": Rung(how="off"), "compiled": Rung()}


CPU_PROVIDERS = ("eager", "eager, memory kept", "compiled", "diffusers")


def cpu_provider(name: str, config: TrainConfig) -> Step:
    """One of ``CPU_PROVIDERS``, for a process of its own; all float32.

    The trainer keeps freed memory, eager or compiled; ``eager`` and ``diffusers`` are PyTorch as
    it comes.
    """
    device = torch.device("cpu")
    batch = synthetic_batch(config, device)
    if name == "diffusers":
        return diffusers_step.step_on(config, device, batch)
    if name != "eager":
        keep_freed_memory()
    return ENGINE[name.partition(",")[0]].build(config, device, batch)
