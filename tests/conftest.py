"""Fixtures shared by every test: the device, and the numerical yardstick for kernels."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

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


ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def session_folder(tmp_path_factory) -> Path:
    """A folder of all processes of the session together."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


@pytest.fixture(autouse=True, scope="session")
def cache(session_folder) -> Iterator[Path]:
    """What is made once for all tests, such as the shards of the digits; the user's is not read."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPEED_ENGINE_CACHE", str(session_folder / "cache"))
        yield session_folder / "cache"


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


@pytest.fixture
def processes(tmp_path) -> Callable[[Path, int], str]:
    """Run a script as ranks 0, 1, ..., kernels in the interpreter; what rank 0 prints.

    The arguments of the script are its rank, the path of a store, through which they meet, and
    how many they are.
    """

    def run(script: Path, size: int) -> str:
        paths = os.pathsep.join(str(ROOT / folder) for folder in (".", "kernels"))
        arguments = str(tmp_path / "store"), str(size)
        started = [
            subprocess.Popen(
                [sys.executable, str(script), str(rank), *arguments],
                env=os.environ | {"PYTHONPATH": paths, "TRITON_INTERPRET": "1"},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(size)
        ]
        try:
            said = [process.communicate(timeout=600) for process in started]
        finally:
            for process in started:  # one that waits for the other outlives it
                process.kill()
        assert [process.returncode for process in started] == [0] * size, said
        return said[0][0]

    return run


@pytest.fixture
def two_processes(processes) -> Callable[[Path], str]:
    """Run a script as ranks 0 and 1."""
    return lambda script: processes(script, 2)
