"""What a run takes on many devices: memory, communication and step time, before any is rented.

A roofline with a network: for W devices, s of which share the parameters (shards) and r = W / s of
which repeat them (replicas), P parameters and n images per device and step,

    compute   3 forward FLOPs n / (efficiency x peak)
    gather    2 P (s - 1) / s bytes per device, bfloat16, for the forward pass, and as much again
              for the backward pass if parameters are dropped between the two
    scatter   4 P (s - 1) / s bytes, float32 gradients
    repeat    8 P / s (r - 1) / r bytes, their sum over the replicas, as a ring has it
    step      between the longer of compute and communication, if all of it overlaps, and their sum

A collective inside a node runs at the node's links, one that leaves it at the network's rate per
device; each adds a latency for every doubling of the devices it spans. Gathering, scattering and
repeating happen once per block of the model.
"""

from dataclasses import dataclass
from math import ceil, log2
from typing import NamedTuple

import torch

from speed_engine.build import build_model
from speed_engine.config import TrainConfig
from speed_engine.planning.cost import Estimate, duration, estimate, short
from speed_engine.planning.gpus import GPUS, Gpu, GpuName
from speed_engine.planning.memory import USED_SHARE, fitting_images
from speed_engine.runtime.checks import UserError
from speed_engine.runtime.machine import choose_parallel
from speed_engine.runtime.sharding import LAYOUTS, blocks
from speed_engine.runtime.world import World

# Assumed, as nothing of it has been measured: seconds of a collective per doubling of its devices.
NODE_LATENCY, NETWORK_LATENCY = 5e-6, 10e-6
LAUNCHES = 7e-3  # seconds: the digits take an H200 as long as one CUDA graph, nearly all launches


@dataclass(frozen=True)
class Plan:
    """Of one run on W devices.

    Attributes:
        layout: a key of ``LAYOUTS``, or none.
        images: per device and step.
        state_bytes: parameters, gradients, optimizer and averages of one device, on it or in the
            host's memory.
        gathered_bytes: parameters and gradients of the blocks in use, on one device.
        activation_bytes: kept for the backward pass, on one device.
        sent_bytes: by one device in a step.
        compute_seconds: of a step, arithmetic and the update of parameters.
        communication_seconds: of a step.
        microbatch: images that go through the model at a time, on one device.
        offloaded: the state is in the host's memory.
    """

    layout: str
    images: int
    state_bytes: float
    gathered_bytes: float
    activation_bytes: float
    sent_bytes: float
    compute_seconds: float
    communication_seconds: float
    microbatch: int
    offloaded: bool

    @property
    def memory_bytes(self) -> float:
        """On one device."""
        state = 0 if self.offloaded else self.state_bytes
        return state + self.gathered_bytes + self.activation_bytes

    @property
    def step_seconds(self) -> tuple[float, float]:
        """With all communication behind arithmetic, and with none."""
        compute, communication = self.compute_seconds, self.communication_seconds
        return max(compute, communication), compute + communication


def plan(config: TrainConfig, gpus: int, gpu: GpuName, per_node: int, efficiency: float) -> Plan:
    """Of a configured run.

    Args:
        config: of the run.
        gpus: W.
        gpu: a key of ``GPUS``.
        per_node: devices of a node.
        efficiency: share of the peak rate that the arithmetic reaches, in (0, 1].

    Raises:
        UserError: sizes that do not divide as they must.
    """
    _check(config, gpus, per_node, efficiency)
    cost = estimate(config)
    per_node = min(per_node, gpus)
    world = World(size=gpus, local_size=per_node)
    layout = choose_parallel(config.parallel, world, "cuda").value
    replicas, shards = LAYOUTS[layout](world) if gpus > 1 else (1, 1)
    units = _unit_parameters(config)
    images = config.batch_size // gpus
    state, offloaded = cost.state_bytes / shards, config.offload and gpus > 1
    on_gpu = 0 if offloaded else state
    fitting = fitting_images(cost.kept, on_gpu, images, GPUS[gpu].memory)
    microbatch = min(config.microbatch_size or fitting, images)
    reshard = config.reshard and shards > 1
    gathers = ceil(images / microbatch) * (2 if reshard else 1)
    sent, seconds = 0.0, 0.0
    across = _Span(gpu, shards, per_node)
    for parameters in units:
        for size, times in ((2 * parameters, gathers), (4 * parameters, 1)):
            sent += times * size * (shards - 1) / shards
            seconds += times * across.seconds(size * (shards - 1) / shards)
        # Replicas of a sharded model are in other nodes; those of a whole one everywhere.
        repeat = 8 * parameters / shards * (replicas - 1) / replicas
        sent += repeat
        seconds += _Span(gpu, replicas, 1 if shards > 1 else per_node).seconds(repeat)
    return Plan(
        layout,
        images,
        state_bytes=state,
        gathered_bytes=_gathered(units, gpus, reshard),
        activation_bytes=_activations(cost, microbatch, gpus),
        sent_bytes=sent,
        compute_seconds=_compute(cost, images, shards, GPUS[gpu], efficiency),
        communication_seconds=seconds,
        microbatch=microbatch,
        offloaded=offloaded,
    )


