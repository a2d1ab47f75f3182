"""Configuration of the data: which images, and how they are read."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from speed_engine.runtime.checks import UserError, check, check_between

_MOST_VALUES = 2**28  # of one image or text: 1 GiB in float32


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where images come from."""

    source: str = "digits"
    """An embedded data set (digits), the path of a folder of shards (.tar), or its URL (https,
    http, s3, gs)."""
    members: tuple[str, ...] = ("npy", "cls")
    """Extensions of a sample's image (npy, png, jpg, jpeg, webp), then of what the model is told of
    it: cls, tokens.npy, low.npy (low.png, ...)."""
    image_shape: tuple[int, int, int] = (1, 8, 8)
    """Channels, height, width of what the model draws."""
    latents: bool = False
    """Images are latents of an autoencoder: unbounded, and no pictures without its decoder."""
    vae: str | None = None
    """That autoencoder, a diffusers AutoencoderKL (folder or hub name), to decode what is drawn."""
    num_classes: int = 10
    """Labels are 0 .. num_classes - 1."""
    token_shape: tuple[int, int] = (77, 768)
    """Tokens of a text and their width."""
    low_shape: tuple[int, int, int] = (3, 64, 64)
    """Channels, height, width of the low-resolution image."""
    workers: int = 0
    """Processes that read ahead; 0 reads in the training process."""
    window: int = 8
    """Shards that are shuffled together; more mixes better, fewer reads more sequentially."""
    mode: Literal["exact", "stream"] = "exact"
    """The order that any number of ranks resumes exactly, or webdataset's streaming, which is not
    exact and reads shards from end to end."""
    flip: bool = False
    """Mirror one image in two, left to right; of latents an approximation."""
    resident: Literal["auto", "on", "off"] = "auto"
    """Keep the whole data set in the device's memory; auto does so on a GPU where it fits well, and
    on a CPU if it is small. The run is the same either way."""
    on_bad_sample: Literal["skip", "stop"] = "skip"
    """A damaged sample is replaced by another and counted, or ends the run."""
    held_out: float = 0.0
    """Share of the samples, in [0, 0.9], chosen by a hash of their keys, that is never trained on:
    evaluation measures against both parts."""
    exclude: Path | None = None
    """Repair list of `speed-engine shards check`: what it names is left out."""
    cache_gb: float = 100.0
    """Disk space for shards that come from a URL, in 10^9 bytes."""

    def __post_init__(self) -> None:
        decodable = self.vae is None or self.latents
        check("data.vae", str(self.vae), decodable, "is for data.latents True only")
        check("data.held_out", self.held_out, 0 <= self.held_out <= 0.9, "is a share in [0, 0.9]")
        if self.resident == "on" and self.mode == "stream":
            raise UserError(
                "data.resident=on keeps the exact order, which data.mode=stream gives up; "
                "leave one of them at its default."
            )
        check("data.members", self.members, bool(self.members), "needs an image at least")
        check("data.cache_gb", self.cache_gb, 0 < self.cache_gb <= 1e9, "must lie in (0, 10^9]")
        check_between("data.workers", self.workers, 0, 10_000)
        check_between("data.window", self.window, 1, 10**9)
        check_between("data.num_classes", self.num_classes, 1, 10**7)
        for name in ("image_shape", "token_shape", "low_shape"):
            shape = getattr(self, name)
            sound = min(shape) >= 1 and math.prod(shape) <= _MOST_VALUES
            check(f"data.{name}", shape, sound, f"is positive, at most {_MOST_VALUES:,} together")
