"""How the parameters of a model lie on the processes of a run.

They are laid out by FSDP2 (``fully_shard``) on a mesh of (replicas, shards):

    ddp     (W, 1)                  every process holds all parameters
    fsdp    (1, W)                  every process holds a W-th
    hsdp    (nodes, per node)       sharded inside a node, repeated across nodes

so that gradients are summed in one fixed order whatever the layout, and runs on CPUs repeat bit for
bit; on GPUs see ``determinism.py``.

Letters: W processes.
"""

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from speed_engine.runtime.precision import COMPUTE_DTYPES
from speed_engine.runtime.world import World

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

LAYOUTS: dict[str, Callable[[World], tuple[int, int]]] = {
    "ddp": lambda world: (world.size, 1),
    "fsdp": lambda world: (1, world.size),
    "hsdp": lambda world: (world.size // world.local_size, world.local_size),
}


def computing_device(model: nn.Module) -> torch.device:
    """Where a model computes: offloaded parameters lie elsewhere."""
    parameter = next(model.parameters())
    mesh = getattr(parameter, "device_mesh", None)
    if mesh is None or mesh.device_type == parameter.device.type:
        return parameter.device
    return torch.device(mesh.device_type, torch.cuda.current_device())


def distribute(
    model: nn.Module,
    world: World,
    layout: str,
    device_type: str,
    *,
    reshard_after_forward: bool = True,
    offload: bool = False,
) -> None:
    """Lay the parameters of a model out over the processes, in place; alone, nothing happens.

    Each of the model's ``blocks`` is gathered, used and, if asked to, dropped by
    itself; communication overlaps with the blocks beside it. A model without gradients, an average,
    drops all that it gathered after every use: only a backward pass would do so later, and without
    one it would be used again with the parameters that it had first.

    Args:
        model: equal on every process.
        world: this process among all.
        layout: a key of ``LAYOUTS``.
        device_type: a key of ``COMPUTE_DTYPES`` computes in that type, with float32 parameters and
            gradient sums; its inputs are cast by ``autocast``.
        reshard_after_forward: drop a block's gathered parameters between forward and backward:
            less memory, one more gathering.
        offload: keep parameters, gradients and optimizer state on the host.
    """
    if world.size == 1:
        return
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

    # On a CPU a linear layer returns a view. What FSDP2 warns of, changing one in place after a
    # block, no model does; tests compare the gradients with those of one process.
    warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module .* returned a view tensor")
    policy = MixedPrecisionPolicy()
    if dtype := COMPUTE_DTYPES.get(device_type):
        # Inputs stay as they are: a timestep of 999 is 1000 in bfloat16.
        policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    options: dict[str, Any] = {"mesh": mesh(world, layout, device_type), "mp_policy": policy}
    if offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=device_type == "cuda")
    is_trained = any(parameter.requires_grad for parameter in model.parameters())
    drops = reshard_after_forward or not is_trained
    for block in blocks(model):
        fully_shard(block, reshard_after_forward=drops, **options)
    fully_shard(model, reshard_after_forward=not is_trained, **options)


def mesh(world: World, layout: str, device_type: str) -> "DeviceMesh":
    """The (replicas, shards) of a layout; one dimension where nothing is repeated."""
    from torch.distributed.device_mesh import init_device_mesh

    replicas, shards = LAYOUTS[layout](world)
    if replicas == 1:
        return init_device_mesh(device_type, (shards,), mesh_dim_names=("shard",))
    names = ("replicate", "shard")
    return init_device_mesh(device_type, (replicas, shards), mesh_dim_names=names)


def blocks(model: nn.Module) -> list[nn.Module]:
    """The elements of a model's outermost lists and tables of modules: the units of sharding and of
    compilation.
    """
    found: list[nn.Module] = []
    for child in model.children():
        if isinstance(child, nn.ModuleList):
            found += child
        elif isinstance(child, nn.ModuleDict):
            found += child.values()
        else:
            found += blocks(child)
    return found


def local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor, sharing memory; any other tensor itself."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor  # pyright: ignore[reportAttributeAccessIssue]


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor put together, on every process; any other tensor itself."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # pyright: ignore[reportAttributeAccessIssue]
