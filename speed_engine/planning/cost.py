"""What a run will cost, from its configuration alone: nothing is allocated, no data are read.

    memory     parameters, gradients, AdamW's two moments and the average: float32, 20 bytes each
    activation bytes that are kept for the backward pass, counted storage by storage
    step       at least  3 forward FLOPs / peak rate + 36 bytes per parameter / bandwidth;
               MDT goes forward twice, once under its mask

The backward pass takes twice the forward's FLOPs (gradients of inputs and of parameters); the
optimizer and the average read five and write four float32 per parameter in one sweep.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from speed_engine.build import build_model, training_inputs
from speed_engine.config import TrainConfig
from speed_engine.data.opening import condition_names
from speed_engine.planning.flops import forward_flops
from speed_engine.planning.gpus import GPUS, Gpu, GpuName
from speed_engine.training import muon

STATE_BYTES = 20  # per parameter: itself, gradient, two moments, average
UPDATE_BYTES = 36  # per parameter: five values read, four written
MOMENT_BYTES = 4  # per parameter: what Muon does without


class _NormsInFloat32(TorchFunctionMode):
    """What CUDA's autocast does and the CPU's does not."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (F.group_norm, F.layer_norm):
            args = (args[0].float(), *args[1:])
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Estimate:
    """Of one run on one device.

    Attributes:
        parameters: of the model.
        forward_flops: per image, of one pass.
        training_flops: per image, of every forward pass of a step and its backward pass.
        activation_bytes: per image, kept for the backward pass in float32.
        autocast_activation_bytes: the same under bfloat16 autocast.
        autocast_weight_bytes: bfloat16 copies of the parameters that autocast keeps.
        batch_size: images per step on the device.
        muon_parameters: that Muon trains, with one moment instead of two.
        muon_flops: of its products, per step, on every device.
    """

    parameters: int
    forward_flops: int
    training_flops: int
    activation_bytes: int
    autocast_activation_bytes: int
    autocast_weight_bytes: int
    batch_size: int
    muon_parameters: int = 0
    muon_flops: int = 0

    @property
    def optimizer_bytes(self) -> int:
        """Moments."""
        return 2 * MOMENT_BYTES * self.parameters - MOMENT_BYTES * self.muon_parameters

    @property
    def state_bytes(self) -> int:
        """Parameters, gradients, optimizer and average."""
        return STATE_BYTES * self.parameters - MOMENT_BYTES * self.muon_parameters

    @property
    def autocast_bytes(self) -> int:
        """Everything, under bfloat16 autocast."""
        activations = self.autocast_activation_bytes * self.batch_size
        return self.state_bytes + self.autocast_weight_bytes + activations

    def step_seconds(self, gpu: Gpu) -> float:
        """The floor: no step can be faster, real ones move activations through memory as well."""
        products = (self.training_flops * self.batch_size + self.muon_flops) / gpu.bf16_flops
        return products + UPDATE_BYTES * self.parameters / gpu.bandwidth


def estimate(config: TrainConfig) -> Estimate:
    """Of the configured model and batch size, on one device.

    Raises:
        UserError: the model cannot be built, as in training.
    """
    with torch.device("meta"):
        model = build_model(config)
        flops = [forward_flops(model, inputs) for inputs in training_inputs(model, config, 1)]
        matrices = [*muon.hidden_matrices(model)] if config.optimizer.name == "muon" else []
    # Unlike the meta device, a fake one has autocast and fused attention.
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        exact = _kept_bytes(model, config, 2) - _kept_bytes(model, config, 1)
        with _NormsInFloat32():
            one, two = (_kept_bytes(model, config, images, autocast=True) for images in (1, 2))
    return Estimate(
        parameters=sum(p.numel() for p in model.parameters()),
        forward_flops=flops[0],
        training_flops=3 * sum(flops),
        activation_bytes=exact,
        autocast_activation_bytes=two - one,
        autocast_weight_bytes=2 * one - two,
        batch_size=config.batch_size,
        muon_parameters=sum(weight.numel() for weight, _ in matrices),
        muon_flops=sum(muon.step_flops(weight, parts) for weight, parts in matrices),
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
        "parameters": f"{cost.parameters:,}",
        "FLOPs": f"{_short(cost.forward_flops)}FLOP per image forward "
        f"({_short(cost.forward_flops / 2)}MAC), {_short(cost.training_flops)}FLOP trained",
        "state": f"{_short(cost.state_bytes)}B: parameters and gradients "
        f"{_short(8 * cost.parameters)}B, {_optimizer(cost)}, EMA "
        f"{_short(4 * cost.parameters)}B; float32",
        "activations": f"{_short(cost.activation_bytes)}B per image in float32; under bfloat16 "
        f"autocast, which halves what products read but not what norms and residuals keep, "
        f"{_short(cost.autocast_activation_bytes)}B per image and "
        f"{_short(cost.autocast_weight_bytes)}B of weights once more",
        "memory": f"{_short(cost.autocast_bytes)}B of one {gpu}'s {_short(device.memory)}B, with "
        f"all {cost.batch_size} images of a step at once, under autocast",
        "step": f"at least {1e3 * floor:.3g} ms on one {gpu}, {cost.batch_size / floor:,.0f} "
        f"images/s: products at {_short(device.bf16_flops)}FLOP/s, and the update of "
        f"{UPDATE_BYTES} bytes per parameter at {_short(device.bandwidth)}B/s",
        "run": f"{config.steps:,} steps of {config.batch_size} images: at least "
        f"{_duration(config.steps * floor)}",
    }


def _optimizer(cost: Estimate) -> str:
    if not cost.muon_parameters:
        return f"AdamW {_short(cost.optimizer_bytes)}B"
    return (
        f"Muon and AdamW {_short(cost.optimizer_bytes)}B (Muon's products take "
        f"{_short(cost.muon_flops)}FLOP a step)"
    )


def _duration(seconds: float) -> str:
    """In the largest unit of which it is one or more."""
    if seconds < 60:
        return f"{seconds:.3g} seconds"
    return f"{seconds / 60:.3g} minutes" if seconds < 3600 else f"{seconds / 3600:.3g} hours"


def _short(number: float) -> str:
    """Three or four digits and the decimal prefix of a unit."""
    for prefix in ("", "k", "M", "G"):
        if number < 999.95:
            return f"{number:.4g} {prefix}"
        number /= 1000
    return f"{number:.4g} T"


def _kept_bytes(model: nn.Module, config: TrainConfig, images: int, autocast: bool = False) -> int:
    """Of the storages made by a step's forward passes and alive after them, for the backward."""
    with _Storages(model) as storages:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            answers = [model(**inputs) for inputs in training_inputs(model, config, images)]
        kept = storages.bytes_alive()
    del answers
    return kept


class _Storages(TorchDispatchMode):
    """Watches what is allocated beside a model, by whatever it is held: autograd, or a cache."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        tensors = (*model.parameters(), *model.buffers())
        self._own = {tensor.untyped_storage()._cdata for tensor in tensors}
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in self._own:
                storage = leaf.untyped_storage()
                self._made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return result

    def bytes_alive(self) -> int:
        """Of the storages that are still held."""
        return sum(size for reference, size in self._made.values() if not reference.expired())
