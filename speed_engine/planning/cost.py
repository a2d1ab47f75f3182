"""What a run will cost, from its configuration alone: nothing is allocated, no data are read.

    memory     parameters, gradients, AdamW's two moments and the average: float32, 20 bytes each,
               and 4 for every further average
    activation bytes that are kept for the backward pass, counted storage by storage
    step       at least  3 forward FLOPs / peak rate + 36 bytes per parameter / bandwidth;
               MDT goes forward twice, once under its mask

The backward pass takes twice the forward's FLOPs (gradients of inputs and of parameters); the
optimizer and the average read five and write four float32 per parameter in one sweep, and one each
for every further average.
"""

from dataclasses import dataclass, replace

import torch

from speed_engine.build import build_model, spelled, training_inputs
from speed_engine.config import TrainConfig
from speed_engine.data.opening import condition_names
from speed_engine.planning.flops import forward_flops
from speed_engine.planning.gpus import GPUS, Gpu, GpuName
from speed_engine.planning.launching import launching
from speed_engine.planning.memory import (
    STATE_BYTES,
    USED_SHARE,
    Kept,
    fitting_images,
    kept_on_gpu,
)
from speed_engine.runtime.choice import Choice
from speed_engine.runtime.machine import choose_compile
from speed_engine.training import muon

UPDATE_BYTES = 36  # per parameter: five values read, four written
MOMENT_BYTES = 4  # per parameter: what Muon does without
AVERAGE_BYTES = 4  # per parameter, of an average beside the first


@dataclass(frozen=True)
class Estimate:
    """Of one run on one device.

    Attributes:
        parameters: of the model.
        forward_flops: per image, of one pass.
        training_flops: per image, of every forward pass of a step and its backward pass.
        kept: on a GPU, under bfloat16 autocast and with our kernels.
        batch_size: images per step on the device.
        muon_parameters: that Muon trains, with one moment instead of two.
        muon_flops: of its products, per step, on every device.
        averages: beside the first.
    """

    parameters: int
    forward_flops: int
    training_flops: int
    kept: Kept
    batch_size: int
    muon_parameters: int = 0
    muon_flops: int = 0
    averages: int = 0

    @property
    def optimizer_bytes(self) -> int:
        """Moments."""
        return 2 * MOMENT_BYTES * self.parameters - MOMENT_BYTES * self.muon_parameters

    @property
    def state_bytes(self) -> int:
        """Parameters, gradients, optimizer and averages."""
        each = STATE_BYTES + AVERAGE_BYTES * self.averages
        return each * self.parameters - MOMENT_BYTES * self.muon_parameters

    @property
    def update_bytes(self) -> int:
        """Per parameter, read and written by the optimizer and the averages."""
        return UPDATE_BYTES + 2 * AVERAGE_BYTES * self.averages

    def gpu_bytes(self, images: int) -> int:
        """Everything, on a GPU, with so many images at a time."""
        return self.state_bytes + self.kept.weights + self.kept.per_image * images

    def step_seconds(self, gpu: Gpu) -> float:
        """The floor: no step can be faster, real ones move activations through memory as well."""
        products = (self.training_flops * self.batch_size + self.muon_flops) / gpu.bf16_flops
        return products + self.update_bytes * self.parameters / gpu.bandwidth


def estimate(config: TrainConfig) -> Estimate:
    """Of the configured model and batch size, on one device.

    Raises:
        UserError: the model cannot be built, as in training.
    """
    with torch.device("meta"):
        model = build_model(config)
        flops = [forward_flops(model, inputs) for inputs in training_inputs(model, config, 1)]
        matrices = [*muon.hidden_matrices(model)] if config.optimizer.name == "muon" else []
    kept = kept_on_gpu(model, lambda images: training_inputs(model, config, images))
    return Estimate(
        parameters=sum(p.numel() for p in model.parameters()),
        forward_flops=flops[0],
        training_flops=3 * sum(flops),
        kept=kept,
        batch_size=config.batch_size,
        muon_parameters=sum(weight.numel() for weight, _ in matrices),
        muon_flops=sum(muon.step_flops(weight, maps) for weight, maps in matrices),
        averages=len(config.optimizer.averages),
    )


