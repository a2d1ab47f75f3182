"""Equal runs with equal bits on a GPU.

On a CPU they have them anyway. On a GPU the fastest algorithms may add in whatever order their
blocks finish (attention and convolutions backward, additions at indices), share a workspace between
streams (cuBLAS), or be chosen by timing them (Inductor).
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from speed_engine.runtime.checks import UserError

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
WORKSPACES = (":4096:8", ":16:8")  # with which cuBLAS repeats its results


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Compute by deterministic algorithms only, then as before; without ``wanted`` change nothing.

    Begin it before the first product on a GPU, for cuBLAS reads its setting from the environment
    once. An operator that has no deterministic algorithm raises RuntimeError.

    PyTorch's switch makes attention by flash and by memory-efficient kernels deterministic, as well
    as the gradients of embeddings: eager ones always are, and Inductor leaves the additions at
    indices, of which it makes them, to a kernel that sorts. Inductor then chooses nothing by time.

    Args:
        wanted: whether to.

    Raises:
        UserError: the environment gives cuBLAS a workspace with which results do not repeat.
    """
    if not wanted:
        yield
        return
    given = os.environ.get(WORKSPACE)
    if given not in (None, *WORKSPACES):
        raise UserError(
            f"deterministic needs {WORKSPACE} to be {' or '.join(WORKSPACES)}, but the environment "
            f"has {given}; unset it."
        )
    from torch._inductor import config as inductor  # takes long

    os.environ[WORKSPACE] = given or WORKSPACES[0]
    algorithms = torch.are_deterministic_algorithms_enabled()
    only_warns = torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory  # pyright: ignore
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.deterministic
    by_cudnn = torch.backends.cuda.cudnn_sdp_enabled()
    never_times = inductor.deterministic  # PyTorch's switch sets it, either way
    try:
        torch.use_deterministic_algorithms(True)
        # A pass over every new tensor, against reading what was never written; the tests look for
        # that with NaN instead.
        torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore
        cudnn.benchmark, cudnn.deterministic = False, True
        torch.backends.cuda.enable_cudnn_sdp(False)  # leaves flash, memory-efficient, then math
        yield
    finally:
        torch.use_deterministic_algorithms(algorithms, warn_only=only_warns)
        torch.utils.deterministic.fill_uninitialized_memory = filled  # pyright: ignore
        cudnn.benchmark, cudnn.deterministic = before
        torch.backends.cuda.enable_cudnn_sdp(by_cudnn)
        inductor.deterministic = never_times
        if given is None:
            del os.environ[WORKSPACE]
