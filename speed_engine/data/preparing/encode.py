"""Pictures to latents of a variational autoencoder (VAE), captions to tokens of a text encoder.

    npy              (2 C, H, W) float16: mean, then standard deviation of the posterior, unscaled
                     as the VAE gives them; training draws from it and applies ``latent_scale``
    tokens.npy       (L, D) float16: last hidden state for the first line of the sample's txt
    null_tokens.npy  a file beside the shards: the same for the empty caption; kept where it is
                     there and no text is encoded

Every shard is encoded on its own, so any number of processes, each with a device of its own, may
share the work (``prepare.py``). Weights are read from safetensors only.

Letters: B pictures, C channels and H, W of a latent, L tokens of D.
"""

import logging
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from speed_engine.data.format.decode import decode_image
from speed_engine.data.format.folder import LocalFolder
from speed_engine.data.format.index import ShardIndex
from speed_engine.data.format.reader import ShardReader
from speed_engine.data.format.record import Dataset
from speed_engine.data.format.writer import write_shard
from speed_engine.data.loading.conditions import (
    NULL_TOKENS,
    load_null_tokens,
    null_tokens_path,
)
from speed_engine.data.preparing.pictures import npy_bytes
from speed_engine.data.preparing.prepare import Preparation
from speed_engine.encoders.hub import weights_hash
from speed_engine.encoders.text import TextEncoder
from speed_engine.encoders.vae import load_vae
from speed_engine.ops import from_pixels
from speed_engine.runtime.checks import UserError
from speed_engine.runtime.files import write_durably

PICTURES = ("png", "jpg", "jpeg", "webp", "npy")
_DECODING_THREADS = 4
Sample = tuple[str, str, dict[str, bytes]]  # key, description for messages, members
_log = logging.getLogger(__name__)


