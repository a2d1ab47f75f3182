"""What the tests on the null device share: the device, and what was compiled for it."""

import null_device
import pytest


def pytest_collection_modifyitems(items):
    reason = null_device.obstacle()
    for item in items:
        if reason and item.path.parent == null_device.HERE:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def compiled(session_folder):
    """Folder of compiled code."""
    return session_folder / "compiled_for_the_null_device"
