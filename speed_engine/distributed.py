"""The processes of a run: who this one is, what they exchange, how parameters lie on them.

One process needs no process group. Several are started by torchrun, which sets RANK, WORLD_SIZE and
LOCAL_RANK. Parameters are laid out by FSDP2 (``fully_shard``) on a mesh of (replicas, shards):

    ddp     (W, 1)                  every process holds all parameters
    fsdp    (1, W)                  every process holds a W-th
    hsdp    (nodes, per node)       sharded inside a node, repeated across nodes

so that gradients are summed in one fixed order whatever the layout, and runs repeat bit for bit.

Letters: W processes, B images of one process.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.distributed_c10d import Store

# Generous: nodes start minutes apart, and a restart meets slow ones again. A rank that hangs later
# is found by watchdog.py, which knows what it was doing.
CONNECT_TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True)
class World:
    """This process among those of the run.

    Attributes:
        rank: of this process, from 0.
        size: W.
        local_rank: on this node; which of its devices is ours.
        local_size: processes on this node.
        background: a process group for what runs beside training, on the host.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    background: "ProcessGroup | None" = None

    @property
    def is_first(self) -> bool:
        """Whether this process speaks for all: it logs and writes what is not sharded."""
        return self.rank == 0

    def mean_(self, tensor: Tensor) -> Tensor:
        """Mean over processes, in place; the device is not waited for."""
        if self.size > 1:
            torch.distributed.all_reduce(tensor)
            tensor /= self.size
        return tensor

    def gather(self, tensor: Tensor) -> Tensor:
        """(B, ...) of every process -> (W B, ...), in the order of ranks."""
        if self.size == 1:
            return tensor
        gathered = tensor.new_empty((self.size * len(tensor), *tensor.shape[1:]))
        torch.distributed.all_gather_into_tensor(gathered, tensor.contiguous())
        return gathered

    def gather_on_host(self, tensor: Tensor) -> Tensor:
        """As ``gather``, for tensors on the CPU."""
        if self.size == 1:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        torch.distributed.all_gather(parts, tensor.contiguous(), group=self.background)
        return torch.cat(parts)

    def from_first(self, compute: Callable[[], Any]) -> Any:
        """What ``compute`` returns on rank 0, on every process; small and JSON-like.

        Raises:
            ValueError: compute raised it on rank 0; every process raises the same.
        """
        if self.size == 1:
            return compute()
        answer: list[Any] = [None, None]
        if self.is_first:
            try:
                answer[0] = compute()
            except (ValueError, OSError) as error:
                answer[1] = str(error)
        torch.distributed.broadcast_object_list(answer, src=0, group=self.background)
        if answer[1] is not None:
            raise ValueError(answer[1])
        return answer[0]

    def barrier(self) -> None:
        """Wait for every process."""
        if self.size > 1:
            torch.distributed.barrier(group=self.background)


ALONE = World()


def join(device_type: str) -> World:
    """The world that torchrun described, with process groups; alone without torchrun.

    Args:
        device_type: of the run; on cuda this process takes the device of its local rank.

    Raises:
        ValueError: more processes on this node than devices.
    """
    if "WORLD_SIZE" not in os.environ:
        return ALONE
    import torch.distributed as dist

    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local_rank = int(os.environ.get("LOCAL_RANK", rank))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    if device_type == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"{local_size} processes on this node, but {torch.cuda.device_count()} GPUs; start "
                "torchrun with --nproc-per-node of at most that."
            )
        torch.cuda.set_device(local_rank)
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo"
        store = rendezvous_store(keeper=rank == 0, timeout=CONNECT_TIMEOUT)
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=size, timeout=CONNECT_TIMEOUT
        )
    # Its own group: on the default one, a save beside training would meet training's collectives.
    background: Any = None
    if size > 1:
        background = dist.new_group(backend="gloo", timeout=CONNECT_TIMEOUT)
    return World(rank, size, local_rank, local_size, background)


def leave() -> None:
    """End the process groups of ``join``, if there are any; only after success.

    The interpreter would end them while their threads run, which aborts now and then. After an
    error a peer may be waiting in a collective, and NCCL would wait for it.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def rendezvous_store(keeper: bool, timeout: timedelta) -> "Store":
    """A connection to where processes find each other.

    Args:
        keeper: whether this process keeps the store, unless torchrun's agent does.
        timeout: of every request.
    """
    from torch._C._distributed_c10d import TCPStore
    from torch.distributed.distributed_c10d import PrefixStore

    agent_keeps = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=keeper and not agent_keeps,
        wait_for_workers=False,
        timeout=timeout,
    )
    # The agent keeps one store for all attempts; without a prefix a restarted process would look
    # for its neighbours where those of the last attempt were.
    return PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)


LAYOUTS: dict[str, Callable[[World], tuple[int, int]]] = {
    "ddp": lambda world: (world.size, 1),
    "fsdp": lambda world: (1, world.size),
    "hsdp": lambda world: (world.size // world.local_size, world.local_size),
}


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

    Each of the model's ``blocks`` is gathered, used and, if told so, dropped by
    itself; communication overlaps with the blocks beside it.

    Args:
        model: equal on every process.
        world: this process among all.
        layout: a key of ``LAYOUTS``.
        device_type: cuda computes in bfloat16, with float32 parameters and gradient sums.
        reshard_after_forward: drop gathered parameters between forward and backward: less memory,
            one more gathering.
        offload: keep parameters, gradients and optimizer state on the host.
    """
    if world.size == 1:
        return
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy()
    if device_type == "cuda":
        # Inputs stay as they are: a timestep of 999 is 1000 in bfloat16.
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    options: dict[str, Any] = {"mesh": mesh(world, layout, device_type), "mp_policy": policy}
    if offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=device_type == "cuda")
    for block in blocks(model):
        fully_shard(block, reshard_after_forward=reshard_after_forward, **options)
    fully_shard(model, reshard_after_forward=False, **options)


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
