"""The null device for tests: built once, and subprocesses that run on it.

It counts what a program asks of a GPU, and computes nothing; see ``null_device.c``. A subprocess
reads what was counted with ``books.py``.
"""

import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from speed_engine.runtime.files import cache_folder

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SOURCE = HERE / "null_device.c"
LIBRARY = "libcuda.so.1"
COMPILER = "gcc"
FLAGS = ("-shared", "-fPIC", "-O1", "-Wall", f"-Wl,-soname,{LIBRARY}")


@functools.cache
def obstacle() -> str | None:
    """Why there can be no null device here; None if there can."""
    if torch.version.cuda is None:
        return "this PyTorch is built without CUDA"
    if shutil.which(COMPILER) is None:
        return f"the null device is compiled by {COMPILER}, which is not on PATH"
    missing = [str(folder) for folder in _headers() if not folder.is_dir()]
    if missing:
        return f"the null device needs CUDA's headers of {' and '.join(missing)}"
    return None


def library() -> Path:
    """The built library, from the cache where its source and CUDA's headers are the same."""
    headers = _headers()
    key = hashlib.sha256(SOURCE.read_bytes())
    key.update(repr(FLAGS).encode())
    for name in ("cuda.h", "cuda_runtime_api.h", "driver_types.h", "library_types.h"):
        key.update((headers[0] / name).read_bytes())
    folder = cache_folder() / "null_device" / key.hexdigest()[:16]
    if not (folder / LIBRARY).exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as unfinished:
            made = Path(unfinished) / LIBRARY
            include = [f"-I{each}" for each in headers]
            command = [
                COMPILER,
                *FLAGS,
                "-o",
                str(made),
                str(SOURCE),
                *include,
                "-ldl",
                "-lpthread",
            ]
            subprocess.run(command, check=True)
            os.replace(made, folder / LIBRARY)  # another process may have built it, too
    return folder / LIBRARY


def environment(compiled: Path) -> dict[str, str]:
    """Of a process on the null device.

    Args:
        compiled: folder of what Triton and Inductor compile.
    """
    folder = str(library().parent)
    paths = (ROOT, ROOT / "kernels", ROOT / "benchmarks", HERE)
    return os.environ | {
        "LD_PRELOAD": str(library()),
        "LD_LIBRARY_PATH": folder,
        "TRITON_LIBCUDA_PATH": folder,
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(compiled / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(compiled / "inductor"),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",  # the pool's processes cost more than they save
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "OMP_NUM_THREADS": "1",
    }


def run(*command: str, compiled: Path) -> Any:
    """What Python prints as JSON in its last line on the null device.

    Args:
        command: its command line; scripts are those beside this file.
        compiled: folder of what Triton and Inductor compile.
    """
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *command],
        cwd=HERE,
        env=environment(compiled),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-8000:]}"
    return json.loads(done.stdout.splitlines()[-1])


def _headers() -> tuple[Path, Path]:
    """Folders of the headers that came with PyTorch; Triton's has some that they include."""
    packages = Path(torch.__file__).parents[1]
    major = str(torch.version.cuda).split(".")[0]
    return (
        packages / "nvidia" / f"cu{major}" / "include",
        packages / "triton" / "backends" / "nvidia" / "include",
    )
