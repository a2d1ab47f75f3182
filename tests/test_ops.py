"""Which implementation a device gets, and that doctor says the same."""

import torch

from speed_engine.environment import choose_kernels
from speed_engine.ops import FUSED, HAS_TRITON, REFERENCE, operators_for


def test_kernels_run_on_cuda_and_references_elsewhere():
    assert operators_for(torch.device("cuda", 3)) is (FUSED if HAS_TRITON else REFERENCE)
    for device in ("cpu", "mps", "meta"):
        assert operators_for(torch.device(device)) is REFERENCE


def test_doctor_names_the_implementation_that_runs():
    for device in ("cuda", "cpu"):
        fused = operators_for(torch.device(device)) is FUSED
        assert choose_kernels(device).value == ("Triton" if fused else "PyTorch reference")
