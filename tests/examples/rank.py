"""One process of an example, whose draws are kept: ``rank.py DRAWS EXAMPLE [ARGUMENTS]``."""

import os
import runpy
import sys

import torch

from speed_engine.diffusion.fitted import Method

_, draws, example, *arguments = sys.argv
kept, draw = [], Method.draw


def kept_draw(self, batch, step, *rest, **options):
    timesteps, weights = draw(self, batch, step, *rest, **options)
    kept.append((int(step), timesteps.cpu()))
    return timesteps, weights


Method.draw = kept_draw
sys.argv = [example, *arguments]
runpy.run_path(example, run_name="__main__")
torch.save(kept, f"{draws}-{os.environ.get('RANK', '0')}.pt")
