"""Models of diffusers and transformers, from a folder or the hub; both libraries are optional."""

import hashlib
import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from speed_engine.runtime.checks import UserError, printable

# One of them is in the cache where a model, a tokenizer or a processor is.
_CONFIGS = ("config.json", "tokenizer_config.json", "preprocessor_config.json")
_PATIENCE = 10  # seconds in which the hub says whether it has a model


def load_pretrained(library: str, kind: str, name: str, **options: Any) -> Any:
    """An object of a library's class ``kind``.

    Args:
        library: diffusers or transformers.
        kind: name of the class.
        name: folder of the object, or its name on the hub.
        options: further ones of ``from_pretrained``.

    Raises:
        UserError: the library is missing, or cannot load it.
    """
    is_here = importlib.util.find_spec(library) is not None  # else it is named below, unasked
    if is_here and not options.get("local_files_only"):
        _find(kind, name, options.get("subfolder", ""))
    try:
        loader = getattr(importlib.import_module(library), kind)
    except Exception as error:  # RuntimeError, too: a torchvision of another torch breaks imports
        raise UserError(
            f"this needs the library {library} ({error}): pip install 'speed-engine[prepare]'."
        ) from error
    try:
        return loader.from_pretrained(name, **options)
    except Exception as error:  # of many kinds, by library, network and content
        raise UserError(f"{kind} {name!r} cannot be loaded: {error}") from error


def _find(kind: str, name: str, subfolder: str) -> None:
    """Refuse a name that leads nowhere by one question; the libraries ask for half a minute."""
    if Path(name).is_dir():
        return
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise UserError(f"{kind}: {printable(name)} is no folder, nor a name of the hub.")
    try:
        hub: Any = importlib.import_module("huggingface_hub")
    except ImportError:
        return  # the library that loads is missing, too, and is asked for by its name
    files = [f"{subfolder}/{file}".lstrip("/") for file in _CONFIGS]
    try:
        if any(isinstance(hub.try_to_load_from_cache(name, file), str) for file in files):
            return
        hub.HfApi().model_info(name, timeout=_PATIENCE)
    except Exception as error:  # no such model, no access, no network, no name of the hub
        raise UserError(
            f"{kind}: {name} is no folder here and not in the cache of the Hugging Face hub, and "
            f"the hub does not answer for it: {error}"
        ) from error


def load_model(library: str, kind: str, name: str, device: torch.device, **options: Any) -> Any:
    """A model for inference, else as above; weights that are not safetensors are refused."""
    model = load_pretrained(library, kind, name, use_safetensors=True, **options)
    return model.to(device).eval().requires_grad_(False)


def weights_hash(model: nn.Module) -> str:
    """SHA-256 of a model's weights, as data sets and records of version 0.1 hold it."""
    return sha256_of(model.state_dict(), head="{name} {shape} {dtype}")


def sha256_of(tensors: Mapping[str, Tensor], head: str = "{name} {dtype} {shape}\n") -> str:
    """SHA-256 of names, types, shapes and values, 64 hexadecimal digits.

    Args:
        tensors: by name, in any order.
        head: what is hashed before a tensor's values.
    """
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(head.format(name=name, dtype=value.dtype, shape=tuple(value.shape)).encode())
        digest.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
