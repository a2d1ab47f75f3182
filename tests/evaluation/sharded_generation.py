"""One of two processes that generate with models sharded as on GPUs; run by test_generate.py.

Usage: ``sharded_generation.py RANK STORE``. Rank 0 prints, for a model of each family, how far the
images are from those of one process that computes in float32: the root of the mean squared
difference over the standard deviation of the images. Between a first generation and this one the
parameters change, as those of an average do in training. Some are compiled, block by block.
"""

import json
import sys

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from speed_engine.diffusion.method import build_method
from speed_engine.diffusion.processes import build_schedule
from speed_engine.evaluation.generate import GenerationSettings, generate
from speed_engine.models.config import DiTConfig, EdmUNetConfig, MDTConfig, ModelConfig, UNetConfig
from speed_engine.models.families import Shape, build_network
from speed_engine.models.layers.blocks import compile_each
from speed_engine.runtime import precision, sharding
from speed_engine.runtime.world import World

COMPILED = ("dit", "ddpm++")
WORLD, IMAGES, CLASSES = 2, 4, 5
FAMILIES: dict[str, ModelConfig] = {
    "dit": DiTConfig(dim=32, depth=2, num_heads=2),
    "dit-modern": DiTConfig(dim=32, depth=2, num_heads=2, variant="modern"),
    "mdt": MDTConfig(dim=32, depth=3, num_heads=2, decode_layers=1),
    "unet": UNetConfig(),
    "ddpm++": EdmUNetConfig(model_channels=16, attention_resolutions=(4,)),
}


def make(config: ModelConfig) -> nn.Module:
    torch.manual_seed(0)
    shape = Shape(input_size=(8, 8), channels=3, num_classes=CLASSES)
    model = build_network(config, shape).eval().requires_grad_(False)
    for parameter in model.parameters():  # away from gates of zero
        if not bool(parameter.any()):
            nn.init.normal_(parameter, std=0.05)
    return model


def images(
    model: nn.Module,
    ids: Tensor | None = None,
    *,
    batch_size: int = IMAGES,
    latents: bool = True,
) -> Tensor:
    ids = torch.arange(IMAGES) if ids is None else ids
    method = build_method("uniform", build_schedule("linear", 1000), None)
    return generate(
        model,
        method.table,
        {"labels": ids % CLASSES},
        ids,
        GenerationSettings(solver="ddim", steps=6, guidance=2.0, interval=(0.1, 5.0)),
        image_shape=(3, 8, 8),
        null={"labels": torch.tensor(CLASSES)},
        seed=3,
        latents=latents,
        batch_size=batch_size,
    )


def main() -> None:
    rank, store = int(sys.argv[1]), sys.argv[2]
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    distances = {}
    cases = [(name, config, False) for name, config in FAMILIES.items()]
    cases += [(name, FAMILIES[name], True) for name in COMPILED]
    for name, config, is_compiled in cases:
        model, alone = make(config), make(config)
        if is_compiled:
            compile_each(sharding.blocks(model), backend="aot_eager")
        with_cuda_policy(model, World(rank, WORLD, rank, WORLD))
        shards = [sharding.local(parameter) for parameter in model.parameters()]
        images(model)
        for parameter in (*shards, *alone.parameters()):
            parameter.mul_(1.1)
        sharded = images(model)
        precision.COMPUTE_DTYPES.pop("cpu")
        whole = images(alone)
        assert sharded.dtype == torch.float32
        distance = (sharded - whole).square().mean().sqrt() / whole.std()
        distances[f"{name}, compiled" if is_compiled else name] = distance.item()
    if rank == 0:
        print(json.dumps(distances))
    dist.destroy_process_group()


def with_cuda_policy(model: nn.Module, world: World) -> None:
    """Lay a model out on CPUs that compute in bfloat16, as GPUs do."""
    precision.COMPUTE_DTYPES["cpu"] = precision.COMPUTE_DTYPES["cuda"]
    sharding.distribute(model, world, "fsdp", "cpu")
    assert isinstance(model, FSDPModule)


if __name__ == "__main__":
    main()
