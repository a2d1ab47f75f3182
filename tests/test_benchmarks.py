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
    losses = ("noise", "loss", "hybrid_loss", "stored_noise", "clean_images")
    for section in (*losses, "adaln", "block", "qk_norm_rope", "group_norm", "optimizer"):
        assert f"{section}: " in done.stdout


def test_the_table_of_loaders_is_that_of_the_result():
    paths = os.pathsep.join(str(ROOT / folder) for folder in (".", "kernels", "benchmarks"))
    result = ROOT / "benchmarks" / "results" / "x86-64-2-cores" / "loader.json"
    code = f"import bench_loader, json; print(bench_loader.table(json.load(open({str(result)!r}))))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout in (ROOT / "benchmarks" / "README.md").read_text()
