"""Configuration of the model: one frozen dataclass per family.

The families themselves are built in ``families.py``.
"""

import dataclasses
import math
import typing
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import tyro

from speed_engine.runtime.checks import UserError, check, shortened

_WIDEST = 2**16  # channels, blocks, heads, multipliers, heights in pixels


def _check_positive(config: object, *names: str) -> None:
    """Of sizes, or tuples of sizes; None is allowed."""
    for name in names:
        value = getattr(config, name)
        sizes = value if isinstance(value, tuple) else () if value is None else (value,)
        sound = all(0 < size <= _WIDEST for size in sizes)
        check(f"model.{name}", value, sound, f"must be positive, and at most {_WIDEST:,}")


def _check_model(config: Any) -> None:
    """The dial of every family; a size and a field that it sets would contradict each other."""
    dial = config.checkpointing
    check("model.checkpointing", dial, 0 <= dial <= 1, "is a share in [0, 1]")
    if config.size is None:
        return
    for field_ in dataclasses.fields(config):
        value = getattr(config, field_.name)
        if field_.name in config.SIZED and value != field_.default:
            raise UserError(
                f"model.{field_.name}={shortened(value)}: model.size={shortened(config.size)} sets "
                f"it; use --model.size None to set {', '.join(config.SIZED)} one by one."
            )


@dataclass(frozen=True, kw_only=True)
class DiTConfig:
    """A diffusion transformer (DiT); one conditioned on texts attends to them in every block."""

    SIZED: ClassVar[tuple[str, ...]] = ("patch_size", "dim", "depth", "num_heads", "variant")
    family: tyro.conf.Suppress[Literal["dit"]] = "dit"
    """Which of the families this is, in config.json."""
    size: str | None = None
    """Published size, DiT-S/2 to DiT-XL/8, DiT-XL/2-modern, in place of the next five."""
    patch_size: int = 2
    """Pixels per token, along each side; divides height and width."""
    dim: int = 64
    """Width of a token; a multiple of 4 and of num_heads."""
    depth: int = 4
    """Number of blocks."""
    num_heads: int = 4
    """Attention heads per block."""
    variant: Literal["original", "modern"] = "original"
    """modern has QK-norm, rotary positions and SwiGLU in its blocks."""
    mlp_ratio: float = 4.0
    """Hidden width of the feed-forward layers, in units of dim."""
    learn_sigma: bool = False
    """Learn the variance of the reverse steps, too, by the variational bound (IDDPM, DiT)."""
    frequency_shift: float = 0
    """Of the sinusoidal features of t: 0 as in DiT, 1 for weights of diffusers."""
    checkpointing: float = 0
    """Activations recomputed in the backward pass: 0 none, 0.5 the cheap ones, 1 all."""
    residual_dtype: Literal["auto", "bfloat16"] = "auto"
    """Of the tokens from block to block: auto is float32, bfloat16 moves a sixth less memory."""

    def __post_init__(self) -> None:
        _check_model(self)
        _check_positive(self, "patch_size", "dim", "depth", "num_heads", "mlp_ratio")
        shift = self.frequency_shift
        check("model.frequency_shift", shift, math.isfinite(shift), "must be finite")


@dataclass(frozen=True, kw_only=True)
class MDTConfig:
    """A masked diffusion transformer (MDT): every image is denoised twice, once partly hidden."""

    SIZED: ClassVar[tuple[str, ...]] = (
        "version", "patch_size", "dim", "depth", "num_heads", "decode_layers",
    )  # fmt: skip
    family: tyro.conf.Suppress[Literal["mdt"]] = "mdt"
    """Which of the families this is, in config.json."""
    size: str | None = None
    """Published size, MDT-S/2 to MDT-XL/8, MDTv2-S/2, MDTv2-XL/2, in place of the next six."""
    version: Literal[1, 2] = 1
    """Of the paper."""
    patch_size: int = 2
    """Pixels per token, along each side; divides height and width."""
    dim: int = 64
    """Width of a token; a multiple of 4 and of num_heads."""
    depth: int = 4
    """Number of blocks, the interpolater not counted."""
    num_heads: int = 4
    """Attention heads per block."""
    decode_layers: int = 2
    """How many of the blocks decode; version 2 leaves an even number to the encoder."""
    mask_ratio: float = 0.3
    """Share of the tokens hidden, in (0, 1); in version 2 up to 0.2 more."""
    mlp_ratio: float = 4.0
    """Hidden width of the feed-forward layers, in units of dim."""
    learn_sigma: bool = False
    """Learn the variance of the reverse steps, too, by the variational bound (IDDPM, DiT)."""
    checkpointing: float = 0
    """Activations recomputed in the backward pass: 0 none, 0.5 the cheap ones, 1 all."""

    def __post_init__(self) -> None:
        _check_model(self)
        sizes = ("patch_size", "dim", "depth", "num_heads", "decode_layers", "mlp_ratio")
        _check_positive(self, *sizes)
        check("model.mask_ratio", self.mask_ratio, 0 < self.mask_ratio < 1, "must lie in (0, 1)")


@dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """The U-Net of ADM and latent diffusion; one conditioned on texts attends to them, too."""

    SIZED: ClassVar[tuple[str, ...]] = (
        "model_channels", "channel_mult", "num_res_blocks", "attention_resolutions", "num_heads",
        "num_head_channels", "scale_shift_norm", "resblock_updown",
    )  # fmt: skip
    family: tyro.conf.Suppress[Literal["unet"]] = "unet"
    """Which of the families this is, in config.json."""
    size: str | None = None
    """Published size, such as speed or adm-64, in place of the next eight."""
    model_channels: int = 32
    """Channels at multiplier 1; a multiple of 32."""
    channel_mult: tuple[float, ...] = (1, 2)
    """Multiplier of every level, finest first; each level halves height and width."""
    num_res_blocks: int = 1
    """Residual blocks of a level."""
    attention_resolutions: tuple[int, ...] = (2,)
    """Downsampling rates, powers of two, at which there is attention."""
    num_heads: int = 1
    """Attention heads; not used where num_head_channels is given."""
    num_head_channels: int | None = None
    """Channels of a head."""
    scale_shift_norm: bool = False
    """The timestep scales and shifts inside the norm, rather than being added before it."""
    resblock_updown: bool = False
    """Residual blocks change the resolution, rather than convolutions."""
    dropout: float = 0.0
    """Probability inside residual blocks, in [0, 1)."""
    learn_sigma: bool = False
    """Learn the variance of the reverse steps, too, by the variational bound (IDDPM, DiT)."""
    checkpointing: float = 0
    """Activations recomputed in the backward pass: 0 none, 0.5 the cheap ones, 1 all."""

    def __post_init__(self) -> None:
        _check_model(self)
        sizes = ("model_channels", "channel_mult", "num_res_blocks", "attention_resolutions")
        _check_positive(self, *sizes, "num_heads", "num_head_channels")
        check("model.channel_mult", self.channel_mult, bool(self.channel_mult), "needs a level")
        check("model.dropout", self.dropout, 0 <= self.dropout < 1, "must lie in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class EdmUNetConfig:
    """EDM's U-Nets, DDPM++ and ADM as its authors train them, class-conditional or not."""

    SIZED: ClassVar[tuple[str, ...]] = (
        "network", "model_channels", "channel_mult", "num_blocks", "attention_resolutions",
        "dropout",
    )  # fmt: skip
    family: tyro.conf.Suppress[Literal["edm_unet"]] = "edm_unet"
    """Which of the families this is, in config.json."""
    size: str | None = None
    """Published size, such as ddpm++-cifar10, in place of the next six."""
    network: Literal["ddpm++", "adm"] = "ddpm++"
    """Of the two."""
    model_channels: int = 32
    """Channels at multiplier 1; a multiple of 4."""
    channel_mult: tuple[int, ...] = (1, 2)
    """Multiplier of every level, finest first; each level halves height and width."""
    num_blocks: int = 1
    """Blocks of a level."""
    attention_resolutions: tuple[int, ...] = (16,)
    """Heights in pixels at which there is attention."""
    dropout: float = 0.0
    """Probability inside blocks, in [0, 1)."""
    learn_sigma: tyro.conf.Suppress[bool] = False
    """These networks learn no variance."""
    checkpointing: float = 0
    """Activations recomputed in the backward pass: 0 none, 0.5 the cheap ones, 1 all."""

    def __post_init__(self) -> None:
        _check_model(self)
        sizes = ("model_channels", "channel_mult", "num_blocks", "attention_resolutions")
        _check_positive(self, *sizes)
        check("model.channel_mult", self.channel_mult, bool(self.channel_mult), "needs a level")
        check("model.dropout", self.dropout, 0 <= self.dropout < 1, "must lie in [0, 1)")
        check("model.learn_sigma", self.learn_sigma, not self.learn_sigma, "has no output for it")


ModelConfig = DiTConfig | MDTConfig | UNetConfig | EdmUNetConfig
MODEL_CONFIGS: dict[str, type] = {cls.family: cls for cls in typing.get_args(ModelConfig)}