def describe(
    config: TrainConfig, gpus: int, gpu: GpuName, per_node: int, efficiency: float
) -> dict[str, str]:
    """What ``speed-engine plan`` prints, line by line."""
    planned = plan(config, gpus, gpu, per_node, efficiency)
    shortest, longest = planned.step_seconds
    memory, need = GPUS[gpu].memory, planned.memory_bytes
    less = "lower microbatch_size" if planned.microbatch > 1 else "--model.checkpointing 1"
    verdict = "fits" if need <= USED_SHARE * memory else f"does not fit: {less}, or add GPUs"
    parts = f", {planned.microbatch} at a time" if planned.microbatch < planned.images else ""
    where = " in the host's memory" if planned.offloaded else ""
    alone = planned.compute_seconds
    rates = [config.batch_size / seconds for seconds in (longest, shortest)]
    whole = [config.steps * seconds for seconds in (shortest, longest)]
    launches = "; launches, which are not counted, may take longer" if alone < LAUNCHES else ""
    bound = "communication" if planned.communication_seconds > alone else "arithmetic"
    return {
        "layout": f"{planned.layout} on {gpus} {gpu}, {planned.images} images each per step{parts}",
        "memory": f"{short(need)}B of {short(memory)}B per GPU, {verdict}: state "
        f"{short(planned.state_bytes)}B{where}, blocks in use {short(planned.gathered_bytes)}B, "
        f"activations {short(planned.activation_bytes)}B",
        "sent": f"{short(planned.sent_bytes)}B per GPU and step, "
        f"{1e3 * planned.communication_seconds:.3g} ms",
        "compute": f"{1e3 * alone:.3g} ms per step at {efficiency:.0%} of the peak rate, which is "
        f"assumed, not measured{launches}",
        "step": f"{1e3 * shortest:.3g} to {1e3 * longest:.3g} ms (communication behind arithmetic, "
        f"or not at all): {rates[0]:,.0f} to {rates[1]:,.0f} images/s, bound by {bound}",
        "scaling": f"{alone / longest:.0%} to {alone / shortest:.0%} of {gpus} times one GPU with "
        "the same images each",
        "run": f"{config.steps:,} steps: {duration(whole[0])} to {duration(whole[1])}, "
        f"{_hours(gpus * whole[0])} to {_hours(gpus * whole[1])} GPU-hours",
    }


def _hours(seconds: float) -> str:
    """Whole ones where there are many."""
    hours = seconds / 3600
    return f"{hours:,.0f}" if hours >= 10 else f"{hours:.2g}"


class _Span(NamedTuple):
    """A group of devices that exchange."""

    gpu: GpuName
    size: int
    per_node: int

    def seconds(self, sent: float) -> float:
        """Of one collective in which each device sends so many bytes."""
        if self.size == 1:
            return 0.0
        inside = self.size <= self.per_node
        rate = GPUS[self.gpu].node_link if inside else GPUS[self.gpu].network_link
        latency = NODE_LATENCY if inside else NETWORK_LATENCY
        return sent / rate + latency * log2(self.size)


def _check(config: TrainConfig, gpus: int, per_node: int, efficiency: float) -> None:
    if gpus < 1 or per_node < 1 or (gpus > per_node and gpus % per_node):
        raise UserError(
            f"{gpus} GPUs in nodes of {per_node}: take up to {per_node}, or a multiple of it."
        )
    if config.batch_size % gpus:
        raise UserError(
            f"batch_size={config.batch_size} does not spread over {gpus} GPUs; it must be a "
            f"multiple, such as --batch-size {-(-config.batch_size // gpus) * gpus}, and the "
            "learning rate may have to follow it."
        )
    if not 0 < efficiency <= 1:
        raise UserError(f"efficiency={efficiency} is a share of the peak rate, in (0, 1].")


def _unit_parameters(config: TrainConfig) -> list[int]:
    """Parameters of each block, then of what is outside blocks."""
    with torch.device("meta"):
        model = build_model(config)
    counts = [sum(p.numel() for p in block.parameters()) for block in blocks(model)]
    return [*counts, sum(p.numel() for p in model.parameters()) - sum(counts)]


def _gathered(units: list[int], gpus: int, reshard: bool) -> float:
    """Two blocks, one in use and one on its way, and the rest; or all of them, if none is dropped.

    In bfloat16, and the gradients of two blocks in float32 on their way to be summed.
    """
    if gpus == 1:
        return 0.0
    *blocks, rest = units
    largest = 2 * max(blocks, default=0)
    return 2 * ((largest if reshard else sum(blocks)) + rest) + 4 * (largest + rest)


def _activations(cost: Estimate, images: int, gpus: int) -> float:
    """Autocast's copies of the weights are the gathered blocks themselves where those exist."""
    copies = cost.kept.weights if gpus == 1 else 0
    return cost.kept.per_image * images + copies


def _compute(cost: Estimate, images: int, shards: int, gpu: Gpu, efficiency: float) -> float:
    flops = cost.training_flops * images + cost.muon_flops  # every process orthogonalises all
    products = flops / (efficiency * gpu.bf16_flops)
    return products + cost.update_bytes * cost.parameters / shards / gpu.bandwidth
