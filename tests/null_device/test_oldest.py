"""Both ends of what is allowed: these tests run on the oldest PyTorch, too."""

import os
import subprocess

import null_device
import pytest

import toolchain

OLDEST = toolchain.TORCH_2_11_TRITON_3_6
SCRIPT = """
set -euo pipefail
source scripts/environment.sh "[dev]" oldest
"$PYTHON" -c 'import sys, torch; sys.exit(not torch.__version__.startswith(sys.argv[1]))' {torch}
cd tests/null_device
"$PYTHON" -m pytest -q -n 0 -m "" -k "{tests}" \\
    test_compilation.py test_null_device.py test_run.py test_steps.py
"""
TESTS = "not test_steps or digits or not_compiled or imagenet256-dit-xl2 or imagenet256-mdt-s2"


@pytest.mark.long
@pytest.mark.skipif(toolchain.HERE == OLDEST, reason="this is the oldest PyTorch")
def test_runs_and_compiled_steps_are_those_of_the_oldest_pytorch_too():
    """In an environment of its own, which is made the first time and kept in the project."""
    environment = {n: v for n, v in os.environ.items() if not n.startswith(("PYTEST", "TRITON"))}
    done = subprocess.run(
        ["bash", "-c", SCRIPT.format(torch=OLDEST.torch, tests=TESTS)],
        cwd=null_device.ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout, done.stdout[-2000:]
