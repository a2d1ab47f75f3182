"""Which families of operators run on kernels: those that passed their test on this machine."""

import logging
from functools import cache

import torch

from speed_engine.ops import HAS_TRITON, Kernels, use_kernels
from speed_engine.runtime.checks import UserError
from speed_engine.runtime.choice import Choice
from speed_engine.runtime.kernel_check import Finding, check_kernels
from speed_engine.runtime.world import ALONE, World

log = logging.getLogger(__name__)

# A family of ``ops.Kernels`` -> what it computes, and what its kernels change.
KERNEL_FAMILIES = {
    "random": ("random bits and normals (on a CPU by NumPy)", "the CPU's bits"),
    "objective": ("clean images, noised input and loss", "each one pass over memory"),
    "block": (
        "adaLN, gates, GELU, bias gradients and, on Hopper, the gradient of attention",
        # benchmarks/results/nvidia-h200/gpu_third.json, "default" and "kernels off"
        "with those before, 402 ms instead of 427 for a step of DiT-XL/2 on an H200",
    ),
    "norms": (
        "QK-norm with RoPE, group norm with SiLU",
        "by count 10 and 8 tensors moved, forward and backward together; not measured on a GPU",
    ),
    "update": ("AdamW and EMAs in one sweep, if asked for", "moves 36 bytes per parameter"),
}


def choose_kernels(wanted: str, device: str, world: World = ALONE) -> dict[str, Choice]:
    """Of each family of operators, ``Triton`` or ``PyTorch reference``.

    Args:
        wanted: ``auto``, ``on`` or ``off``.
        device: ``cuda`` or ``cpu``.
        world: the processes of the run, which all follow the first one's test.

    Raises:
        UserError: on was asked for, and the kernels need another machine or one fails its test.
    """
    obstacle = kernel_obstacle(device)
    if wanted == "on" and obstacle:
        raise UserError(f"kernels=on, but {obstacle}; use kernels=auto or off.")
    obstacle = "asked for" if wanted == "off" else obstacle
    findings = [] if obstacle else world.from_first(lambda: kernel_findings(device))
    failed: dict[str, list[str]] = {}
    for finding in findings:
        if not finding.passed:
            failed.setdefault(finding.family, []).append(f"{finding.operator} {finding.problem}")
    if wanted == "on" and failed:
        named = "; ".join(problem for problems in failed.values() for problem in problems)
        raise UserError(
            f"kernels=on, but {named}. Use kernels=auto, which computes these families by the "
            "PyTorch reference, or kernels=off."
        )
    choices = {}
    for family, (what, change) in KERNEL_FAMILIES.items():
        if problem := obstacle or "; ".join(failed.get(family, [])):
            choices[family] = Choice("PyTorch reference", f"{what}; {problem}")
        else:
            choices[family] = Choice("Triton", f"{what}; {change}")
    return choices


def kernel_obstacle(device: str) -> str | None:
    """Why no kernel can run there; None if they can be tried."""
    if device != "cuda":
        return "the kernels need CUDA"
    return None if HAS_TRITON else "Triton is not installed"


@cache
def kernel_findings(device: str) -> list[Finding]:
    """Every kernel's test on the current device, once in this process."""
    return check_kernels(torch.device(device))


def settle_kernels(wanted: str, device: str, world: World = ALONE) -> None:
    """Run operators as ``choose_kernels`` says, from now on in this process.

    A kernel that fails its test is named in a line of the log.

    Args:
        wanted: ``auto``, ``on`` or ``off``.
        device: ``cuda`` or ``cpu``.
        world: the processes of the run.

    Raises:
        UserError: as of ``choose_kernels``.
    """
    choices = choose_kernels(wanted, device, world)
    if device != "cuda":
        return  # a model on the CPU says nothing of those on a GPU in the same process
    use_kernels(Kernels(**{name: choice.value == "Triton" for name, choice in choices.items()}))
    if wanted == "off" or kernel_obstacle(device) or not world.is_first:
        return
    for finding in kernel_findings(device):
        if not finding.passed:
            log.warning(
                "kernel %s %s; the PyTorch reference runs its family: %s",
                finding.operator, finding.problem, KERNEL_FAMILIES[finding.family][0],
            )  # fmt: skip
