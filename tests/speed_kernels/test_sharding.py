"""The noise belongs to the image, so it does not matter which process draws it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.mark.long
@pytest.mark.skipif(torch.cuda.is_available(), reason="runs the kernels in the interpreter")
def test_two_processes_have_the_gradient_of_one(tmp_path):
    paths = os.pathsep.join(str(ROOT / folder) for folder in (".", "kernels"))
    processes = [
        subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("sharded_gradient.py")), str(rank)]
            + [str(tmp_path / "store")],
            env=os.environ | {"PYTHONPATH": paths, "TRITON_INTERPRET": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=600) for process in processes]
    assert all(process.returncode == 0 for process in processes), outputs
    assert float(outputs[0][0]) <= 1e-6
