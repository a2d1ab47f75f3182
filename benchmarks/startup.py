"""How long from the command to the first step is done? By part, each time in a process of its own.

import   until the modules of training are loaded
build    until the first step begins: data, features, model
step     the first step; compiled, this compiles, or finds compiled code of an earlier run
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from harness import summary

PARTS = ("import", "build", "step", "total")
CASES = {  # how it is compiled, and whether the caches of compilers begin empty
    "eager": ("off", False),
    "compiled, caches empty": ("on", True),
    "compiled, caches kept": ("on", False),
}
REPEATS = 2


def cases(device: torch.device, options: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    """One measurement, of the digits preset."""
    return {"": partial(measure, options)}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of every part, the cases in turn."""
    chosen = {"eager": CASES["eager"]} if options.dry_run else CASES
    seconds: dict[str, list[dict[str, float]]] = {name: [] for name in chosen}
    with tempfile.TemporaryDirectory() as kept:
        for turn in range(1 if options.dry_run else 1 + REPEATS):
            for name, (how, empty) in chosen.items():
                with tempfile.TemporaryDirectory() as folder:
                    found = first_step(how, Path(folder), folder if empty else kept)
                if turn or options.dry_run:  # the first one fills caches
                    seconds[name].append(found)
    figures = {
        name: {part: summary([one[part] for one in found])._asdict() for part in PARTS}
        for name, found in seconds.items()
    }
    for name, parts in figures.items():
        print(f"{name:24}", *(f"{part} {t['median']:6.2f} s" for part, t in parts.items()))
    return {"case": "speed-engine train digits", "seconds": figures}


def first_step(how: str, folder: Path, compiled_code: str) -> dict[str, float]:
    """Of one command, until its first step is done."""
    environment = os.environ | {
        "TORCHINDUCTOR_CACHE_DIR": f"{compiled_code}/inductor",
        "TRITON_CACHE_DIR": f"{compiled_code}/triton",
    }
    done = subprocess.run(
        [sys.executable, __file__, str(time.time()), how, str(folder / "run")],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def child(begin: float, how: str, run: str) -> None:
    """Train to the end of the first step, print the seconds of each part, and stop there."""
    from speed_engine import cli
    from speed_engine.training.engine import Engine

    imported = time.time()
    step = Engine.step

    def first(engine: Engine, batch: Any) -> None:
        built = time.time()
        float(step(engine, batch).loss)
        now = time.time()
        marks = (imported - begin, built - imported, now - built, now - begin)
        print(json.dumps(dict(zip(PARTS, marks, strict=True))), flush=True)
        os._exit(0)

    Engine.step = first  # pyright: ignore[reportAttributeAccessIssue]
    cli.main(["train", "digits", "--compile", how, "--run", run])


if __name__ == "__main__":
    child(float(sys.argv[1]), *sys.argv[2:])
