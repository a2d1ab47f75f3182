"""One of two processes that share a training step by FSDP2; run by test_dit_kernels.py.

Usage: ``sharded_step.py RANK STORE``. Noise, blocks and loss run on kernels. Rank 0 prints the
largest relative difference between a sharded gradient and that of the whole batch in one process.
"""

import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from speed_engine.diffusion import objective
from speed_engine.diffusion.method import build_method
from speed_engine.diffusion.objective import Objective
from speed_engine.diffusion.processes import build_schedule
from speed_engine.models.dit import DiT
from speed_engine.models.layers import attention, feed_forward, open_sum
from speed_engine.ops import BLOCK_FUSED, FUSED

WORLD, BATCH, DIM, CLASSES = 2, 4, 32, 5


def make_model() -> nn.Module:
    torch.manual_seed(0)
    model = DiT(
        input_size=(4, 4), channels=3, patch_size=2, dim=DIM, depth=2, num_heads=4,
        num_classes=CLASSES,
    )  # fmt: skip
    for parameter in model.parameters():  # away from gates of zero
        if not bool(parameter.any()):
            nn.init.normal_(parameter, std=0.1)
    return model


def gradients(model: nn.Module, images: slice) -> dict[str, torch.Tensor]:
    method = build_method("uniform", build_schedule("linear", 1000), None, seed=3)
    loss_of = Objective(method, seed=3)
    generator = torch.Generator().manual_seed(1)
    x0 = torch.randn(BATCH, 3, 4, 4, generator=generator)[images]
    labels, ids = torch.arange(BATCH)[images], torch.arange(BATCH)[images]
    loss_of(model, x0, {"labels": labels}, ids, 0).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def main() -> None:
    rank, store = int(sys.argv[1]), sys.argv[2]
    for module in (attention, feed_forward, open_sum):
        module.block_operators_for = lambda device: BLOCK_FUSED  # pyright: ignore[reportAttributeAccessIssue]
    objective.operators_for = lambda device: FUSED  # pyright: ignore[reportAttributeAccessIssue]
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    model = make_model()
    mesh = init_device_mesh("cpu", (WORLD,))
    for block in model.blocks:  # pyright: ignore[reportGeneralTypeIssues]
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    parts = gradients(model, slice(rank, None, WORLD))
    sharded = {name: part.full_tensor() for name, part in parts.items()}  # pyright: ignore[reportAttributeAccessIssue]
    if rank == 0:
        whole = gradients(make_model(), slice(None))
        assert sharded.keys() == whole.keys() and len(whole) > 20
        pairs = [(sharded[name], whole[name]) for name in whole if whole[name].norm() > 0]
        assert len(pairs) > 20
        print(max(((ours - all_).norm() / all_.norm()).item() for ours, all_ in pairs))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
