"""One of two processes that share a step by FSDP2; run by test_sharding.py.

Usage: ``sharded_gradient.py RANK STORE``. Rank 0 prints the relative difference between the sharded
gradient and that of the whole batch in one process.
"""

import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from speed_kernels.noising import noised_input
from speed_kernels.variational_bound import hybrid_loss
from speed_kernels.weighted_mse import weighted_mse

WORLD, BATCH, SHAPE = 2, 4, (2, 4, 8)


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))


def gradients(model: nn.Module, images: slice) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x0 = torch.randn(BATCH, *SHAPE, generator=generator)[images]
    coefficients = torch.rand(BATCH, 5, generator=generator)[images]
    seed, ids = torch.tensor(3), torch.arange(BATCH)[images]
    x_in = noised_input(x0, coefficients, seed, ids, torch.float32)
    epsilon = model(x_in)
    error, _ = weighted_mse(epsilon, x0, coefficients, seed, ids)
    rows = torch.tensor([-9.5, -8.9, 0.011, 0.0, 1.0]).repeat(len(ids), 1)
    rows[:, 3] = ids == 1  # at t = 0
    answer = torch.cat([epsilon, epsilon.sin()], dim=1)
    hybrid, _ = hybrid_loss(answer, x0, coefficients, rows, seed, ids)
    (error + hybrid).mean().backward()
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def main() -> None:
    rank, store = int(sys.argv[1]), sys.argv[2]
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    model = make_model()
    mesh = init_device_mesh("cpu", (WORLD,))
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh)
    parts = gradients(model, slice(rank, None, WORLD))
    sharded = [part.full_tensor() for part in parts]  # pyright: ignore[reportAttributeAccessIssue]
    if rank == 0:
        whole = gradients(make_model(), slice(None))
        pairs = zip(sharded, whole, strict=True)
        print(max(((ours - all_).norm() / all_.norm()).item() for ours, all_ in pairs))
    dist.barrier()  # none may leave while another still receives from it
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
