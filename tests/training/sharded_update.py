"""One of two processes that share parameters by FSDP2; run by test_one_sweep.py.

Usage: ``sharded_update.py RANK STORE``. Rank 0 prints the largest difference between parameters,
averages and moments updated in shards and those updated in one process, and how many updates were
done: one of four is skipped, because a gradient in the second process's shard is not finite.
"""

import sys

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from speed_engine.training.optimizers import OneSweep, one_sweep, optimizer_tensors

WORLD = 2


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 5), nn.GELU(), nn.Linear(5, 3))  # odd: shards are not equal


def train(model: nn.Module) -> tuple[OneSweep, list[Tensor]]:
    """Four sweeps; the last row of the first weight has a gradient that is not finite in one."""
    optimizer = one_sweep(model, learning_rate=0.1, beta1=0.9, beta2=0.99, weight_decay=0.1)
    averages = [parameter.detach().clone() for parameter in model.parameters()]
    generator = torch.Generator().manual_seed(1)
    for step in range(4):
        x = torch.randn(6, 8, generator=generator)
        model(x).square().sum().backward()
        if step == 2:
            poison(next(model.parameters()))
        optimizer.sweep([averages], [0.9], 0.5)
        optimizer.zero_grad()
    return optimizer, averages


def poison(parameter: Tensor) -> None:
    gradient = parameter.grad
    assert gradient is not None
    if not isinstance(gradient, DTensor):
        gradient[-1] = torch.inf
    elif dist.get_rank() == WORLD - 1:
        gradient.to_local()[-1] = torch.inf


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def main() -> None:
    rank, store = int(sys.argv[1]), sys.argv[2]
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    mesh = init_device_mesh("cpu", (WORLD,))
    results = []
    for sharded in (True, False):
        model = make_model()
        if sharded:
            for layer in (model[0], model[2], model):
                fully_shard(layer, mesh=mesh)
        optimizer, averages = train(model)
        state = optimizer_tensors(model, optimizer).values()
        results.append([whole(t).detach() for t in (*model.parameters(), *averages, *state)])
        assert all(isinstance(p, DTensor) == sharded for p in model.parameters())
    difference = max(
        ((ours - alone).norm() / alone.norm()).item() for ours, alone in zip(*results, strict=True)
    )
    if rank == 0:
        print(difference, int(optimizer_tensors(model, optimizer)["0.weight/step"]))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
