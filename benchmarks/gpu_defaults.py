"""What the defaults on a GPU rest on, where a count decided before anything was measured."""

import gc
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from gpu_first import GPU, engine_of
from gpu_rows import Rows
from gpu_xl import forget, profiled, timed_steps
from speed_engine.build import build_objective, build_process
from speed_engine.config import TrainConfig
from speed_engine.models import edm_unet, unet
from speed_engine.models.config import EdmUNetConfig, MDTConfig, UNetConfig
from speed_engine.models.layers import unet_layers
from speed_engine.planning.cost import estimate
from speed_engine.planning.gpus import GPUS
from speed_engine.planning.memory import fitting_images
from speed_engine.presets import PRESETS
from train_cases import gpu_cases, synthetic_batch

# of images, and of the weights of convolutions
LAYOUTS = {
    "channels last": (unet_layers.laid_out, None),
    "channels last, weights, too": (unet_layers.laid_out, torch.channels_last),
    "contiguous": (lambda x: x, None),
}
DIGITS = PRESETS["digits"][1]
# A small network of every family; those with dropout draw it inside the graphs.
FAMILIES = {
    "MDT": replace(DIGITS, model=MDTConfig()),
    "EDM": replace(
        DIGITS, schedule="edm", condition_dropout=0.0,
        evaluation=PRESETS["cifar10-edm"][1].evaluation,
        model=EdmUNetConfig(model_channels=16, dropout=0.1),
    ),
    "U-Net": replace(
        DIGITS,
        model=UNetConfig(
            model_channels=32, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(2,),
            num_head_channels=16, dropout=0.1,
        ),
    ),
}  # fmt: skip
NOISED = {"latents": (256, 4, 32, 32), "pixels": (128, 3, 256, 256)}


def measure(rows: Rows) -> None:
    """What no GPU has measured yet comes first."""
    mdt, emoji = PRESETS["imagenet256-mdt-s2"][1], PRESETS["emoji32-unet"][1]
    rows.row("MDT-S/2", 40, partial(ways, mdt, ("blocks",)))
    rows.row("graphs of MDT-S/2", 60, partial(ways, mdt, ("blocks", "graphs")))
    for name, config in FAMILIES.items():
        rows.row(f"graphs of a small {name}", 40, partial(ways, config, ("on", "graphs")))
    rows.row("memory", 40, memory)
    rows.row("U-Nets by layout", 60, unets)
    rows.row("noise", 10, noise)
    rows.row("graphs of digits", 30, partial(ways, DIGITS, ("blocks", "on", "graphs")))
    rows.row("emoji32-unet", 150, partial(ways, emoji, ("off", "graphs", "blocks")))


def memory() -> dict[str, Any]:
    """What a step is estimated to hold, beside the allocator's peak in three steps.

    As a GPU of 80 GB would take it, in so many images at a time; U-Nets eager. What compiling
    leaves behind in the first step is collected before.
    """
    cases = {name: gpu_cases()[name] for name in ("DiT-XL/2", "DiT-S/2")}
    room = min(GPUS["h100"].memory, torch.cuda.mem_get_info()[0])
    found: dict[str, Any] = {}
    for name, config in (cases | unet_cases()).items():
        cost = estimate(config)
        images = fitting_images(cost.kept, cost.state_bytes, config.batch_size, room)
        engine = engine_of(config, "blocks" if name in cases else "off")
        engine.microbatch_size = images
        batch = synthetic_batch(config, GPU)
        engine.step(batch)
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        for _ in range(3):
            engine.step(batch)
        found[name] = {
            "estimated_gb": _gigabytes(
                cost.state_bytes + cost.kept.weights + images * cost.kept.per_image
            ),
            "measured_gb": _gigabytes(torch.cuda.max_memory_allocated()),
            "microbatch": images,
        }
        del engine, batch
        forget()
    return found


def unets() -> dict[str, Any]:
    """The device's own time of a step with either layout of images, and its dearest kernels.

    Eager, since a U-Net's many blocks take minutes to compile. By the profiler, since the host
    holds the step up: ``host`` shows how far.
    """
    found: dict[str, Any] = {}
    for name, config in unet_cases().items():
        batch = synthetic_batch(config, GPU)
        found[name] = {}
        for layout, (laid_out, order) in LAYOUTS.items():
            torch.cuda.reset_peak_memory_stats()
            engine = engine_of(config, "off", memory_format=order)
            step = partial(engine.step, batch)
            with ExitStack() as stack:
                for module in (unet, edm_unet):
                    stack.enter_context(patch.object(module, "laid_out", laid_out))
                found[name][layout] = profiled(step, 12)
                found[name][layout]["host"] = timed_steps(step, 4)
            found[name][layout]["peak_gigabytes"] = _gigabytes(torch.cuda.max_memory_allocated())
            del engine, step
            forget()
    return found


def unet_cases() -> dict[str, TrainConfig]:
    """The paper's at its 256 images a step, EDM's at its 512."""
    return {name: PRESETS[name][1] for name in ("imagenet256-unet", "cifar10-edm")}


def noise() -> dict[str, Any]:
    """The device's own time of noising and loss, with the noise stored and drawn again.

    The network is one number, so that little else is computed.
    """
    found: dict[str, Any] = {}
    for name, shape in NOISED.items():
        config = replace(DIGITS, data=replace(DIGITS.data, image_shape=shape[1:]))
        batch = synthetic_batch(config, GPU, shape[0])
        network = _Number().to(GPU)
        for stored in (False, True):
            objective = build_objective(config, build_process(config), network, stored).to(GPU)

            def step(objective=objective, batch=batch, network=network) -> None:
                objective(network, batch.images, batch.conditions, batch.ids, 0).loss.backward()

            found[f"{name}: {'stored' if stored else 'drawn again'}"] = profiled(step, 8)
    return found


class _Number(nn.Module):
    """Its input, times a number."""

    def __init__(self) -> None:
        super().__init__()
        self.number = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, t: Tensor, **conditions: Tensor) -> Tensor:
        return self.number * x


def ways(config: TrainConfig, hows: Sequence[str]) -> dict[str, Any]:
    """Twenty equal steps by each way to compile, and how far parameters end from the last way's."""
    batch = synthetic_batch(config, GPU)
    found: dict[str, Any] = {}
    ends: dict[str, list[Tensor]] = {}
    for how in hows:
        torch.cuda.manual_seed(0)  # of the first parameters
        engine = engine_of(config, how)
        torch.cuda.reset_peak_memory_stats()
        begin = time.perf_counter()
        engine.step(batch)
        torch.cuda.synchronize()
        first = time.perf_counter() - begin
        for _ in range(3):
            engine.step(batch)
        found[how] = timed_steps(partial(engine.step, batch), 16) | {
            "loss": round(float(engine.step(batch).loss), 5),
            "first_step_seconds": round(first, 1),
            "peak_gigabytes": _gigabytes(torch.cuda.max_memory_allocated()),
        }
        ends[how] = [p.detach().clone() for p in engine.model.parameters()]
        del engine
        forget()
    last = ends[hows[-1]]
    for how in hows[:-1]:
        apart = [float((a - b).norm() / b.norm()) for a, b in zip(ends[how], last, strict=True)]
        found[how] |= {"tensors": len(last), "equal": apart.count(0.0), "farthest": max(apart)}
    return found


def _gigabytes(count: float) -> float:
    return round(count / 1e9, 2)
