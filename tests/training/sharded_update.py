"""One of two processes that train together; run by test_update.py.

Usage: ``sharded_update.py RANK STORE``. Rank 0 prints a line of JSON for each way of updating: the
largest difference between parameters, averages and optimizer state updated in shards and those
updated in one process, and how many steps were skipped of each. One of four steps is: a gradient in
the second process's shard is not finite. A last line has the largest difference between gradients
of batches in unequal parts on both processes and those of the whole batch in one.
"""

import json
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from other_optimizers import OTHERS
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from speed_engine.build import build_model, build_objective, build_process
from speed_engine.config import TrainConfig
from speed_engine.data.batch import Batch
from speed_engine.models.config import DiTConfig
from speed_engine.models.layers.fused import FusedLinear
from speed_engine.runtime.sharding import blocks, distribute, whole
from speed_engine.runtime.world import ALONE, World
from speed_engine.training.ema import Ema, warming_up
from speed_engine.training.engine import Engine
from speed_engine.training.one_sweep import OneSweep
from speed_engine.training.optimizers import Hyperparameters, adamw, muon
from speed_engine.training.update import Update

SIZE = 2  # processes
WAYS = {
    "one sweep": (OneSweep, adamw),
    "adamw": (Update, adamw),
    "muon": (Update, muon),
    "sgd": (Update, OTHERS["sgd"]),
    "nadam": (Update, OTHERS["nadam"]),
}
HYPER = Hyperparameters(learning_rate=0.1, beta2=0.99, weight_decay=0.1)


class Net(nn.Module):
    """Of odd sizes, so that shards are not equal."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([FusedLinear(8, 10, 2), nn.Linear(10, 3)])

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.blocks
        return second(F.gelu(first(x)))


def make_model() -> Net:
    torch.manual_seed(0)
    return Net()


def shard(model: nn.Module, layers: list[nn.Module]) -> None:
    for layer in (*layers, model):
        fully_shard(layer, mesh=init_device_mesh("cpu", (SIZE,)))


def train(way: str, sharded: bool) -> tuple[list[Tensor], int]:
    """Four steps; in one, the last row of the first weight has a gradient that is not finite."""
    model, nothing = make_model(), nn.Module()
    average = Ema(model, warming_up(0.9))
    if sharded:
        for module in (model, average.model):
            shard(module, blocks(module))
        average.follow(model)
    kind, make_optimizers = WAYS[way]
    optimizers = make_optimizers(model, nothing, HYPER)
    averages = {"ema": average}
    rate, skipped = HYPER.learning_rate, 0
    update = kind(model, nothing, optimizers, averages, learning_rate=lambda _: rate, grad_clip=0.5)
    generator = torch.Generator().manual_seed(1)
    for step in range(1, 5):
        x = torch.randn(6, 8, generator=generator)
        model(x).square().sum().backward()
        if step == 3:
            poison(next(model.parameters()))
        _, finite = update.step(step)
        skipped += int(not finite)
    assert all(isinstance(p, DTensor) == sharded for p in model.parameters())
    tensors = [*model.parameters(), *average.model.parameters()]
    tensors += update.tensors()["optimizer"].values()
    return [whole(tensor.detach()) for tensor in tensors], skipped


def poison(parameter: Tensor) -> None:
    gradient = parameter.grad
    assert gradient is not None
    if not isinstance(gradient, DTensor):
        gradient[-1] = torch.inf
    elif dist.get_rank() == SIZE - 1:
        gradient.to_local()[-1] = torch.inf


def difference(ours: list[Tensor], theirs: list[Tensor]) -> float:
    pairs = zip(ours, theirs, strict=True)
    return max(float((a - b).norm() / b.norm().clamp(min=1e-6)) for a, b in pairs)


def gradients(world: World, size: int, microbatch_size: int | None) -> list[Tensor]:
    """Of a batch of some size, shared out over the processes."""
    config = TrainConfig(method="ant_uw", model=DiTConfig(dim=16, depth=1, num_heads=2))
    model = build_model(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():  # some begin at zero, and would hide the others' gradients
        parameter.data = torch.randn(parameter.shape, generator=generator) / 8
    distribute(model, world, "fsdp", "cpu")
    objective = build_objective(config, build_process(config), model)
    hyper = Hyperparameters(learning_rate=1.0)
    update = Update(
        model, objective, adamw(model, objective, hyper), {},
        learning_rate=lambda _: 1.0, grad_clip=1.0,
    )  # fmt: skip
    engine = Engine(model, objective, update, microbatch_size=microbatch_size, world=world)
    found: list[Tensor] = []

    def keep(step: int) -> tuple[Tensor, Tensor]:
        for parameter in (*model.parameters(), *objective.parameters()):
            assert parameter.grad is not None
            found.append(whole(parameter.grad))
        return torch.zeros(()), torch.tensor(True)

    update.step = keep
    images = torch.rand(size, 1, 8, 8, generator=generator) * 2 - 1
    batch = Batch(images, {"labels": torch.arange(size) % 10}, torch.arange(size))
    loss = engine.step(batch.split(size // world.size)[world.rank]).loss
    return [*found, world.mean_(loss)]


def main() -> None:
    rank, store = int(sys.argv[1]), sys.argv[2]
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=SIZE)
    lines: list[list] = []
    for way in WAYS:
        (ours, skipped), (alone, skipped_alone) = (train(way, sharded) for sharded in (True, False))
        lines.append([way, difference(ours, alone), skipped, skipped_alone])
    world = World(rank, SIZE, local_size=SIZE)
    parts = [
        difference(gradients(world, size, part), gradients(ALONE, size, None))
        for size, part in ((10, 2), (10, 3), (14, 4), (6, None))
    ]
    if rank == 0:
        for line in [*lines, ["parts", max(parts), 0, 0]]:
            print(json.dumps(line))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
