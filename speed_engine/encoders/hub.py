"""Models of diffusers and transformers, from a folder or the hub; both libraries are optional."""

import hashlib
import importlib
from typing import Any

import torch
from torch import nn

from speed_engine.runtime.checks import UserError


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


def load_model(library: str, kind: str, name: str, device: torch.device, **options: Any) -> Any:
    """A model for inference, else as above; weights that are not safetensors are refused."""
    model = load_pretrained(library, kind, name, use_safetensors=True, **options)
    return model.to(device).eval().requires_grad_(False)


def weights_hash(model: nn.Module) -> str:
    """SHA-256 of names, shapes and values."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
