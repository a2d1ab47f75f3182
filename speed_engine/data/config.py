"""Configuration of the data: which images, and how they are read."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from speed_engine.runtime.checks import UserError, check, check_between

_MOST_VALUES = 2**28  # of one image or text: 1 GiB in float32


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which images are trained on, what they come with, and how they are read."""

    source: str = "digits"
    """Data set to train on: digits, which is part of the package, the path of a folder of shards or
    of a single .tar, or the URL of a folder (https, http, s3, gs)."""
    members: tuple[str, ...] = ("npy", "cls")
    """File extensions of a sample: first that of the image (npy, bf16.npy, png, jpg, jpeg, webp),
    then those of what the model is conditioned on: cls for the class, tokens.npy for a text,
    low.npy, low.png, ... for a low-resolution image."""
    image_shape: tuple[int, int, int] = (1, 8, 8)
    """Channels, height and width of an image, or of a latent."""
    latents: bool = False
    """Whether the images are latents of an autoencoder. They are unbounded, and become pictures by
    --data.vae only."""
    vae: str | None = None
    """The autoencoder of the latents, a diffusers AutoencoderKL as a folder or a name on the
    Hugging Face hub, which decodes generated latents. By default latents are not decoded."""
    num_classes: int = 10
    """Number of classes; labels are 0 to one less than it."""
    token_shape: tuple[int, int] = (77, 768)
    """Number of tokens of a text, and the width of a token."""
    low_shape: tuple[int, int, int] = (3, 64, 64)
    """Channels, height and width of the low-resolution image."""
    workers: int = 0
    """Number of processes that read ahead; with 0 the training process reads."""
    window: int = 8
    """Number of shards that are shuffled together. A larger window mixes better, a smaller one
    reads more sequentially."""
    mode: Literal["exact", "stream"] = "exact"
    """exact reads in an order that any number of processes resumes exactly. stream is webdataset's
    streaming, which reads shards from end to end and does not resume exactly."""
    flip: bool = False
    """Mirror half of the images, chosen at random, from left to right; for latents this is an
    approximation."""
    resident: Literal["auto", "on", "off"] = "auto"
    """Whether the whole data set is kept in the device's memory; auto does so on a GPU where it
    fits well, and on a CPU if it is small. The results are the same either way."""
    on_bad_sample: Literal["skip", "stop"] = "skip"
    """What happens to a damaged sample: skip replaces it by another and counts it, stop ends the
    run."""
    held_out: float = 0.0
    """Share of the samples, in [0, 0.9], that is never trained on; a hash of the key decides.
    Evaluation then measures against both parts."""
    test_source: str | None = None
    """Another data set of the same form that is never trained on, such as the test split of the
    first, as a path or URL; it takes the place of a held-out part."""
    exclude: Path | None = None
    """A repair list that `speed-engine shards check` wrote; the samples and shards of data.source
    that it names are left out."""
    cache_gb: float = 100.0
    """Disk space for shards that come from a URL, in 10^9 bytes."""

    def __post_init__(self) -> None:
        decodable = self.vae is None or self.latents
        check("data.vae", str(self.vae), decodable, "is for data.latents True only")
        check("data.held_out", self.held_out, 0 <= self.held_out <= 0.9, "is a share in [0, 0.9]")
        if self.test_source is not None and self.held_out:
            raise UserError(
                f"data.test_source={self.test_source} holds images out already; set "
                "data.held_out=0."
            )
        if self.resident == "on" and self.mode == "stream":
            raise UserError(
                "data.resident=on keeps the exact order, which data.mode=stream gives up; "
                "leave one of them at its default."
            )
        check("data.members", self.members, bool(self.members), "needs at least the image")
        check("data.cache_gb", self.cache_gb, 0 < self.cache_gb <= 1e9, "must lie in (0, 10^9]")
        check_between("data.workers", self.workers, 0, 10_000)
        check_between("data.window", self.window, 1, 10**9)
        check_between("data.num_classes", self.num_classes, 1, 10**7)
        for name in ("image_shape", "token_shape", "low_shape"):
            shape = getattr(self, name)
            sound = min(shape) >= 1 and math.prod(shape) <= _MOST_VALUES
            check(f"data.{name}", shape, sound, f"is positive, at most {_MOST_VALUES:,} together")

    @property
    def holds_out(self) -> bool:
        """Whether there are images that are never trained on."""
        return self.held_out > 0 or self.test_source is not None
