"""Model families: from a configuration and what data and machine decide of it to a network."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from speed_engine.models.config import DiTConfig, EdmUNetConfig, MDTConfig, ModelConfig, UNetConfig
from speed_engine.models.dit import DIT_SIZES, DiT, dit_size
from speed_engine.models.edm_unet import EDM_UNET_SIZES, DhariwalUNet, SongUNet
from speed_engine.models.mdt import MDT, MDTv2
from speed_engine.models.super_resolution import SuperResolution, conditioned_channels
from speed_engine.models.text_dit import TextDiT
from speed_engine.models.unet import UNET_SIZES, UNet
from speed_engine.runtime.checks import UserError

RESIDUAL_DTYPES = {"auto": None, "bfloat16": torch.bfloat16}
# DiT's sizes; how many of the blocks decode is 2 in MDT, and in MDTv2 as its authors train it.
MDT_SIZES: dict[str, dict] = {
    f"{name}-{letter}/{patch}": {
        "version": version, "patch_size": patch, "decode_layers": decoders,
        **DIT_SIZES[letter]._asdict(),
    }
    for name, version, letter, patches, decoders in (
        ("MDT", 1, "S", (2, 4, 8), 2),
        ("MDT", 1, "B", (2, 4, 8), 2),
        ("MDT", 1, "L", (2, 4, 8), 2),
        ("MDT", 1, "XL", (2, 4, 8), 2),
        ("MDTv2", 2, "S", (2,), 6),
        ("MDTv2", 2, "XL", (2,), 4),
    )
    for patch in patches
}  # fmt: skip


class Shape(NamedTuple):
    """What data and machine decide of a model."""

    input_size: tuple[int, int]
    channels: int  # of the answer
    num_classes: int | None = None  # None: not class-conditional
    token_dim: int | None = None  # None: not conditioned on text
    low_channels: int | None = None  # None: not conditioned on a smaller image
    attention: str = "sdpa"  # what computes it

    @property
    def in_channels(self) -> int:
        """Of what the network reads."""
        if self.low_channels is None:
            return self.channels
        return conditioned_channels(self.channels, self.low_channels)


def build_network(settings: ModelConfig, shape: Shape) -> nn.Module:
    """The network of a family's configuration, on the current default device.

    Raises:
        UserError: sizes that do not fit each other, or a condition that the family does not take.
    """
    if shape.attention != "sdpa" and not isinstance(settings, DiTConfig):
        raise UserError(
            f"attention={shape.attention} is for a dit; model family {settings.family} computes "
            "its own: use auto or sdpa."
        )
    network = FAMILIES[type(settings)](settings, shape)
    return network if shape.low_channels is None else SuperResolution(network)


def _dit(settings: DiTConfig, shape: Shape) -> nn.Module:
    arguments = {
        **(dit_size(settings.size) if settings.size else _some(settings, settings.SIZED)),
        **_some(settings, ("mlp_ratio", "learn_sigma", "frequency_shift", "checkpointing")),
        "residual_dtype": RESIDUAL_DTYPES[settings.residual_dtype],
        "attention": shape.attention,
        "input_size": shape.input_size,
        "channels": shape.channels,
        "in_channels": shape.in_channels,
    }
    if shape.token_dim is None:
        return DiT(num_classes=shape.num_classes, **arguments)
    if shape.num_classes is not None:
        raise UserError(
            "a DiT is conditioned on a text or a class, not on both; leave tokens.npy or cls out "
            "of members."
        )
    return TextDiT(token_dim=shape.token_dim, **arguments)


def _mdt(settings: MDTConfig, shape: Shape) -> nn.Module:
    _refuse_text(settings, shape)
    arguments = _sized(settings, MDT_SIZES)
    return (MDT, MDTv2)[arguments.pop("version") - 1](
        **arguments,
        **_some(settings, ("mask_ratio", "mlp_ratio", "learn_sigma", "checkpointing")),
        input_size=shape.input_size,
        channels=shape.channels,
        in_channels=shape.in_channels,
        num_classes=shape.num_classes,
    )


def _unet(settings: UNetConfig, shape: Shape) -> nn.Module:
    return UNet(
        **_sized(settings, UNET_SIZES),
        **_some(settings, ("dropout", "learn_sigma", "checkpointing")),
        input_size=shape.input_size,
        in_channels=shape.in_channels,
        out_channels=shape.channels,
        num_classes=shape.num_classes,
        token_dim=shape.token_dim,
    )


def _edm_unet(settings: EdmUNetConfig, shape: Shape) -> nn.Module:
    _refuse_text(settings, shape)
    arguments = _sized(settings, EDM_UNET_SIZES)
    if settings.size is not None:
        arguments["network"] = settings.size.partition("-")[0]  # it begins with the network's name
    return {"ddpm++": SongUNet, "adm": DhariwalUNet}[arguments.pop("network")](
        **arguments,
        checkpointing=settings.checkpointing,
        input_size=shape.input_size,
        in_channels=shape.in_channels,
        out_channels=shape.channels,
        num_classes=shape.num_classes,
    )


def _some(settings: ModelConfig, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: getattr(settings, name) for name in names}


def _sized(settings: ModelConfig, sizes: dict[str, dict]) -> dict[str, Any]:
    """Arguments of the published size that is named, or else one by one as configured."""
    if settings.size is None:
        return _some(settings, settings.SIZED)
    if settings.size not in sizes:
        known = ", ".join(sizes)
        raise UserError(f"model.size={settings.size!r} is unknown; choose from {known}.")
    return dict(sizes[settings.size])


def _refuse_text(settings: ModelConfig, shape: Shape) -> None:
    if shape.token_dim is not None:
        raise UserError(
            f"model family {settings.family} takes no text; use a dit or a unet, or leave "
            "tokens.npy out of members."
        )


FAMILIES: dict[type, Callable[[Any, Shape], nn.Module]] = {
    DiTConfig: _dit,
    MDTConfig: _mdt,
    UNetConfig: _unet,
    EdmUNetConfig: _edm_unet,
}
