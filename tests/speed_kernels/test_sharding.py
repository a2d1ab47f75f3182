"""The noise belongs to the image, so it does not matter which process draws it."""

from pathlib import Path

import pytest
import torch


@pytest.mark.long
@pytest.mark.skipif(torch.cuda.is_available(), reason="runs the kernels in the interpreter")
def test_two_processes_have_the_gradient_of_one(two_processes):
    assert float(two_processes(Path(__file__).with_name("sharded_gradient.py"))) <= 1e-6
