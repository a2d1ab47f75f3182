"""The U-Nets of EDM (Karras et al. 2022): DDPM++ and ADM as its authors train them.

Parameter names, initialisation and numerics follow NVlabs/edm, which names blocks by the size of
the image they work on; ``layouts/unet.py`` reads its files.

Letters: B images, C channels, H x W pixels, N = H W places, E width of the embedding of t.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speed_engine.models.layers.blocks import set_recompute
from speed_engine.models.layers.edm_block import EdmBlock, Style, norm_groups
from speed_engine.models.layers.embeddings import sinusoid
from speed_engine.models.layers.group_norm import GroupNormSiLU
from speed_engine.models.layers.initial import zeroed
from speed_engine.models.layers.unet_layers import (
    Double,
    Halve,
    check_given,
    check_halvings,
    laid_out,
)

# The networks of EDM's experiments, with their parameters in millions.
EDM_UNET_SIZES: dict[str, dict] = {
    "ddpm++-cifar10": {  # 55.7, DDPM++
        "model_channels": 128, "channel_mult": (2, 2, 2), "num_blocks": 4,
        "attention_resolutions": (16,), "dropout": 0.13,
    },
    "adm-cifar10": {  # ADM
        "model_channels": 192, "channel_mult": (1, 2, 3, 4), "num_blocks": 3,
        "attention_resolutions": (8, 16, 32), "dropout": 0.13,
    },
    "adm-imagenet64": {  # 295.9, ADM
        "model_channels": 192, "channel_mult": (1, 2, 3, 4), "num_blocks": 3,
        "attention_resolutions": (8, 16, 32), "dropout": 0.1,
    },
}  # fmt: skip


class EdmUNet(nn.Module):
    """What DDPM++ and ADM share: an encoder and a decoder with a skip from every block.

    Args:
        input_size: (H, W); each a multiple of 2 ** (levels - 1).
        in_channels: of the input.
        out_channels: C of the answer.
        model_channels: channels at multiplier 1, a multiple of 4; also the width of the code of t.
        channel_mult: multiplier of every level, finest first.
        num_blocks: of a level, on the way down; one more on the way up.
        attention_resolutions: the heights in pixels at which there is attention.
        num_classes: labels 0 .. num_classes - 1, num_classes itself meaning "no label"; None takes
            no labels.
        dropout: probability inside blocks.
        time_scale: t, on the scale 0 .. 1000, is multiplied by it; EDM's c_noise is t / 1000.
        checkpointing: activations to recompute, from 0, none, to 1, see ``blocks.set_recompute``.

    Raises:
        UserError: sizes that do not divide as said.
    """

    style: Style

    def __init__(
        self,
        *,
        input_size: tuple[int, int],
        in_channels: int,
        out_channels: int,
        model_channels: int,
        channel_mult: Sequence[int],
        num_blocks: int,
        attention_resolutions: Sequence[int],
        num_classes: int | None = None,
        dropout: float = 0.0,
        time_scale: float = 1e-3,
        checkpointing: float = 0,
    ) -> None:
        super().__init__()
        check_halvings(input_size, len(channel_mult))
        self.out_channels = out_channels
        self.model_channels, self.embedding_dim = model_channels, 4 * model_channels
        self.num_classes, self.time_scale = num_classes, time_scale
        self.map_layer0 = nn.Linear(model_channels, self.embedding_dim)
        self.map_layer1 = nn.Linear(self.embedding_dim, self.embedding_dim)
        self.map_label = self._label_map(num_classes) if num_classes else None
        widths = [model_channels * mult for mult in channel_mult]
        names = [f"{input_size[0] >> i}x{input_size[1] >> i}" for i in range(len(widths))]
        attends = [input_size[0] >> i in attention_resolutions for i in range(len(widths))]
        sparse = self.style.sparse_attention_up

        def block(
            channels: int, width: int, resample: nn.Module | None = None, attention: bool = False
        ) -> EdmBlock:
            return EdmBlock(
                channels, width, self.embedding_dim, self.style, dropout, resample, attention
            )

        channels = model_channels if self.style.narrow_start else widths[0]
        first = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.enc = nn.ModuleDict({f"{names[0]}_conv": first})
        skips = [channels]
        for level, (name, width) in enumerate(zip(names, widths, strict=True)):
            if level:
                self.enc[f"{name}_down"] = block(channels, channels, Halve())
                skips.append(channels)
            for i in range(num_blocks):
                self.enc[f"{name}_block{i}"] = block(channels, width, None, attends[level])
                channels = width
                skips.append(channels)

        self.dec = nn.ModuleDict()
        self.dec[f"{names[-1]}_in0"] = block(channels, channels, attention=True)
        self.dec[f"{names[-1]}_in1"] = block(channels, channels)
        for level, (name, width) in reversed(list(enumerate(zip(names, widths, strict=True)))):
            if level < len(widths) - 1:
                self.dec[f"{name}_up"] = block(channels, channels, Double())
            for i in range(num_blocks + 1):
                attention = attends[level] and (i == num_blocks or not sparse)
                self.dec[f"{name}_block{i}"] = block(channels + skips.pop(), width, None, attention)
                channels = width
        set_recompute([m for m in self.modules() if isinstance(m, EdmBlock)], checkpointing)
        self._add_output(names[0], channels)
        self._initialise()

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """(B, in_channels, H, W), (B,) timesteps, (B,) labels -> (B, C, H, W).

        Args:
            x: the noised image, and what is joined to it.
            t: on the scale 0 .. 1000, or 1000 times c_noise.
            labels: (B,) int64, exactly if there are classes.

        Raises:
            UserError: a condition is missing, or the model has no use for it.
        """
        check_given("labels", labels, self.num_classes is not None)
        embedding = self._embed(t.float() * self.time_scale, labels)
        x, skips = laid_out(x), []
        for block in self.enc.values():
            x = block(x, embedding) if isinstance(block, EdmBlock) else block(x)
            skips.append(x)
        for block in self.dec.values():
            if isinstance(block, EdmBlock):
                if block.channels != x.shape[1]:
                    x = torch.cat([x, skips.pop()], dim=1)
                x = block(x, embedding)
        return self._answer(x)

    def _label_map(self, num_classes: int) -> nn.Linear:
        raise NotImplementedError

    def _add_output(self, name: str, channels: int) -> None:
        raise NotImplementedError

    def _initialise(self) -> None:
        raise NotImplementedError

    def _embed(self, t: Tensor, labels: Tensor | None) -> Tensor:
        """(B,) t on the network's scale, (B,) labels -> (B, E)."""
        raise NotImplementedError

    def _answer(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def _one_hot(self, labels: Tensor, dtype: torch.dtype) -> Tensor:
        """(B,) -> (B, num_classes); "no label" is all zeros."""
        assert self.num_classes is not None
        classes = torch.arange(self.num_classes, device=labels.device)
        return (labels[:, None] == classes).to(dtype)


class SongUNet(EdmUNet):
    """DDPM++ (Song et al. 2021), the network of EDM's CIFAR-10 experiments."""

    style = Style(
        head_channels=None,
        skip_scale=math.sqrt(0.5),
        eps=1e-6,
        scale_shift_norm=False,
        project_resampled=True,
        narrow_start=True,
        sparse_attention_up=True,
    )

    def _label_map(self, num_classes: int) -> nn.Linear:
        return nn.Linear(num_classes, self.model_channels)

    def _add_output(self, name: str, channels: int) -> None:
        self._output = f"{name}_aux_norm", f"{name}_aux_conv"
        norm, convolution = self._output
        self.dec[norm] = GroupNormSiLU(norm_groups(channels), channels, 1e-6)
        self.dec[convolution] = nn.Conv2d(channels, self.out_channels, 3, padding=1)

    @property
    def ends(self) -> tuple[nn.Module, ...]:
        """The first and the last map, which see pixels."""
        return next(iter(self.enc.values())), self.dec[self._output[1]]

    def _embed(self, t: Tensor, labels: Tensor | None) -> Tensor:
        cos, sin = sinusoid(t, self.model_channels, frequency_shift=1).chunk(2, dim=1)
        code = torch.cat([sin, cos], dim=1).to(self.map_layer0.weight.dtype)
        if labels is not None:
            assert self.map_label is not None and self.num_classes is not None
            one_hot = self._one_hot(labels, code.dtype)
            code = code + self.map_label(one_hot * math.sqrt(self.num_classes))
        return F.silu(self.map_layer1(F.silu(self.map_layer0(code))))

    def _answer(self, x: Tensor) -> Tensor:
        norm, convolution = self._output
        return self.dec[convolution](self.dec[norm](x))

    def _initialise(self) -> None:
        for name, module in self.named_modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.xavier_uniform_(module.weight)
                assert module.bias is not None
                nn.init.zeros_(module.bias)
                ending = name.rsplit(".")[-1]
                if ending in ("conv1", "proj", self._output[1]):
                    module.weight.data.mul_(1e-5)
                elif ending == "qkv":
                    module.weight.data.mul_(math.sqrt(0.2))


class DhariwalUNet(EdmUNet):
    """ADM (Dhariwal and Nichol 2021), the network of EDM's ImageNet-64 experiments."""

    style = Style(
        head_channels=64,
        skip_scale=1.0,
        eps=1e-5,
        scale_shift_norm=True,
        project_resampled=False,
        narrow_start=False,
        sparse_attention_up=False,
    )

    def _label_map(self, num_classes: int) -> nn.Linear:
        return nn.Linear(num_classes, self.embedding_dim, bias=False)

    def _add_output(self, name: str, channels: int) -> None:
        self.out_norm = GroupNormSiLU(norm_groups(channels), channels, 1e-5)
        self.out_conv = zeroed(nn.Conv2d(channels, self.out_channels, 3, padding=1))

    @property
    def ends(self) -> tuple[nn.Module, ...]:
        """The first and the last map, which see pixels."""
        return next(iter(self.enc.values())), self.out_conv

    def _embed(self, t: Tensor, labels: Tensor | None) -> Tensor:
        code = sinusoid(t, self.model_channels).to(self.map_layer0.weight.dtype)
        embedding = self.map_layer1(F.silu(self.map_layer0(code)))
        if labels is not None:
            assert self.map_label is not None
            embedding = embedding + self.map_label(self._one_hot(labels, embedding.dtype))
        return F.silu(embedding)

    def _answer(self, x: Tensor) -> Tensor:
        return self.out_conv(self.out_norm(x))

    def _initialise(self) -> None:
        if self.map_label is not None:
            nn.init.normal_(self.map_label.weight)
