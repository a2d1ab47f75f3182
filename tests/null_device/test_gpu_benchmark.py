"""``benchmarks/gpu.py``, which a rented GPU has fifteen minutes for, section by section.

Nothing is computed, so figures mean nothing: rows run, end in time and are kept.
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import null_device
import pytest

import gpu
from speed_engine import cli

GRACE = 60  # seconds to start, and until a late row has ended
LATE = ("OutOfTime", "TimeoutError", "TimeoutExpired")  # of rows, where cores are too slow


@pytest.fixture
def begun(compiled, tmp_path):
    """Start a section in a folder; returns the process and where its rows will be."""
    processes = []

    def begin(section: str, folder: Path = null_device.ROOT) -> tuple[subprocess.Popen[str], Path]:
        environment = null_device.environment(compiled)
        environment["PYTHONPATH"] += f":{null_device.HERE / 'every_process'}"
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", str(null_device.HERE / "gpu_section.py")]
            + [str(tmp_path / "results"), section],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        processes.append(process)
        return process, tmp_path / "results" / "nvidia-h200" / f"gpu_{section}.json"

    yield begin
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.long
@pytest.mark.parametrize("section", gpu.SECTIONS)
def test_every_row_runs_within_the_seconds_of_its_section(section, begun, tmp_path):
    for name in ("cifar16", "cifar16-test"):
        out = str(tmp_path / "shards" / name)
        cli.main(["shards", "make", "digits", out, "--size", "16", "--channels", "3"])
    begin, seconds = time.monotonic(), gpu.SECTIONS[section][1]
    process, path = begun(section, tmp_path if section == "arena" else null_device.ROOT)
    printed, _ = process.communicate(timeout=seconds + GRACE)
    rows = json.loads(path.read_text())["rows"]
    heard_nothing = any("no interrupt" in row.get("failed", "") for row in rows.values())
    assert process.returncode == (1 if heard_nothing else 0), printed[-8000:]
    print({name: row["seconds"] for name, row in rows.items()}, time.monotonic() - begin)
    failed = {name: row["failed"] for name, row in rows.items() if "failed" in row}
    assert all(text.startswith(LATE) for text in failed.values()), failed
    measured = [name for name, row in rows.items() if not row.keys() & {"failed", "left_out"}]
    # Few cores may be too slow for a whole run, or nine at a time.
    assert measured or section in ("train", "arena"), rows


@pytest.mark.long
def test_whenever_it_is_killed_the_rows_before_are_there(begun):
    process, path = begun("tune")
    until, found = None, {}
    while process.poll() is None and (until is None or time.monotonic() < until):
        if path.exists():
            found = json.loads(path.read_text())["rows"]  # at any moment the file is whole
            until = until or time.monotonic() + random.uniform(0, 3)
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    kept = json.loads(path.read_text())["rows"]
    assert list(kept)[: len(found)] == list(found) and len(kept) >= len(found) > 0
