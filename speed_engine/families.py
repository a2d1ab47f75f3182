"""Model families: from a configuration and what the data decide of it to a network."""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from speed_engine.config import DiTConfig, UNetConfig
from speed_engine.models.dit import DIT_SIZES, DiT
from speed_engine.models.super_resolution import SuperResolution, conditioned_channels
from speed_engine.models.text_dit import TextDiT
from speed_engine.models.unet import UNET_SIZES, UNet


class Shape(NamedTuple):
    """What the data decide of a model."""

    input_size: tuple[int, int]
    channels: int  # of the answer
    num_classes: int | None = None  # None: it is told no class
    token_dim: int | None = None  # None: it is told no text
    low_channels: int | None = None  # None: it is told no smaller image

    @property
    def in_channels(self) -> int:
        """Of what the network reads."""
        if self.low_channels is None:
            return self.channels
        return conditioned_channels(self.channels, self.low_channels)


def build_network(settings: Any, shape: Shape) -> nn.Module:
    """The network of a family's configuration, on the current default device.

    Raises:
        ValueError: sizes that do not fit each other, or a condition that the family does not take.
    """
    network = FAMILIES[type(settings)](settings, shape)
    return network if shape.low_channels is None else SuperResolution(network)


def _dit(settings: DiTConfig, shape: Shape) -> nn.Module:
    own = ("patch_size", "dim", "depth", "num_heads")
    sizes = _published(settings.size, DIT_SIZES) or {name: getattr(settings, name) for name in own}
    arguments = {
        **sizes,
        "input_size": shape.input_size,
        "channels": shape.channels,
        "in_channels": shape.in_channels,
        "mlp_ratio": settings.mlp_ratio,
        "learn_sigma": settings.learn_sigma,
    }
    if shape.token_dim is None:
        return DiT(num_classes=shape.num_classes, **arguments)
    if shape.num_classes is not None:
        raise ValueError("a DiT is told a text or a class; leave tokens.npy or cls out of members.")
    return TextDiT(token_dim=shape.token_dim, **arguments)


def _unet(settings: UNetConfig, shape: Shape) -> nn.Module:
    own = (
        "model_channels", "channel_mult", "num_res_blocks", "attention_resolutions", "num_heads",
        "num_head_channels", "scale_shift_norm", "resblock_updown",
    )  # fmt: skip
    sizes = _published(settings.size, UNET_SIZES) or {name: getattr(settings, name) for name in own}
    return UNet(
        **sizes,
        input_size=shape.input_size,
        in_channels=shape.in_channels,
        out_channels=shape.channels,
        num_classes=shape.num_classes,
        token_dim=shape.token_dim,
        dropout=settings.dropout,
        learn_sigma=settings.learn_sigma,
    )


def _published(name: str | None, sizes: dict[str, dict]) -> dict | None:
    if name is not None and name not in sizes:
        raise ValueError(f"model.size={name!r} is unknown; choose from {', '.join(sizes)}.")
    return sizes.get(name) if name else None


FAMILIES: dict[type, Callable[[Any, Shape], nn.Module]] = {DiTConfig: _dit, UNetConfig: _unet}
