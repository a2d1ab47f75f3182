"""A benchmark that nobody can run here still runs."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_every_section_of_the_kernel_benchmark_passes_its_checks_in_a_dry_run():
    paths = os.pathsep.join(str(ROOT / folder) for folder in (".", "kernels", "benchmarks"))
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "bench_kernels.py"), "--dry-run"],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for section in ("noise", "loss", "adaln", "qk_norm_rope", "group_norm", "optimizer"):
        assert f"{section}: " in done.stdout
