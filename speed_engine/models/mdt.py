"""Masked diffusion transformer (MDT, Gao et al. 2023; MDTv2, 2024).

In training it answers a second time, with part of the image hidden from the encoder blocks: an
interpolater block fills the gaps, and the decoder blocks see all tokens. Without a mask it is a DiT
that knows relative positions. Parameter names, initialisation and numerics follow sail-sg/MDT.

Letters: B images, C channels, H x W pixels, P patch size, N tokens, K of them shown, D width.
"""

from typing import Protocol

import torch
from torch import Tensor, nn

from speed_engine.models.dit import FinalLayer, initialise
from speed_engine.models.layers.blocks import set_recompute
from speed_engine.models.layers.embeddings import (
    LabelEmbedding,
    PatchEmbedding,
    TimestepEmbedding,
    position_grid,
    unpatchify,
)
from speed_engine.models.layers.mdt_block import MdtBlock, Shown
from speed_engine.runtime.checks import UserError

RATIO_SPREAD = 0.2  # MDTv2 hides mask_ratio to mask_ratio + 0.2 of an image


class BlockMaker(Protocol):
    """Makes blocks of one model."""

    def __call__(self, count: int, skip: bool = False) -> nn.ModuleList:
        """A list of ``count``."""
        ...


class MDT(nn.Module):
    """The first version: encoder blocks, decoder blocks, an interpolater between them.

    Args:
        input_size: (H, W); each a multiple of the patch size.
        channels: C, of the answer.
        patch_size: P.
        dim: width D, a multiple of 4.
        depth: number of blocks, the interpolater not counted.
        num_heads: attention heads; divides D.
        num_classes: labels 0 .. num_classes - 1; num_classes itself means "no label". None takes no
            labels.
        decode_layers: how many of the blocks decode, at most the depth; 2 in the paper.
        in_channels: of the input; by default C.
        mask_ratio: share of the tokens hidden under a mask, in (0, 1).
        mlp_ratio: hidden width of the feed-forward layers, in units of D.
        learn_sigma: answer with twice the channels, the second half for the variance.
        checkpointing: activations to recompute, from 0, none, to 1, see ``blocks.set_recompute``.

    Raises:
        UserError: sizes that do not divide as said, or a number out of its range.
    """

    def __init__(
        self,
        *,
        input_size: tuple[int, int],
        channels: int,
        patch_size: int,
        dim: int,
        depth: int,
        num_heads: int,
        num_classes: int | None,
        decode_layers: int,
        in_channels: int | None = None,
        mask_ratio: float = 0.3,
        mlp_ratio: float = 4.0,
        learn_sigma: bool = False,
        checkpointing: float = 0,
    ) -> None:
        super().__init__()
        height, width = input_size
        if height % patch_size or width % patch_size:
            raise UserError(
                f"patch_size={patch_size} does not divide the input size {height} x {width}."
            )
        if dim % 4:
            raise UserError(f"dim={dim} is not a multiple of 4, as the position code needs.")
        self.patch_size, self.out_channels = patch_size, 2 * channels if learn_sigma else channels
        self.grid = height // patch_size, width // patch_size
        self.num_classes, self.mask_ratio = num_classes, mask_ratio
        self.num_tokens = self.grid[0] * self.grid[1]
        self.num_shown = int(self.num_tokens * (1 - mask_ratio))
        self.x_embedder = PatchEmbedding(patch_size, in_channels or channels, dim)
        self.t_embedder = TimestepEmbedding(dim)
        self.y_embedder = None if num_classes is None else LabelEmbedding(num_classes, dim)
        self.pos_embed = nn.Parameter(position_grid(*self.grid, dim))
        self.decoder_pos_embed = nn.Parameter(position_grid(*self.grid, dim))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))

        def blocks(count: int, skip: bool = False) -> nn.ModuleList:
            return nn.ModuleList(
                MdtBlock(dim, num_heads, mlp_ratio, self.grid, skip) for _ in range(count)
            )

        self._add_blocks(blocks, depth, decode_layers)
        self.sideblocks = blocks(1)
        set_recompute([*self.blocks, *self.sideblocks], checkpointing)
        self.final_layer = FinalLayer(dim, patch_size**2 * self.out_channels)
        initialise(self)
        nn.init.normal_(self.mask_token, std=0.02)

    @property
    def mask_words(self) -> int:
        """Random words per image that a mask takes."""
        return self.num_tokens

    @property
    def training_passes(self) -> tuple[dict[str, int], ...]:
        """Every image is denoised twice, once with a part hidden; see ``diffusion.objective``."""
        return {}, {"mask_draws": self.mask_words}

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        labels: Tensor | None = None,
        mask_draws: Tensor | None = None,
    ) -> Tensor:
        """(B, C, H, W), (B,) timesteps, (B,) int64 labels -> (B, C or 2C, H, W).

        Args:
            x: the noised image.
            t: on the scale 0 .. 1000.
            labels: in [0, num_classes]; exactly if there are classes.
            mask_draws: (B, mask_words) int64 in [0, 2**32), uniform; given, they decide which
                tokens are hidden, and otherwise none is.
        """
        # The first summand decides the order in memory. Patches, which a convolution leaves
        # channel by channel, would cost a copy of all tokens wherever a kernel reads them.
        tokens = self.pos_embed + self.x_embedder(x)
        condition = self.t_embedder(t)
        if self.y_embedder is not None:
            condition = condition + self.y_embedder(labels)
        if mask_draws is None:
            seen = self._encode(tokens, condition, None) + self.decoder_pos_embed
        else:
            shown = self.choose_shown(mask_draws)
            encoded = self._encode(at_places(tokens, shown.places), condition, shown)
            seen = self._fill_in(encoded, condition, shown)
        answer = self.final_layer(self._decode(seen, condition, tokens), condition)
        return unpatchify(answer, self.grid, self.patch_size)

    def choose_shown(self, mask_draws: Tensor) -> Shown:
        """(B, mask_words) -> the places of the smallest draws, the same number in each image."""
        places = mask_draws[:, : self.num_tokens].argsort(dim=1, stable=True)
        return Shown(places[:, : self.num_shown], None)

    def _fill_in(self, encoded: Tensor, condition: Tensor, shown: Shown) -> Tensor:
        """(B, K, D) -> (B, N, D): hidden tokens from the interpolater, the shown as they were."""
        batch, _, dim = encoded.shape
        valid = torch.ones_like(shown.places, dtype=torch.bool)
        if shown.valid is not None:
            valid = shown.valid
            encoded = torch.where(valid[:, :, None], encoded, self.mask_token.to(encoded.dtype))
        blank = self.mask_token.to(encoded.dtype).expand(batch, self.num_tokens, dim)
        index = shown.places[:, :, None].expand_as(encoded)
        before = blank.scatter(1, index, encoded) + self.decoder_pos_embed
        after = before
        for block in self.sideblocks:
            after = block(after, condition)
        known = torch.zeros_like(before[:, :, 0], dtype=torch.bool)
        known = known.scatter(1, shown.places, valid)
        return torch.where(known[:, :, None], before, after)

    def _check_ratio(self, largest: float) -> None:
        """Refuse ratios that hide nothing or everything; ``largest`` is the most ever hidden."""
        if not 0 < self.mask_ratio or int(self.num_tokens * (1 - largest)) < 1:
            raise UserError(
                f"mask_ratio={self.mask_ratio} hides up to {largest:g} of {self.num_tokens} tokens;"
                " needed: more than 0, and at least one token left to see."
            )

    def _add_blocks(self, blocks: BlockMaker, depth: int, decode_layers: int) -> None:
        self._check_ratio(self.mask_ratio)
        if not 1 <= decode_layers <= depth:
            raise UserError(f"decode_layers={decode_layers} must lie in [1, depth={depth}].")
        self.blocks, self.num_encoders = blocks(depth), depth - decode_layers

    def _encode(self, x: Tensor, condition: Tensor, shown: Shown | None) -> Tensor:
        for block in self.blocks[: self.num_encoders]:
            x = block(x, condition, shown)
        return x

    def _decode(self, x: Tensor, condition: Tensor, tokens: Tensor) -> Tensor:
        for block in self.blocks[self.num_encoders :]:
            x = block(x, condition)
        return x


