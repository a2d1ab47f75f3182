"""Whole runs on a GPU, from the command line: digits with FID, and one that is killed."""

import json
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from gpu_rows import Rows

TRAIN = (sys.executable, "-m", "speed_engine", "train")
KILLED_AFTER, STEPS = 250, 400


def measure(rows: Rows) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows.row("killed and resumed", 45, partial(killed, folder, rows))
        for method in ("uniform", "speed_paper"):
            rows.row(f"digits, {method}", 60, partial(digits, folder, rows, method))


def digits(folder: Path, rows: Rows, method: str) -> dict[str, Any]:
    """The preset to its end."""
    run = folder / method
    begin = time.monotonic()
    done = _run("digits", "--method", method, "--run", str(run), seconds=rows.left())
    found = {"wall_seconds": round(time.monotonic() - begin, 1), "output": done[-1500:]}
    records = _records(run)
    return found | {"last": records[-1], "evaluations": [r for r in records if "fid" in str(r)]}


def killed(folder: Path, rows: Rows) -> dict[str, Any]:
    """A run that is killed by SIGKILL and resumed, against one that is not."""
    options = ("digits", "--steps", str(STEPS), "--checkpoint-every", "100", "--log-every", "10")
    options += ("--evaluation.features", "none", "--evaluation.num-images", "10")
    _run(*options, "--run", str(folder / "whole"), seconds=rows.left())
    if rows.left() < 40:
        raise TimeoutError("the whole run left no time for one that is killed")
    torn = folder / "torn"
    process = subprocess.Popen([*TRAIN, *options, "--run", str(torn)], stdout=subprocess.DEVNULL)
    try:
        while process.poll() is None and _steps(torn) < KILLED_AFTER and rows.left() > 20:
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()
    at = _steps(torn)
    _run("--resume", str(torn), seconds=rows.left())
    whole, resumed = _losses(folder / "whole"), _losses(torn)
    same = {step: whole[step] == loss for step, loss in resumed.items() if step in whole}
    return {
        "killed_after_step": at,
        "steps": max(resumed),
        "first_step_that_differs": next((step for step, equal in same.items() if not equal), None),
        "last_losses": [whole[STEPS], resumed[STEPS]],
    }


def _run(*options: str, seconds: float) -> str:
    done = subprocess.run(
        [*TRAIN, *options], capture_output=True, text=True, timeout=max(seconds, 1)
    )
    if done.returncode:
        raise RuntimeError(done.stdout[-500:] + done.stderr[-1500:])
    return done.stdout


def _records(run: Path) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def _losses(run: Path) -> dict[int, float]:
    return {record["step"]: record["loss"] for record in _records(run) if "loss" in record}


def _steps(run: Path) -> int:
    return max(_losses(run), default=0)