def describe(config: TrainConfig, gpu: GpuName) -> dict[str, str]:
    """What ``speed-engine train PRESET --dry-run`` prints, line by line; gpu is one of ``GPUS``."""
    cost, device = estimate(config), GPUS[gpu]
    floor = cost.step_seconds(device)
    shape = " x ".join(map(str, config.data.image_shape))
    conditions = " and ".join(condition_names(config.data))
    conditioned = f"conditioned on {conditions}" if conditions else "unconditional"
    return {
        "model": f"{config.model.size or config.model.family} on {shape}, {conditioned}",
        "method": spelled(config),
        "parameters": f"{cost.parameters:,}",
        "FLOPs": f"{short(cost.forward_flops)}FLOP per image forward "
        f"({short(cost.forward_flops / 2)}MAC), {short(cost.training_flops)}FLOP trained",
        "state": f"{short(cost.state_bytes)}B: parameters and gradients "
        f"{short(8 * cost.parameters)}B, {_optimizer(cost)}, EMA{'s' * (cost.averages > 0)} "
        f"{short(AVERAGE_BYTES * (1 + cost.averages) * cost.parameters)}B; float32",
        "activations": f"{short(cost.kept.per_image)}B per image on a GPU, under bfloat16 "
        f"autocast, and {short(cost.kept.weights)}B of weights once more",
        "memory": _memory(config.microbatch_size, cost, gpu),
        "step": f"at least {1e3 * floor:.3g} ms on one {gpu}, {cost.batch_size / floor:,.0f} "
        f"images/s: products at {short(device.bf16_flops)}FLOP/s, and the update of "
        f"{cost.update_bytes} bytes per parameter at {short(device.bandwidth)}B/s",
        "compile": "{}: {}".format(*_compiled(config, cost, device)),
        "run": f"{config.steps:,} steps of {config.batch_size} images: at least "
        f"{duration(config.steps * floor)}",
    }


def _compiled(config: TrainConfig, cost: Estimate, device: Gpu) -> Choice:
    """How a run on one such device compiles."""
    images = config.microbatch_size or _fitting(cost, device)
    in_parts = replace(config, microbatch_size=images)
    with torch.device("meta"):
        model = build_model(config)
        launched = launching(in_parts, model, training_inputs(model, config, 1), device)
    return choose_compile(config.compile, "cuda", config.steps, launching=launched)


def _fitting(cost: Estimate, device: Gpu) -> int:
    return fitting_images(cost.kept, cost.state_bytes, cost.batch_size, device.memory)


def _memory(microbatch_size: int | None, cost: Estimate, gpu: GpuName) -> str:
    """What a step takes, and what a run does where that is too much: nothing, if it was told."""
    device = GPUS[gpu]
    images = min(microbatch_size or cost.batch_size, cost.batch_size)
    at_once = f"all {images}" if images == cost.batch_size else f"{images} of {cost.batch_size}"
    text = (
        f"{short(cost.gpu_bytes(images))}B of one {gpu}'s {short(device.memory)}B, with {at_once} "
        "images of a step at once"
    )
    room, fits = USED_SHARE * device.memory, _fitting(cost, device)
    if cost.gpu_bytes(images) <= room:
        return text
    if cost.gpu_bytes(fits) > room:
        return (
            f"{text}; it does not fit, even one by one: take more GPUs, or --model.checkpointing 1"
        )
    if microbatch_size is not None:
        return f"{text}; it does not fit: --microbatch-size {fits} does"
    return f"{text}; it takes {fits} at a time, and {short(cost.gpu_bytes(fits))}B"


def _optimizer(cost: Estimate) -> str:
    if not cost.muon_parameters:
        return f"AdamW {short(cost.optimizer_bytes)}B"
    return (
        f"Muon and AdamW {short(cost.optimizer_bytes)}B (Muon's products take "
        f"{short(cost.muon_flops)}FLOP a step)"
    )


def duration(seconds: float) -> str:
    """In the largest unit of which it is one or more."""
    if seconds < 60:
        return f"{seconds:.3g} seconds"
    return f"{seconds / 60:.3g} minutes" if seconds < 3600 else f"{seconds / 3600:.3g} hours"


def short(number: float) -> str:
    """Three or four digits and the decimal prefix of a unit."""
    for prefix in ("", "k", "M", "G"):
        if number < 999.95:
            return f"{number:.4g} {prefix}"
        number /= 1000
    return f"{number:.4g} T"
