"""``speed-engine export``: a trained model's weights for another library."""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from rich.console import Console
from torch import nn

from speed_engine.commands.options import read_options
from speed_engine.config import TrainConfig
from speed_engine.diffusion.schedulers import scheduler_config
from speed_engine.encoders.vae import load_vae
from speed_engine.evaluation.conditions import class_names
from speed_engine.models.config import DiTConfig
from speed_engine.models.layouts.dit import DIFFUSERS_SHIFT
from speed_engine.models.layouts.files import save_pretrained
from speed_engine.run.averages import load_average
from speed_engine.run.folder import read_config
from speed_engine.runtime.checks import UserError
from speed_engine.runtime.files import new_folder
from speed_engine.training.ema import EMA

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ExportCommand:
    """Write the EMA of a run's parameters as weights for another library."""

    run: tyro.conf.Positional[Path]
    """Folder of the run."""
    out: Path
    """What to write: a .safetensors file for the layout original, a folder for diffusers, with the
    model, its scheduler and model_index.json."""
    layout: Literal["original", "diffusers"] = "original"
    """Layout of the weights: original is that of the model's own code (facebookresearch/DiT),
    diffusers that of DiTTransformer2DModel."""
    checkpoint: int | None = None
    """Step of the checkpoint to write; RUN/checkpoints lists them. By default the newest."""
    average: str = EMA
    """Which EMA of the parameters to write: ema, or one that the run's optimizer.averages names."""


def run(arguments: list[str], console: Console) -> None:
    """Write the weights."""
    command = read_options(ExportCommand, arguments, "speed-engine export")
    config = read_config(command.run)
    scheduler: dict[str, Any] = {}
    if command.layout == "diffusers":  # what cannot be written is said before anything is read
        clip = not config.data.latents
        scheduler = scheduler_config(config.schedule, config.num_timesteps, config.prediction, clip)
    device = torch.device("cpu")
    model, step = load_average(command.run, config, device, command.average, command.checkpoint)
    if command.layout == "diffusers":
        paths = _save_pipeline(model, config, scheduler, command.out)
    else:
        paths = save_pretrained(model, command.out, command.layout)
    for path in paths:
        console.print(f"step {step}: {path}", highlight=False, markup=False, soft_wrap=True)
    if command.layout == "diffusers":
        vae = "" if config.data.vae else ", vae=None"
        text = f'load it by DiTPipeline.from_pretrained("{command.out}"{vae})'
        console.print(text, highlight=False, markup=False, soft_wrap=True)
    shift = config.model.frequency_shift if isinstance(config.model, DiTConfig) else 1
    if command.layout == "diffusers" and shift != DIFFUSERS_SHIFT:
        log.warning("%s", _other_features(shift))


def _save_pipeline(
    model: nn.Module, config: TrainConfig, scheduler: dict[str, Any], folder: Path
) -> list[Path]:
    """Model, scheduler, VAE if there is one, and index, as ``DiTPipeline`` reads them."""
    if folder.exists():
        raise UserError(f"{folder} exists already; name another path.")
    with new_folder(folder) as partial:
        written = _write_pipeline(model, config, scheduler, partial)
    return [folder / path.relative_to(partial) for path in written]


def _write_pipeline(
    model: nn.Module, config: TrainConfig, scheduler: dict[str, Any], folder: Path
) -> list[Path]:
    paths = save_pretrained(model, folder / "transformer", "diffusers")
    names = class_names(config.data)
    index = {
        "_class_name": "DiTPipeline",
        "id2label": {str(number): name for number, name in enumerate(names)} or None,
        "scheduler": ["diffusers", scheduler["_class_name"]],
        "transformer": ["diffusers", "DiTTransformer2DModel"],
        "vae": [None, None],
    }
    if config.data.vae is not None:
        load_vae(config.data.vae, torch.device("cpu")).save_pretrained(folder / "vae")
        index["vae"] = ["diffusers", "AutoencoderKL"]
        paths.append(folder / "vae")
    for path, content in {
        folder / "scheduler" / "scheduler_config.json": scheduler,
        folder / "model_index.json": index,
    }.items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content, indent=2) + "\n")
        paths.append(path)
    return paths


def _other_features(shift: float) -> str:
    return (
        f"diffusers computes time features with a frequency shift of 1, this model with {shift:g}, "
        "for which diffusers has no option: what it loads answers otherwise, some per cent off, "
        "unless you call "
        f"speed_engine.models.layouts.dit.set_frequency_shift(transformer, {shift:g}) on it. A "
        "model that is trained with --model.frequency-shift 1, as the presets dit-s and dit-b are, "
        "needs no call."
    )
