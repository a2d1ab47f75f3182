"""Whose compilers a budget was counted with, and what becomes of it under others.

To count for a new one, run the long tests of tests/speed_kernels under it, which report its drift;
add it to their tables, with the limits that shall hold.
"""

import warnings
from collections.abc import Collection
from typing import NamedTuple

import torch
import triton


class Toolchain(NamedTuple):
    """Releases that generate the code, without what only mends them."""

    torch: str
    triton: str


TORCH_2_11_TRITON_3_6 = Toolchain("2.11", "3.6")
TORCH_2_14_TRITON_3_8 = Toolchain("2.14", "3.8")
HERE = Toolchain(*(".".join(each.__version__.split(".")[:2]) for each in (torch, triton)))


def nearest(counted: Collection[Toolchain]) -> Toolchain:
    """This one, or the newest."""
    return HERE if HERE in counted else max(counted, key=_order)


def hold(counted: Collection[Toolchain], over: list[str]) -> None:
    """Fail for what is over budget, or warn of it where this toolchain has not been counted."""
    text = "\n".join(over)
    if HERE in counted:
        assert not over, text
    elif over:
        told = f"torch {HERE.torch}, triton {HERE.triton} drift from budgets counted with others"
        warnings.warn(f"{told}:\n{text}", stacklevel=2)


def _order(toolchain: Toolchain) -> list[list[int]]:
    return [[int(part) for part in version.split(".")] for version in toolchain]
