"""One of two processes that train a run on latents and measure it; run by test_latent_figures.py.

Usage: ``latent_figures.py FOLDER`` in an environment as torchrun's, with what ``config_of`` names
in the folder. The run becomes FOLDER/run.
"""

import sys
from pathlib import Path

from rich.console import Console
from test_latent_figures import without_figures
from tiny_latents import config_of

from speed_engine.commands.evaluate import evaluate
from speed_engine.run.folder import read_config
from speed_engine.run.starting import start
from speed_engine.runtime.world import join

folder = Path(sys.argv[1])
run = folder / "run"
start(config_of(folder), run, Console(quiet=True))
world = join("cpu")
if world.is_first:
    without_figures(run)
world.barrier()
evaluate(run, read_config(run))
