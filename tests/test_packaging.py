"""What is importable, from where, and at what cost.

The folder kernels/ must not be importable as ``kernels``, which is a package on PyPI: transformers
and diffusers import that one when they find it, and a ``kernels/__init__.py`` here, or in tests/ or
benchmarks/, would be found first by whatever runs from that folder.
"""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("folder", [".", "tests", "benchmarks", "scripts"])
def test_nothing_here_shadows_the_pypi_package_kernels(folder):
    for name in ("kernels/__init__.py", "kernels.py"):
        assert not (ROOT / folder / name).exists(), f"{folder}/{name} shadows PyPI's `kernels`."


def test_the_import_names_resolve_into_this_repository():
    import speed_engine
    import speed_kernels

    assert Path(speed_engine.__file__).parent == ROOT / "speed_engine"
    assert Path(speed_kernels.__file__).parent == ROOT / "kernels" / "speed_kernels"


@pytest.mark.parametrize("module", ["speed_engine", "speed_engine.cli"])
def test_importing_the_package_or_its_command_costs_nothing_heavy(module):
    code = (
        f"import sys; before = set(sys.modules); import {module}; "
        "new = {name.split('.')[0] for name in set(sys.modules) - before}; "
        "print(sorted(new & {'torch', 'triton', 'webdataset', 'torch_fidelity', 'tensorboard'}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.strip() == "[]"
