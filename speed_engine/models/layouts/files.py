"""Weights in files of other libraries' layouts.

``original``    names as in the model's original code, such as facebookresearch/DiT, which are ours;
                one safetensors file, or the .pt files that such code writes
``diffusers``   ``DiTTransformer2DModel``: a folder with config.json and one safetensors file

U-Nets are read from the files of latent-diffusion, EDM and diffusers, too, see ``unet.py``.
"""

import argparse
import json
import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from speed_engine.models.dit import DiT
from speed_engine.models.edm_unet import DhariwalUNet, SongUNet
from speed_engine.models.layouts import dit, unet
from speed_engine.models.super_resolution import SuperResolution
from speed_engine.models.unet import UNet
from speed_engine.runtime.checks import UserError, require_shapes, shortened
from speed_engine.runtime.files import new_folder, save_tensors

LAYOUTS = ("original", "diffusers")
DIFFUSERS_FILE = "diffusion_pytorch_model.safetensors"
RUN_FILE = "ema.safetensors"  # in the folder of a run
WRAPPERS = ("module.", "_orig_mod.")  # of DistributedDataParallel and torch.compile
SAVED_FILE = "model.safetensors"  # in the folder of a model that the API saved, beside
SAVED_FACTS = "speed_engine.json"
SHIFT = "frequency_shift"  # in the metadata of files written here


def load_pretrained(model: nn.Module, path: Path) -> None:
    """Copy the weights of a file into a model, by name.

    Args:
        model: of the file's sizes.
        path: a .safetensors file of either layout, a folder that diffusers saved, of a model or of
            a pipeline, the folder of a run that is complete, or a .pt file, of which the EMA is
            taken where there is one; prefixes of names that torch.compile and
            DistributedDataParallel add are left out. A .pt file is a pickle: it is read by
            PyTorch's restricted reader, which runs no code.

    Raises:
        UserError: no such file, not such a file, or tensors that are missing, left over or of
            other shapes (lists them); time features of another frequency shift, or a config.json
            beside a run's or a saved model's weights that does not say which; diffusers' layout
            for a model that it cannot hold, or with embeddings that differ between blocks.
    """
    path = _weights_in(path) if path.is_dir() else path
    tensors, metadata = _read(path)
    metadata = metadata if SHIFT in metadata else _configured(path)
    try:
        ours = _as_ours(model, _unwrapped(tensors), metadata)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    load_parameters(model, ours, path)


def load_parameters(model: nn.Module, tensors: Mapping[str, Tensor], source: Path) -> None:
    """Copy tensors into a model, which must have the same names and shapes.

    Args:
        model: that they are for.
        tensors: by name.
        source: what they were read from, for messages.

    Raises:
        UserError: names or shapes differ; lists them.
    """
    require_shapes(shapes(model.state_dict()), shapes(tensors), source)
    model.load_state_dict(tensors)


def save_pretrained(model: nn.Module, path: Path, layout: str) -> list[Path]:
    """Write a model's weights: a .safetensors file for ``original``, a folder for ``diffusers``.

    Returns:
        The files written.

    Raises:
        UserError: an unknown layout, a path that is taken, or a model that diffusers cannot hold.
    """
    if layout not in LAYOUTS:
        raise UserError(f"layout={layout!r} is unknown; choose from {', '.join(LAYOUTS)}.")
    if path.exists():
        raise UserError(f"{path} exists already; name another path.")
    metadata = {"format": "pt", SHIFT: str(_shift_of(model))}
    if layout == "original":
        if path.suffix != ".safetensors":
            raise UserError(f"{path} must end in .safetensors in layout original.")
        path.parent.mkdir(parents=True, exist_ok=True)
        save_tensors(_owned(model.state_dict()), path, metadata)
        return [path]
    if not isinstance(model, DiT):
        raise UserError(f"layout diffusers is for DiTs, and this is a {type(model).__name__}.")
    tensors = _owned(dit.to_diffusers(model))
    config = dit.diffusers_config(model)
    with new_folder(path) as partial:
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        save_tensors(tensors, partial / DIFFUSERS_FILE, metadata)
    return [path / "config.json", path / DIFFUSERS_FILE]


def shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Of each, by name."""
    return {name: tuple(value.shape) for name, value in tensors.items()}


def _weights_in(folder: Path) -> Path:
    """The file of weights in a folder.

    Raises:
        UserError: there is none, or several.
    """
    names = (DIFFUSERS_FILE, f"transformer/{DIFFUSERS_FILE}", f"unet/{DIFFUSERS_FILE}", RUN_FILE)
    found = [name for name in names if (folder / name).is_file()]
    if len(found) != 1:
        raise UserError(
            f"{folder} holds {' and '.join(found) or 'none'} of {', '.join(names)}; name the file "
            f"of weights. A run has {RUN_FILE} when it is complete."
        )
    return folder / found[0]


def _unwrapped(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same names without what wrappers of a model put before all of them."""
    for prefix in WRAPPERS * len(WRAPPERS):
        if tensors and all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
    return tensors


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata) of a file."""
    if not path.is_file():
        raise UserError(f"{path} is no file.")
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
        except SafetensorError as error:
            raise UserError(f"{path} is no safetensors file ({error}).") from error
    if path.suffix not in (".pt", ".pth", ".ckpt"):
        raise UserError(f"{path} ends in none of .safetensors, .pt, .pth and .ckpt.")
    try:
        # DiT's training script stores its arguments beside the weights.
        with torch.serialization.safe_globals([argparse.Namespace]):
            stored = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        why = shortened(str(error) or type(error).__name__)
        raise UserError(
            f"{path} holds more than tensors, or is damaged; nothing of it was run. If you trust "
            f"it, convert it to .safetensors elsewhere. ({why})"
        ) from error
    for part in ("ema", "model", "state_dict"):
        stored = stored.get(part, stored) if isinstance(stored, dict) else stored
    if not isinstance(stored, dict) or not all(isinstance(v, Tensor) for v in stored.values()):
        raise UserError(f"{path} holds no dictionary of tensors, nor one named ema or model.")
    return stored, {}


def _configured(path: Path) -> dict[str, str]:
    """What files without metadata leave to the configuration beside them, of a run or a model."""
    config = path.with_name("config.json")
    is_saved = path.name == SAVED_FILE and path.with_name(SAVED_FACTS).is_file()
    if not (path.name == RUN_FILE or is_saved) or not config.is_file():
        return {}
    try:
        return {SHIFT: str(float(json.loads(config.read_bytes())["model"].get(SHIFT, 0)))}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"{config} is not the configuration of a run or of a saved model, so that it does not "
            f"say which time features {path.name} was trained with; put back the one that was "
            "written with it, or move it elsewhere if it is not of this file."
        ) from error


def _as_ours(
    model: nn.Module, tensors: dict[str, Tensor], metadata: Mapping[str, str]
) -> dict[str, Tensor]:
    """The tensors by the model's names, whatever the layout."""
    of_diffusers = any(name.startswith("transformer_blocks.") for name in tensors)
    if (network := _dit_in(model)) is not None:
        _require_shift(network, of_diffusers, metadata)
    if isinstance(model, DiT):
        if not of_diffusers:
            return tensors
        require_shapes(shapes(dit.to_diffusers(model)), shapes(tensors), "it")
        return dit.from_diffusers(tensors, model)
    if shapes(tensors) == shapes(model.state_dict()):
        return tensors
    if isinstance(model, UNet):
        of_diffusers = any(name.startswith("down_blocks.") for name in tensors)
        if of_diffusers:
            return unet.from_diffusers(tensors, model)
        return unet.from_ldm(tensors)
    if isinstance(model, (SongUNet, DhariwalUNet)):
        return unet.from_edm(tensors)
    return tensors


def _dit_in(model: nn.Module) -> DiT | None:
    network = model.model if isinstance(model, SuperResolution) else model
    return network if isinstance(network, DiT) else None


def _shift_of(model: nn.Module) -> float:
    network = _dit_in(model)
    return 0.0 if network is None else float(network.t_embedder.frequency_shift)


def require_shift(model: nn.Module, config: object) -> None:
    """Of the parameters of a run, the configuration of its model.

    Raises:
        UserError: its time features have another frequency shift.
    """
    if (network := _dit_in(model)) is not None:
        _require_shift(network, False, {SHIFT: str(getattr(config, SHIFT, 0))})


def _require_shift(model: DiT, of_diffusers: bool, metadata: Mapping[str, str]) -> None:
    """The time features that the weights were trained with must be the model's."""
    stated, ours = metadata.get(SHIFT), _shift_of(model)
    assumed = dit.DIFFUSERS_SHIFT if of_diffusers else 0.0
    theirs = float(stated) if stated is not None else assumed
    if theirs != ours:
        layout = LAYOUTS[of_diffusers]
        reason = "is recorded for it" if stated is not None else f"is that of layout {layout}"
        raise UserError(
            f"a frequency shift of {theirs:g} {reason}, and the model has {ours:g}; set "
            f"model.frequency_shift={theirs:g}."
        )


def _owned(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU, since safetensors refuses tensors that share memory."""
    return {name: value.detach().cpu().clone() for name, value in tensors.items()}
