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

CHANGED = "-dirty"  # after a commit that the code is no longer as it was in


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
    """Of the checkout this package runs from; None if it was installed without one.

    ``-dirty`` follows where tracked Python files differ from it; results do, once one is written.
    """
    if shutil.which("git") is None:
        return None

    def git(*words: str) -> subprocess.CompletedProcess[str]:
        command = ["git", "-C", str(Path(__file__).parent), *words]
        return subprocess.run(command, capture_output=True, text=True)

    asked, tracked = git("rev-parse", "HEAD"), git("ls-files", "--error-unmatch", __file__)
    if asked.returncode or tracked.returncode:
        return None
    same = git("diff", "--quiet", "HEAD", "--", ":(top)*.py").returncode == 0
    return asked.stdout.strip() + ("" if same else CHANGED)
