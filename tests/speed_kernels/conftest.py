"""The numerical yardstick for kernels."""

import pytest


@pytest.fixture(scope="session")
def assert_accurate():
    """Compare with float64 truth, allowing ``factor`` times the error that eager PyTorch makes."""

    def check(name, actual, eager, truth, factor=2.0):
        error, eager_error = ((v.double() - truth).abs().max().item() for v in (actual, eager))
        allowed = factor * eager_error + 1e-6 * truth.abs().max().item()
        assert error <= allowed, f"{name}: error {error:.3e}, allowed {allowed:.3e}"

    return check
