"""A configured data set: its shards, what a model is conditioned on, and how images become clean.

Letters: L tokens of a text, D width of a token; C channels, h x w pixels of a smaller image.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from speed_engine.data.config import DataConfig
from speed_engine.data.format.folder import open_folder
from speed_engine.data.format.held_out import Part
from speed_engine.data.format.index import Contents
from speed_engine.data.format.reader import ShardReader
from speed_engine.data.format.remote import Cache, is_url
from speed_engine.data.loading.clean import Cleaning
from speed_engine.data.loading.conditions import (
    NULL_TOKENS,
    condition_name,
    decode_null_tokens,
    load_null_tokens,
)
from speed_engine.data.preparing.sources.digits import digits_folder
from speed_engine.runtime.checks import UserError
from speed_engine.runtime.files import cache_folder


def open_data(
    data: DataConfig, members: Sequence[str] | None = None, part: Part | None = "training"
) -> ShardReader:
    """The configured shards.

    Args:
        data: configuration.
        members: extensions to read; by default the configured ones.
        part: of the samples, or None for both parts of ``data.source``, of which alone
            ``data.exclude`` names shards.

    Raises:
        UserError: they are damaged, or lack a member that the model is to be conditioned on.
    """
    source, exclude = data.source, data.exclude
    if part == "held_out" and data.test_source is not None:
        source, exclude = data.test_source, None
    return ShardReader(
        _place(source),
        members or data.members,
        _cache(data),
        exclude,
        data.held_out,
        part,
    )


def contents_of(data: DataConfig) -> Contents:
    """What is known of the members that the configured shards have, by their extensions."""
    folder = open_folder(_place(data.source), _cache(data))
    return folder.load(())[0].contents


def condition_names(data: DataConfig) -> tuple[str, ...]:
    """What a model is conditioned on, as its arguments are named."""
    return tuple(condition_name(member) for member in data.members[1:])


def condition_shapes(data: DataConfig) -> dict[str, tuple[int, ...]]:
    """Shape of one row of each condition: () of labels, (L, D) of tokens, (C, h, w)."""
    shapes = {"labels": (), "tokens": data.token_shape, "low_resolution": data.low_shape}
    return {name: shapes[name] for name in condition_names(data)}


def null_conditions(data: DataConfig) -> dict[str, Tensor]:
    """One row of each condition that can be hidden, as it is when hidden."""
    null: dict[str, Callable[[], Tensor]] = {
        "labels": lambda: torch.tensor(data.num_classes),
        "tokens": lambda: torch.from_numpy(_null_tokens(data)),
    }
    return {name: null[name]() for name in condition_names(data) if name in null}


def stored_shape(data: DataConfig, reader: ShardReader) -> tuple[int, int, int]:
    """Shape of an image in the shards: of a posterior twice the channels, else the configured."""
    channels, height, width = data.image_shape
    return (2 if _stores_posterior(data, reader) else 1) * channels, height, width


def build_cleaning(
    data: DataConfig, reader: ShardReader, seed: int, device: torch.device
) -> Cleaning:
    """How stored images become clean ones, on the device.

    Raises:
        UserError: latents as a VAE gives them, and nothing says how to scale them.
    """
    metadata = reader.dataset.metadata if data.latents else {}
    posterior = _stores_posterior(data, reader)
    if posterior and "latent_scale" not in metadata:
        raise UserError(
            f"{data.source} holds mean and standard deviation of latents, and its record "
            "does not say by which latent_scale to multiply them; encode it again."
        )
    return Cleaning(
        seed=torch.tensor(seed, device=device),
        posterior=posterior,
        scale=float(metadata.get("latent_scale", 1.0)),
        shift=float(metadata.get("latent_shift", 0.0)),
        flip=data.flip,
    )


def _cache(data: DataConfig) -> Cache:
    return Cache(cache_folder() / "shards", int(data.cache_gb * 1e9))


def _place(source: str) -> Path | str:
    """Path or URL of the shards; an embedded data set is written to the cache first."""
    if source == "digits":
        return digits_folder()
    return source if is_url(source) else Path(source).expanduser()


def _stores_posterior(data: DataConfig, reader: ShardReader) -> bool:
    """Whether the data set holds mean and standard deviation of latents, to sample from."""
    content = reader.dataset.contents.get(data.members[0], {})
    shape = content.get("shape") or (None,)
    return data.latents and shape[0] == 2 * data.image_shape[0]


def _null_tokens(data: DataConfig) -> np.ndarray:
    source = _place(data.source)
    if isinstance(source, Path):
        return load_null_tokens(source)
    return decode_null_tokens(open_data(data).read_file(NULL_TOKENS), f"{source}/{NULL_TOKENS}")