class MDTv2(MDT):
    """The second version: the encoder is a U of long skips, and decoders merge the input again.

    Arguments as of ``MDT``, but (depth - decode_layers) is even; 6 decoders in the original's S/2
    and 4 in its XL/2. Each image hides its own share, uniform from mask_ratio to mask_ratio + 0.2;
    the original draws one share for all images of a device. The encoder runs on as many tokens as
    mask_ratio leaves, of which no other token sees those that are hidden after all: shapes stay
    fixed, and the host needs no draw.
    """

    @property
    def mask_words(self) -> int:
        """Random words per image that a mask takes: one per token, and the share."""
        return self.num_tokens + 1

    @property
    def blocks(self) -> list[nn.Module]:
        """Of encoder and decoder."""
        return [*self.en_inblocks, *self.en_outblocks, *self.de_blocks]

    def choose_shown(self, mask_draws: Tensor) -> Shown:
        """(B, mask_words) -> the places of the smallest draws, some of them not valid."""
        places = super().choose_shown(mask_draws).places
        ratio = self.mask_ratio + RATIO_SPREAD * (mask_draws[:, -1:].double() / 2**32)
        count = (self.num_tokens * (1 - ratio)).long()
        return Shown(places, torch.arange(self.num_shown, device=places.device) < count)

    def _add_blocks(self, blocks: BlockMaker, depth: int, decode_layers: int) -> None:
        self._check_ratio(self.mask_ratio + RATIO_SPREAD)
        if not 1 <= decode_layers <= depth or (depth - decode_layers) % 2:
            allowed = list(range(2 - depth % 2, depth + 1, 2))
            raise UserError(
                f"decode_layers={decode_layers} must leave an even number of the depth={depth} "
                f"blocks to the encoder; choose from {allowed}."
            )
        half = (depth - decode_layers) // 2
        self.en_inblocks, self.en_outblocks = blocks(half), blocks(half, skip=True)
        self.de_blocks = blocks(decode_layers, skip=True)

    def _encode(self, x: Tensor, condition: Tensor, shown: Shown | None) -> Tensor:
        skips = []
        for block in self.en_inblocks:
            x = block(x, condition, shown)
            skips.append(x)
        for block in self.en_outblocks:
            x = block(x, condition, shown, skips.pop())
        return x

    def _decode(self, x: Tensor, condition: Tensor, tokens: Tensor) -> Tensor:
        for block in self.de_blocks:
            x = block(x, condition, None, tokens)
        return x


def at_places(tokens: Tensor, places: Tensor) -> Tensor:
    """(B, N, D), (B, K) -> (B, K, D)."""
    return tokens.gather(1, places[:, :, None].expand(-1, -1, tokens.shape[2]))
