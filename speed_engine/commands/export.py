"""``speed-engine export``: a trained model's weights for another library."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from rich.console import Console

from speed_engine.commands.options import read_options
from speed_engine.models.config import DiTConfig
from speed_engine.models.layouts.files import save_pretrained
from speed_engine.run import load_average, read_config
from speed_engine.training.ema import EMA


@dataclass(frozen=True)
class ExportCommand:
    """Write the EMA of a run's parameters as weights for another library."""

    run: tyro.conf.Positional[Path]
    """Folder of the run."""
    out: Path
    """What to write: a .safetensors file for the layout original, a folder for diffusers."""
    layout: Literal["original", "diffusers"] = "original"
    """Layout of the weights: original is that of the model's own code (facebookresearch/DiT),
    diffusers that of DiTTransformer2DModel."""
    average: str = EMA
    """Which EMA of the parameters to write: ema, or one that the run's optimizer.averages names."""


def run(arguments: list[str], console: Console) -> None:
    """Write the weights."""
    command = read_options(ExportCommand, arguments, "speed-engine export")
    config = read_config(command.run)
    model, step = load_average(command.run, config, torch.device("cpu"), command.average)
    for path in save_pretrained(model, command.out, command.layout):
        console.print(
            f"weights of step {step}: {path}", highlight=False, markup=False, soft_wrap=True
        )
    shift = config.model.frequency_shift if isinstance(config.model, DiTConfig) else 1
    if command.layout == "diffusers" and shift != 1:
        console.print(
            f"diffusers computes time features with a frequency shift of 1, this model with "
            f"{shift:g}: after from_pretrained, call "
            f"speed_engine.models.layouts.dit.set_frequency_shift(transformer, {shift:g}).",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
