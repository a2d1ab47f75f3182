"""One of several processes that train with Muon together; run by test_muon.py.

Usage: ``sharded_muon.py RANK STORE SIZE``. Rank 0 prints a line of JSON for each layout: of every
process the largest difference between parameters and optimizer state trained together and those
trained by one process, and how many steps were skipped. One of four steps is: the loss of the last
process is not finite.
"""

import json
import math
import sys
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from speed_engine.models.layers.fused import FusedLinear, Maps, holding
from speed_engine.runtime.sharding import LAYOUTS, distribute, whole
from speed_engine.runtime.world import ALONE, World
from speed_engine.training.optimizers import Hyperparameters, muon
from speed_engine.training.update import Update

HYPER = Hyperparameters(learning_rate=0.1, beta2=0.99, weight_decay=0.1)


class Net(nn.Module):
    """Of odd sizes, so that shards are not equal, and the last of four is empty."""

    def __init__(self) -> None:
        super().__init__()
        by_head = holding(Maps((2, 3, -1), axis=1), nn.Linear(10, 12))
        self.blocks = nn.ModuleList([FusedLinear(8, 10, 2), by_head, nn.Linear(12, 3)])
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = F.gelu(block(x))
        return self.head(x)


def train(world: World, layout: str) -> tuple[list[Tensor], int]:
    """Four steps; each process takes its part of every batch."""
    torch.manual_seed(0)
    model, nothing = Net(), nn.Module()
    distribute(model, world, layout, "cpu")
    update = Update(
        model, nothing, muon(model, nothing, HYPER), {},
        learning_rate=lambda _: HYPER.learning_rate, grad_clip=0.5,
    )  # fmt: skip
    generator, skipped = torch.Generator().manual_seed(1), 0
    for step in range(1, 5):
        x = torch.randn(8, 8, generator=generator).chunk(world.size)[world.rank]
        loss = world.size * model(x).square().sum()  # gradients are means over processes
        poisoned = step == 3 and world.rank == world.size - 1
        (loss * math.nan if poisoned else loss).backward()
        _, finite = update.step(step)
        skipped += int(not finite)
    tensors = [*model.parameters(), *update.tensors()["optimizer"].values()]
    return [whole(tensor.detach()) for tensor in tensors], skipped


def difference(ours: list[Tensor], theirs: list[Tensor]) -> float:
    pairs = zip(ours, theirs, strict=True)
    distances = [(a - b).norm() / b.norm().clamp(min=1e-6) for a, b in pairs]
    return float(torch.stack(distances).max())  # of NaN, it is NaN


def main() -> None:
    rank, store, size = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    alone, _ = train(ALONE, "ddp")
    for layout in LAYOUTS:
        together, skipped = train(World(rank, size, local_size=2), layout)
        found: list[Any] = [None] * size
        dist.all_gather_object(found, [difference(together, alone), skipped])
        if rank == 0:
            print(json.dumps([layout, found]))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
