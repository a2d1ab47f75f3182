"""Fixtures shared by every test: the device, and the numerical yardstick for kernels."""

import os
import sys

os.environ.setdefault("TRITON_INTERPRET", "0" if os.path.exists("/dev/nvidia0") else "1")
# The models here are tiny: more threads only wait for each other, in subprocesses as well.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import settings

settings.register_profile("default", deadline=None, derandomize=True)
settings.load_profile("default")
# `with torch.device("meta")` remembers torch.empty when first used: not the one replaced below.
with torch.device("cpu"):
    torch.empty(0)


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def poison_uninitialised_memory(monkeypatch):
    """Inside speed_kernels, ``torch.empty`` returns NaN: a kernel that forgets an element fails."""
    for name in ("empty", "empty_like"):
        allocate = getattr(torch, name)

        def poisoned(*args, _allocate=allocate, **kwargs):
            tensor = _allocate(*args, **kwargs)
            caller = sys._getframe(1).f_globals["__name__"]
            if caller.startswith("speed_kernels.") and tensor.is_floating_point():
                tensor.fill_(float("nan"))
            return tensor

        monkeypatch.setattr(torch, name, poisoned)
