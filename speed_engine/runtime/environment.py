"""Versions, hardware and source of a run, as ``environment.json`` and results keep them."""

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

PACKAGES = (
    "speed-engine", "torch", "triton", "numpy", "webdataset", "torch-fidelity", "safetensors",
    "torchvision", "xformers", "simplejpeg", "zlib-ng",
)  # fmt: skip


def describe(command: list[str]) -> dict[str, Any]:
    """Versions, hardware and source of a run, for ``environment.json``."""
    return {
        "command": command,
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "packages": {name: version for name in PACKAGES if (version := package_version(name))}
        | {"torch": torch.__version__},
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
        "git_commit": _git_commit(),
    }


def package_version(package: str) -> str | None:
    """None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _git_commit() -> str | None:
    """Of the checkout this package runs from; None if it was installed without one."""
    folder = Path(__file__).parent
    if shutil.which("git") is None:
        return None
    asked = subprocess.run(
        ["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True
    )
    tracked = subprocess.run(
        ["git", "-C", str(folder), "ls-files", "--error-unmatch", __file__], capture_output=True
    )
    return asked.stdout.strip() if asked.returncode == tracked.returncode == 0 else None
