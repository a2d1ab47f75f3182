"""The processes of a run: who this one is, and what they exchange.

One process needs no process group. Several are started by torchrun, which sets RANK, WORLD_SIZE and
LOCAL_RANK.

Letters: W processes, B images of one process.
"""

import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from speed_engine.runtime.checks import UserError, shortened
from speed_engine.runtime.files import in_words

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.distributed_c10d import Store

# Generous: nodes start minutes apart, and a restart meets slow ones again. A rank that hangs later
# is found by watchdog.py, which knows what it was doing.
CONNECT_TIMEOUT = timedelta(minutes=30)
WAIT_TIMEOUT = timedelta(days=1)  # for the first process, which alone compares images
_TORCHRUN = "Start several processes by torchrun; for one, unset WORLD_SIZE."


# torch 2.14 has renamed it, and warns of the old name.
_all_gather: Any = getattr(torch.distributed, "all_gather_single", None) or getattr(
    torch.distributed, "all_gather_into_tensor", None
)


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
        """Mean over processes, each counting alike, in place; the device is not waited for."""
        if self.size > 1:
            torch.distributed.all_reduce(tensor)
            tensor /= self.size
        return tensor

    def gather(self, tensor: Tensor) -> Tensor:
        """(B, ...) of every process -> (W B, ...), in the order of ranks."""
        if self.size == 1:
            return tensor
        gathered = tensor.new_empty((self.size * len(tensor), *tensor.shape[1:]))
        _all_gather(gathered, tensor.contiguous())
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
            UserError: compute raised it on rank 0; every process raises the same.
        """
        if self.size == 1:
            return compute()
        answer: list[Any] = [None, None]
        if self.is_first:
            try:
                answer[0] = compute()
            except (UserError, OSError) as error:
                answer[1] = in_words(error)
        torch.distributed.broadcast_object_list(answer, src=0, group=self.background)
        if answer[1] is not None:
            raise UserError(answer[1])
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
        UserError: more processes on this node than devices, or an environment that torchrun does
            not make.
    """
    if "WORLD_SIZE" not in os.environ:
        return ALONE
    import torch.distributed as dist

    here = described(device_type)
    rank, size = here.rank, here.size
    _number("MASTER_PORT", 0)
    if not os.environ.get("MASTER_ADDR"):
        raise UserError(
            f"RANK={rank}, WORLD_SIZE={size}, MASTER_ADDR={os.environ.get('MASTER_ADDR')}: an "
            f"address is needed. {_TORCHRUN}"
        )
    if device_type == "cuda":
        torch.cuda.set_device(here.local_rank)
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo"
        store = rendezvous_store(keeper=rank == 0, timeout=CONNECT_TIMEOUT)
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=size, timeout=WAIT_TIMEOUT
        )
    # Its own group: on the default one, a save beside training would meet training's collectives.
    background: Any = None
    if size > 1:
        background = dist.new_group(backend="gloo", timeout=WAIT_TIMEOUT)
    return dataclasses.replace(here, background=background)


def described(device_type: str) -> World:
    """The world that the environment describes, without process groups.

    Args:
        device_type: on cuda every process of this node needs a device of its own.

    Raises:
        UserError: more processes on this node than devices, or an environment that torchrun does
            not make.
    """
    if "WORLD_SIZE" not in os.environ:
        return ALONE
    size, rank = _number("WORLD_SIZE", 1), _number("RANK", 0)
    local_rank = _number("LOCAL_RANK", 0, rank)
    local_size = _number("LOCAL_WORLD_SIZE", 1, size)
    if not rank < size:
        raise UserError(
            f"RANK={rank}, WORLD_SIZE={size}: the rank lies below the size. {_TORCHRUN}"
        )
    if device_type == "cuda" and local_rank >= torch.cuda.device_count():
        raise UserError(
            f"{local_size} processes on this node, but {torch.cuda.device_count()} GPUs; start "
            "torchrun with --nproc-per-node of at most that."
        )
    return World(rank, size, local_rank, local_size)


def _number(name: str, least: int, default: int | None = None) -> int:
    """A variable of the environment.

    Raises:
        UserError: it is missing without a default, or no whole number from ``least`` on.
    """
    text = os.environ.get(name, "" if default is None else str(default))
    if not text.isdecimal() or int(text) < least:
        raise UserError(
            f"WORLD_SIZE is set, and {name}={shortened(text)}: needed is a whole number of at "
            f"least {least}. {_TORCHRUN}"
        )
    return int(text)


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
