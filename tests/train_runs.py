"""One of two processes that train runs together; run by test_families.py.

Usage: ``train_runs.py FOLDER`` in an environment as torchrun's. Every CONFIG.json there becomes the
run CONFIG.
"""

import sys
from pathlib import Path

from rich.console import Console

from speed_engine.config import from_json
from speed_engine.run import start

for path in sorted(Path(sys.argv[1]).glob("*.json")):
    start(from_json(path.read_text()), path.with_suffix(""), Console(quiet=True))