class LatentEncoder:
    """The encoder of a VAE.

    Args:
        name: folder of a diffusers ``AutoencoderKL``, or its name on the hub.
        device: where it runs.

    Raises:
        UserError: diffusers is missing, or cannot load it.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        self.vae, self._device = load_vae(name, device), device
        scale, shift = self.vae.config.scaling_factor, self.vae.config.shift_factor
        self.metadata = {"vae": name, "latent_scale": scale, "latent_shift": shift or 0.0}
        self.identity = weights_hash(self.vae)

    @torch.inference_mode()
    def __call__(self, images: np.ndarray) -> np.ndarray:
        """(B, 3, 8 H, 8 W) uint8 -> (B, 2 C, H, W) float16."""
        pixels = from_pixels(torch.from_numpy(images).to(self._device))
        posterior = self.vae.encode(pixels).latent_dist
        return torch.cat([posterior.mean, posterior.std], dim=1).half().cpu().numpy()


def encode(
    shards: Path,
    out: Path,
    latents: LatentEncoder | None,
    text: TextEncoder | None,
    *,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    advance: Callable[[int], object] = lambda samples: None,
) -> None:
    """Write shards of the same names and samples, with latents for pictures and tokens beside txt.

    Args:
        shards: folder of a data set.
        out: folder, new, empty or of the same encoding, which is continued.
        latents: replaces the picture; None keeps it.
        text: adds tokens; None does not.
        batch_size: samples at a time.
        rank: this process takes the shards ``rank``, ``rank + world_size``, ...
        world_size: number of processes.
        advance: called with the samples that are there already, then with those of each shard.

    Raises:
        UserError: nothing to do, a data set without what is needed, or an unusable sample.
        OSError: the disk is full, for example; the folder can be continued.
    """
    encoders = [encoder for encoder in (latents, text) if encoder is not None]
    if not encoders:
        raise UserError("nothing to encode: give a VAE, a text encoder or both.")
    if batch_size < 1 or not 0 <= rank < world_size:
        raise UserError(f"batch_size={batch_size} is below 1, or rank={rank} of {world_size}.")
    dataset, indices = LocalFolder(shards).load(())
    picture = _picture_member(shards, dataset, latents is not None, text is not None)
    reader = ShardReader(shards, sorted(dataset.contents))
    plan = {
        "source": dataset.fingerprint,
        "latents": latents and latents.identity,
        "tokens": text and text.identity,
        "batch_size": batch_size,
    }
    preparation = Preparation(out, plan, [shard.name for shard in dataset.shards])
    has_null = text is not None or null_tokens_path(shards).is_file()
    if has_null and rank == 0:
        null = load_null_tokens(shards) if text is None else text([""])[0]
        write_durably(out / NULL_TOKENS, npy_bytes(null))
    pending, first = set(preparation.pending()), 0
    mine = range(rank, len(indices), world_size)
    advance(sum(len(indices[shard]) for shard in mine if shard not in pending))
    with ThreadPoolExecutor(_DECODING_THREADS) as threads:
        for shard, index in enumerate(indices):
            if shard % world_size == rank:
                if shard in pending:
                    samples = _read(reader, index, first)
                    encoded = _encoded(samples, picture, latents, text, batch_size, threads)
                    write_shard(preparation.path(shard), encoded)
                    advance(len(index))
            first += len(index)
    if text is not None and text.truncated:
        _log.warning("%d captions were longer than the text encoder takes and cut", text.truncated)
    metadata = dict(dataset.metadata)
    for encoder in encoders:
        metadata |= encoder.metadata
    preparation.finish(metadata, [NULL_TOKENS] if has_null else [])


def _picture_member(shards: Path, dataset: Dataset, need_picture: bool, need_text: bool) -> str:
    """The extension of the pictures; a data set without what is needed fails here."""
    have = {extension: str(content) for extension, content in dataset.contents.items()}
    pictures = [
        extension
        for extension in PICTURES
        if dataset.contents.get(extension, {}).get("dtype") == "uint8"
    ]
    if need_picture and not pictures:
        raise UserError(f"{shards} has no pictures ({', '.join(PICTURES)} of uint8), only {have}.")
    if need_text and "txt" not in have:
        raise UserError(f"{shards} has no captions (txt), only {have}.")
    return pictures[0] if pictures else ""


def _read(reader: ShardReader, index: ShardIndex, first: int) -> Iterator[Sample]:
    """The samples of one shard; ``first`` is the number of its first."""
    for n in range(len(index)):
        yield index.key(n), reader.describe(first + n), reader.read(first + n)


def _encoded(
    samples: Iterator[Sample],
    picture: str,
    latents: LatentEncoder | None,
    text: TextEncoder | None,
    batch_size: int,
    threads: ThreadPoolExecutor,
) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Keys and members; one batch is decoded while that before is encoded."""
    ahead: tuple[list[Sample], list[Future[np.ndarray]]] | None = None
    while batch := list(islice(samples, batch_size)):
        images = [threads.submit(_decode, sample, picture) for sample in batch if latents]
        if ahead is not None:
            yield from _encode_batch(*ahead, picture, latents, text)
        ahead = batch, images
    if ahead is not None:
        yield from _encode_batch(*ahead, picture, latents, text)


def _decode(sample: Sample, picture: str) -> np.ndarray:
    """(3, 8 H, 8 W) uint8."""
    _, name, members = sample
    try:
        image = decode_image(members[picture], picture, 3)
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[0] not in (1, 3):
            raise UserError(f"the picture is {image.dtype} of shape {image.shape}.")
    except ValueError as error:
        raise UserError(f"{name}: {error}") from error
    return np.broadcast_to(image, (3, *image.shape[1:]))


def _encode_batch(
    batch: list[Sample],
    images: list[Future[np.ndarray]],
    picture: str,
    latents: LatentEncoder | None,
    text: TextEncoder | None,
) -> Iterator[tuple[str, dict[str, bytes]]]:
    added: list[dict[str, bytes]] = [{} for _ in batch]
    if latents is not None:
        encoded = latents(_stack([image.result() for image in images]))
        for (_, name, _), new, latent in zip(batch, added, encoded, strict=True):
            if not np.isfinite(latent).all():
                raise UserError(f"{name}: the VAE makes of it what float16 cannot hold.")
            new["npy"] = npy_bytes(latent)
    if text is not None:
        captions = [members["txt"].decode().partition("\n")[0] for _, _, members in batch]
        for new, tokens in zip(added, text(captions), strict=True):
            new["tokens.npy"] = npy_bytes(tokens)
    for (key, _, members), new in zip(batch, added, strict=True):
        kept = {e: data for e, data in members.items() if not (latents and e == picture)}
        yield key, kept | new


def _stack(images: list[np.ndarray]) -> np.ndarray:
    if len(shapes := {image.shape for image in images}) > 1:
        raise UserError(f"pictures of several shapes, {sorted(shapes)}; make shards of one size.")
    return np.stack(images)
