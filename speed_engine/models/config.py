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
    """A diffusion transformer (DiT); if it is conditioned on texts, every block attends to them."""

    SIZED: ClassVar[tuple[str, ...]] = ("patch_size", "dim", "depth", "num_heads", "variant")
    GRAPHS: ClassVar[bool] = True  # whether CUDA graphs are a choice: they were measured of DiTs
    family: tyro.conf.Suppress[Literal["dit"]] = "dit"
    """Which of the families this is, in config.json."""
    size: str | None = None
    """A published size, DiT-S/2 to DiT-XL/8 or DiT-XL/2-modern, which sets the next five
    options."""
    patch_size: int = 2
    """Side of a token's patch in pixels; it divides height and width."""
    dim: int = 64
    """Width of a token; it is a multiple of 4 and of num_heads."""
    depth: int = 4
    """Number of blocks."""
    num_heads: int = 4
    """Number of attention heads of a block."""
    variant: Literal["original", "modern"] = "original"
    """original is DiT as published; modern has QK-norm, rotary positions and SwiGLU in its
    blocks."""
    mlp_ratio: float = 4.0
    """Hidden width of the feed-forward layers, in units of dim."""
    learn_sigma: bool = False
    """Also learn the variance of the reverse steps, by the variational bound, as IDDPM and DiT
    do."""
    frequency_shift: float = 0
    """Shift of the frequencies in the sinusoidal embedding of t: 0 as in DiT, 1 for weights of
    diffusers."""
    checkpointing: float = 0
    """Share of the activations that the backward pass recomputes to save memory: 0 recomputes none,
    0.5 those that are cheap, 1 all."""
    residual_dtype: Literal["auto", "bfloat16"] = "auto"
    """Data type of the tokens between blocks: auto is float32; bfloat16 moves a sixth less
    memory."""

    def __post_init__(self) -> None:
        _check_model(self)
        _check_positive(self, "patch_size", "dim", "depth", "num_heads", "mlp_ratio")
        shift = self.frequency_shift
        check("model.frequency_shift", shift, math.isfinite(shift), "must be finite")


@dataclass(frozen=True, kw_only=True)
class MDTConfig:
    """A masked diffusion transformer (MDT): it denoises every image twice, once partly masked."""

    SIZED: ClassVar[tuple[str, ...]] = (
        "version", "patch_size", "dim", "depth", "num_heads", "decode_layers",
    )  # fmt: skip
    GRAPHS: ClassVar[bool] = False
    family: tyro.conf.Suppress[Literal["mdt"]] = "mdt"
    """Which of the families this is, in config.json."""
    size: str | None = None
    """A published size, MDT-S/2 to MDT-XL/8, MDTv2-S/2 or MDTv2-XL/2, which sets the next six
    options."""
    version: Literal[1, 2] = 1
    """Version of the paper that the network follows, MDT (1) or MDTv2 (2)."""
    patch_size: int = 2
    """Side of a token's patch in pixels; it divides height and width."""
    dim: int = 64
    """Width of a token; it is a multiple of 4 and of num_heads."""
    depth: int = 4
    """Number of blocks, without the interpolater."""
    num_heads: int = 4
    """Number of attention heads of a block."""
    decode_layers: int = 2
    """Number of the blocks that are the decoder; version 2 leaves an even number to the encoder."""
    mask_ratio: float = 0.3
    """Share of the tokens that is masked, in (0, 1); version 2 masks up to 0.2 more."""
    mlp_ratio: float = 4.0
    """Hidden width of the feed-forward layers, in units of dim."""
    learn_sigma: bool = False
    """Also learn the variance of the reverse steps, by the variational bound, as IDDPM and DiT
    do."""
    checkpointing: float = 0
    """Share of the activations that the backward pass recomputes to save memory: 0 recomputes none,
    0.5 those that are cheap, 1 all."""

    def __post_init__(self) -> None:
        _check_model(self)
        sizes = ("patch_size", "dim", "depth", "num_heads", "decode_layers", "mlp_ratio")
        _check_positive(self, *sizes)
        check("model.mask_ratio", self.mask_ratio, 0 < self.mask_ratio < 1, "must lie in (0, 1)")


@dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """The U-Net of ADM and latent diffusion; if it is conditioned on texts, it attends to them."""

    SIZED: ClassVar[tuple[str, ...]] = (
        "model_channels", "channel_mult", "num_res_blocks", "attention_resolutions", "num_heads",
        "num_head_channels", "scale_shift_norm", "resblock_updown",
    )  # fmt: skip
    GRAPHS: ClassVar[bool] = False
    family: tyro.conf.Suppress[Literal["unet"]] = "unet"
    """Which of the families this is, in config.json."""
    size: str | None = None
    """A published size, such as speed or adm-64, which sets the next eight options."""
    model_channels: int = 32
    """Number of channels at multiplier 1; it is a multiple of 32."""
    channel_mult: tuple[float, ...] = (1, 2)
    """Multiplier of the channels at every level, the finest first; each level halves height and
    width."""
    num_res_blocks: int = 1
    """Number of residual blocks of a level."""
    attention_resolutions: tuple[int, ...] = (2,)
    """Downsampling rates, powers of two, of the levels that have attention."""
    num_heads: int = 1
    """Number of attention heads; it is not used where num_head_channels is given."""
    num_head_channels: int | None = None
    """Number of channels of an attention head; by default num_heads decides."""
    scale_shift_norm: bool = False
    """Whether the timestep scales and shifts the normalised activations, rather than being added
    before."""
    resblock_updown: bool = False
    """Whether residual blocks change the resolution, rather than convolutions."""
    dropout: float = 0.0
    """Probability of dropout inside residual blocks, in [0, 1)."""
    learn_sigma: bool = False
    """Also learn the variance of the reverse steps, by the variational bound, as IDDPM and DiT
    do."""
    checkpointing: float = 0
    """Share of the activations that the backward pass recomputes to save memory: 0 recomputes none,
    0.5 those that are cheap, 1 all."""

    def __post_init__(self) -> None:
        _check_model(self)
        sizes = ("model_channels", "channel_mult", "num_res_blocks", "attention_resolutions")
        _check_positive(self, *sizes, "num_heads", "num_head_channels")
        check("model.channel_mult", self.channel_mult, bool(self.channel_mult), "needs a level")
        check("model.dropout", self.dropout, 0 <= self.dropout < 1, "must lie in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class EdmUNetConfig:
    """One of EDM's U-Nets, DDPM++ or ADM, as EDM's authors train them."""

    SIZED: ClassVar[tuple[str, ...]] = (
        "network", "model_channels", "channel_mult", "num_blocks", "attention_resolutions",
        "dropout",
    )  # fmt: skip
    GRAPHS: ClassVar[bool] = False
    family: tyro.conf.Suppress[Literal["edm_unet"]] = "edm_unet"
    """Which of the families this is, in config.json."""
    size: str | None = None
    """A published size, such as ddpm++-cifar10, which sets the next six options."""
    network: Literal["ddpm++", "adm"] = "ddpm++"
    """Which of EDM's two networks it is, DDPM++ or ADM."""
    model_channels: int = 32
    """Number of channels at multiplier 1; a multiple of 32, or of 4 where groups of channels
    divide all levels."""
    channel_mult: tuple[int, ...] = (1, 2)
    """Multiplier of the channels at every level, the finest first; each level halves height and
    width."""
    num_blocks: int = 1
    """Number of residual blocks of a level."""
    attention_resolutions: tuple[int, ...] = (16,)
    """Heights in pixels of the levels that have attention."""
    dropout: float = 0.0
    """Probability of dropout inside blocks, in [0, 1)."""
    learn_sigma: tyro.conf.Suppress[bool] = False
    """Also learn the variance of the reverse steps, by the variational bound, as IDDPM and DiT
    do."""
    checkpointing: float = 0
    """Share of the activations that the backward pass recomputes to save memory: 0 recomputes none,
    0.5 those that are cheap, 1 all."""

    def __post_init__(self) -> None:
        _check_model(self)
        sizes = ("model_channels", "channel_mult", "num_blocks", "attention_resolutions")
        _check_positive(self, *sizes)
        check("model.channel_mult", self.channel_mult, bool(self.channel_mult), "needs a level")
        check("model.dropout", self.dropout, 0 <= self.dropout < 1, "must lie in [0, 1)")
        check("model.learn_sigma", self.learn_sigma, not self.learn_sigma, "has no output for it")


ModelConfig = DiTConfig | MDTConfig | UNetConfig | EdmUNetConfig
MODEL_CONFIGS: dict[str, type] = {cls.family: cls for cls in typing.get_args(ModelConfig)}
