"""The U-Net of ADM and latent diffusion (Dhariwal and Nichol 2021; Rombach et al. 2022).

Parameter names, initialisation and numerics follow CompVis/latent-diffusion, without its prefix
``model.diffusion_model.``, and openai/guided-diffusion, so checkpoints of both load.

Letters: B images, C channels, H x W pixels, N = H W places, E width of the embedding of t,
L tokens of a text, D width of a token.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from speed_engine.models.layers.blocks import set_recompute
from speed_engine.models.layers.embeddings import embedded, sinusoid
from speed_engine.models.layers.group_norm import NORM_GROUPS, GroupNormSiLU
from speed_engine.models.layers.initial import zeroed
from speed_engine.models.layers.spatial_transformer import SpatialTransformer
from speed_engine.models.layers.unet_layers import (
    AttentionBlock,
    Double,
    Downsample,
    Halve,
    ResBlock,
    Upsample,
    check_given,
    check_halvings,
    laid_out,
)
from speed_engine.runtime.checks import UserError

# Table 7 of SpeeD as its released code has it, LDM's own, and ADM's (with their parameters,
# in millions, at the channels and conditions that they were published with).
UNET_SIZES: dict[str, dict] = {
    "speed": {  # latents 32 x 32 x 4
        "model_channels": 128, "channel_mult": (1, 2, 2, 1), "num_res_blocks": 3,
        "attention_resolutions": (2,), "num_heads": 1,
    },
    "ldm-ffhq": {  # 274, latents 64 x 64 x 3
        "model_channels": 224, "channel_mult": (1, 2, 3, 4), "num_res_blocks": 2,
        "attention_resolutions": (2, 4, 8), "num_head_channels": 32,
    },
    "ldm-imagenet": {  # 401, latents 64 x 64 x 3, the class as one token of width 512
        "model_channels": 192, "channel_mult": (1, 2, 3, 5), "num_res_blocks": 2,
        "attention_resolutions": (2, 4, 8), "num_heads": 1,
    },
    "adm-64": {  # 296, pixels 64 x 64, 1000 classes
        "model_channels": 192, "channel_mult": (1, 2, 3, 4), "num_res_blocks": 3,
        "attention_resolutions": (2, 4, 8), "num_head_channels": 64, "scale_shift_norm": True,
        "resblock_updown": True,
    },
    "adm-256": {  # 554, pixels 256 x 256, 1000 classes
        "model_channels": 256, "channel_mult": (1, 1, 2, 2, 4, 4), "num_res_blocks": 2,
        "attention_resolutions": (8, 16, 32), "num_head_channels": 64, "scale_shift_norm": True,
        "resblock_updown": True,
    },
}  # fmt: skip


class UNet(nn.Module):
    """Convolutions from fine to coarse and back, with skips, and attention where it is coarse.

    Args:
        input_size: (H, W); each a multiple of 2 ** (levels - 1).
        in_channels: of the input.
        out_channels: C of the answer.
        model_channels: channels at multiplier 1; a multiple of 32.
        channel_mult: multiplier of every level, finest first.
        num_res_blocks: of a level, on the way down; one more on the way up.
        attention_resolutions: the downsampling rates, powers of two, at which there is attention.
        num_heads: of an attention; divides its channels. Not used where num_head_channels is given.
        num_head_channels: channels of a head; divides the channels of every attention.
        num_classes: labels 0 .. num_classes - 1, num_classes itself meaning "no label"; None takes
            no labels.
        token_dim: D; attention is then followed by attention to the tokens. None takes no tokens.
        transformer_depth: transformer blocks per attention to tokens.
        scale_shift_norm: t scales and shifts inside the norm, rather than being added before it.
        resblock_updown: change the resolution in residual blocks, rather than in convolutions.
        dropout: probability inside residual blocks.
        learn_sigma: answer with twice the channels, the second half for the variance.
        checkpointing: activations to recompute, from 0, none, to 1, see ``blocks.set_recompute``.

    Raises:
        UserError: sizes that do not divide as said, or a rate that no level has.
    """

    def __init__(
        self,
        *,
        input_size: tuple[int, int],
        in_channels: int,
        out_channels: int,
        model_channels: int,
        channel_mult: Sequence[float],
        num_res_blocks: int,
        attention_resolutions: Sequence[int],
        num_heads: int = 1,
        num_head_channels: int | None = None,
        num_classes: int | None = None,
        token_dim: int | None = None,
        transformer_depth: int = 1,
        scale_shift_norm: bool = False,
        resblock_updown: bool = False,
        dropout: float = 0.0,
        learn_sigma: bool = False,
        checkpointing: float = 0,
    ) -> None:
        super().__init__()
        check_halvings(input_size, len(channel_mult))
        _check_rates(attention_resolutions, len(channel_mult))
        self.model_channels = model_channels
        self.num_classes, self.token_dim = num_classes, token_dim
        self.out_channels = 2 * out_channels if learn_sigma else out_channels
        self.embedding_dim = 4 * model_channels
        self.time_embed = nn.Sequential(
            nn.Linear(model_channels, self.embedding_dim),
            nn.SiLU(),
            nn.Linear(self.embedding_dim, self.embedding_dim),
        )
        if num_classes is not None:
            self.label_emb = nn.Embedding(num_classes + 1, self.embedding_dim)

        def residual(channels: int, width: int, resample: nn.Module | None = None) -> nn.Module:
            return ResBlock(
                channels, width, self.embedding_dim, scale_shift_norm, dropout, resample
            )

        def attention(channels: int) -> nn.Module:
            heads = _heads(channels, num_heads, num_head_channels)
            if token_dim is None:
                return AttentionBlock(channels, heads)
            return SpatialTransformer(channels, heads, token_dim, transformer_depth)

        def blocks(level: int, channels: int, width: int) -> list[nn.Module]:
            attends = 2**level in attention_resolutions
            return [residual(channels, width)] + ([attention(width)] if attends else [])

        widths = [_width(model_channels, mult) for mult in channel_mult]
        channels, last = widths[0], len(widths) - 1
        self.input_blocks = nn.ModuleList([Stage(nn.Conv2d(in_channels, channels, 3, padding=1))])
        skips = [channels]
        for level, width in enumerate(widths):
            for _ in range(num_res_blocks):
                self.input_blocks.append(Stage(*blocks(level, channels, width)))
                channels = width
                skips.append(channels)
            if level < last:
                down = residual(width, width, Halve()) if resblock_updown else Downsample(width)
                self.input_blocks.append(Stage(down))
                skips.append(channels)

        self.middle_block = nn.ModuleList(
            [residual(channels, channels), attention(channels), residual(channels, channels)]
        )

        self.output_blocks = nn.ModuleList()
        for level, width in reversed(list(enumerate(widths))):
            for i in range(num_res_blocks + 1):
                layers = blocks(level, channels + skips.pop(), width)
                channels = width
                if level and i == num_res_blocks:
                    up = residual(width, width, Double()) if resblock_updown else Upsample(width)
                    layers.append(up)
                self.output_blocks.append(Stage(*layers))

        repeated = (ResBlock, AttentionBlock, SpatialTransformer)
        set_recompute([m for m in self.modules() if isinstance(m, repeated)], checkpointing)
        self.out = nn.Sequential(
            GroupNormSiLU(NORM_GROUPS, channels),
            nn.Identity(),  # where the originals have their SiLU
            zeroed(nn.Conv2d(channels, self.out_channels, 3, padding=1)),
        )

    @property
    def ends(self) -> tuple[nn.Module, ...]:
        """The first and the last map, which see pixels."""
        return self.input_blocks[0], self.out

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        labels: Tensor | None = None,
        tokens: Tensor | None = None,
    ) -> Tensor:
        """(B, in_channels, H, W), (B,) timesteps, conditions -> (B, C or 2C, H, W).

        Args:
            x: the noised image, and what is joined to it.
            t: on the scale 0 .. 1000.
            labels: (B,) int64, exactly if there are classes.
            tokens: (B, L, D), exactly if there is a width of tokens.

        Raises:
            UserError: a condition is missing, or the model has no use for it.
        """
        check_given("labels", labels, self.num_classes is not None)
        check_given("tokens", tokens, self.token_dim is not None)
        code = sinusoid(t, self.model_channels).to(next(self.parameters()).dtype)
        embedding = self.time_embed(code)
        if labels is not None:
            embedding = embedding + embedded(self.label_emb.weight, labels)
        x, skips = laid_out(x), []
        for block in self.input_blocks:
            x = block(x, embedding, tokens)
            skips.append(x)
        x = _through(self.middle_block, x, embedding, tokens)
        for block in self.output_blocks:
            x = block(torch.cat([x, skips.pop()], dim=1), embedding, tokens)
        return self.out(x)


def _check_rates(rates: Sequence[int], levels: int) -> None:
    possible = [2**level for level in range(levels)]
    if not set(rates) <= set(possible):
        raise UserError(
            f"attention_resolutions={tuple(rates)} are downsampling rates; {levels} levels have "
            f"{possible}."
        )


def _width(model_channels: int, mult: float) -> int:
    width = int(model_channels * mult)
    if width <= 0 or width % NORM_GROUPS:
        raise UserError(
            f"model_channels={model_channels} at multiplier {mult:g} makes {width} channels; "
            f"needed: a positive multiple of {NORM_GROUPS}."
        )
    return width


def _heads(channels: int, num_heads: int, num_head_channels: int | None) -> int:
    divisor = num_heads if num_head_channels is None else num_head_channels
    if divisor < 1 or channels % divisor:
        name = "num_heads" if num_head_channels is None else "num_head_channels"
        divisors = [d for d in range(1, channels + 1) if channels % d == 0]
        raise UserError(
            f"{name}={divisor} does not divide an attention's {channels} channels; choose from "
            f"{divisors}."
        )
    return num_heads if num_head_channels is None else channels // num_head_channels


class Stage(nn.Sequential):
    """Layers in order, each given what it takes of the embedding of t and of the tokens."""

    def forward(self, x: Tensor, embedding: Tensor, tokens: Tensor | None) -> Tensor:
        """(B, C, H, W), (B, E), (B, L, D) -> (B, C, H, W) of other sizes."""
        return _through(self, x, embedding, tokens)


def _through(
    layers: Iterable[nn.Module], x: Tensor, embedding: Tensor, tokens: Tensor | None
) -> Tensor:
    for layer in layers:
        if isinstance(layer, ResBlock):
            x = layer(x, embedding)
        elif isinstance(layer, SpatialTransformer):
            assert tokens is not None
            x = layer(x, tokens)
        else:
            x = layer(x)
    return x
