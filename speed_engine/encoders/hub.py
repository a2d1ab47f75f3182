"""Models of diffusers and transformers, from a folder or the hub; both libraries are optional."""

import hashlib
import importlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

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
