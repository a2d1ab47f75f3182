"""What the tests on the null device share: the device, and what was compiled for it."""

import os

import null_device
import pytest


def pytest_collection_modifyitems(items):
    reason = null_device.obstacle()
    for item in items:
        if reason and item.path.parent == null_device.HERE:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """Folder of compiled code, of all processes of the session together."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    return folder / "compiled_for_the_null_device"
