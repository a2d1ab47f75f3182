"""One of two processes that train runs together; run by test_families.py.

Usage: ``train_runs.py FOLDER [--as-on-gpus]`` in an environment as torchrun's. Every CONFIG.json
there becomes the run CONFIG. As on GPUs, models compute in bfloat16, and each run also generates
images of its checkpoint, CONFIG.png.
"""

import sys
from pathlib import Path

from rich.console import Console

from speed_engine.commands.sample import generate_files
from speed_engine.config import from_json
from speed_engine.run.starting import start
from speed_engine.runtime import precision

as_on_gpus = "--as-on-gpus" in sys.argv
if as_on_gpus:
    precision.COMPUTE_DTYPES["cpu"] = precision.COMPUTE_DTYPES["cuda"]
for path in sorted(Path(sys.argv[1]).glob("*.json")):
    config, run, quiet = from_json(path.read_text()), path.with_suffix(""), Console(quiet=True)
    start(config, run, quiet)
    if as_on_gpus:
        generate_files(config, run, path.with_suffix(".png"), quiet, seed=config.seed)
