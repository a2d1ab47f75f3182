"""U-Net weights in the layouts of others: CompVis/latent-diffusion, NVlabs/edm, diffusers.

Tensors by name in, tensors by name out; reading the file is the caller's part.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from speed_engine.models.layers.spatial_transformer import SpatialTransformer
from speed_engine.models.layers.unet_layers import AttentionBlock, Downsample, ResBlock
from speed_engine.models.unet import UNet
from speed_engine.runtime.checks import UserError

LDM_PREFIX = "model.diffusion_model."
EDM_PREFIX = "model."
# Names inside a module that diffusers has otherwise.
INNER_NAMES: dict[type[nn.Module], dict[str, str]] = {
    ResBlock: {
        "in_layers.0": "norm1",
        "in_layers.2": "conv1",
        "emb_layers.1": "time_emb_proj",
        "out_layers.0": "norm2",
        "out_layers.3": "conv2",
        "skip_connection": "conv_shortcut",
    },
    AttentionBlock: {"norm": "group_norm", "proj_out": "to_out.0"},
    Downsample: {"op": "conv"},
}


def from_ldm(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What ``UNet`` loads, from a checkpoint of latent-diffusion or guided-diffusion.

    Parts that are not of the U-Net are left out. There is no row for "no label" in these: the one
    added is zero, so that it changes nothing in the embedding of t.
    """
    prefixed = any(name.startswith(LDM_PREFIX) for name in tensors)
    prefix = LDM_PREFIX if prefixed else ""
    ours = {
        name.removeprefix(prefix): value
        for name, value in tensors.items()
        if name.startswith(prefix)
    }
    if "label_emb.weight" in ours:
        rows = ours["label_emb.weight"]
        ours["label_emb.weight"] = torch.cat([rows, torch.zeros_like(rows[:1])])
    return ours


def from_edm(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What ``SongUNet`` and ``DhariwalUNet`` load, from the network of an EDM snapshot.

    The input of augmentation labels is left out, which changes nothing where there are none, and so
    are the filters of the resampling, which are always means here.

    Raises:
        UserError: a filter is another one, as in NCSN++.
    """
    ours = {}
    for name, value in tensors.items():
        name = name.removeprefix(EDM_PREFIX)
        if name.endswith("resample_filter"):
            if value.shape != (1, 1, 2, 2) or bool((value != 0.25).any()):
                raise UserError(
                    f"{name} of shape {tuple(value.shape)} is not the mean of 2 x 2 pixels; only "
                    "DDPM++ and ADM networks can be read, not NCSN++."
                )
        elif name != "map_augment.weight":
            ours[name] = value
    return ours


def from_diffusers(tensors: Mapping[str, Tensor], model: UNet) -> dict[str, Tensor]:
    """What ``model`` loads, from the weights of diffusers' model of the same architecture.

    Raises:
        UserError: names are missing or left over; lists them.
    """
    matches = _matches(model)
    known = {name for match in matches for name in match.theirs}
    if known != set(tensors):
        missing, unexpected = sorted(known - set(tensors)), sorted(set(tensors) - known)
        raise UserError(
            f"these are weights of another U-Net: missing {missing}, unexpected {unexpected}."
        )
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    ours = {}
    for match in matches:
        values = [tensors[name] for name in match.theirs]
        if len(values) > 1:
            heads = [value.unflatten(0, (match.num_heads, -1)) for value in values]
            values = [torch.stack(heads, dim=1)]
        ours[match.ours] = values[0].reshape(shapes[match.ours])
    return ours


class _Match(NamedTuple):
    ours: str
    theirs: list[str]  # one name, or those of queries, keys and values
    num_heads: int


def _matches(model: UNet) -> list[_Match]:
    return [
        _Match(f"{ours}.{name}", _names(module, name, theirs), getattr(module, "num_heads", 1))
        for ours, module, theirs in _modules(model)
        for name in module.state_dict()
    ]


def _names(module: nn.Module, name: str, theirs: str) -> list[str]:
    inner, _, kind = name.rpartition(".")
    if isinstance(module, AttentionBlock) and inner == "qkv":
        return [f"{theirs}.to_{letter}.{kind}" for letter in "qkv"]
    inner = INNER_NAMES.get(type(module), {}).get(inner, inner)
    return [f"{theirs}.{inner}.{kind}" if inner else f"{theirs}.{kind}"]


def _modules(model: UNet) -> Iterator[tuple[str, nn.Module, str]]:
    """(our name, module, its name in diffusers) of all that have parameters."""
    whole = {
        "time_embed.0": "time_embedding.linear_1",
        "time_embed.2": "time_embedding.linear_2",
        "label_emb": "class_embedding",
        "input_blocks.0.0": "conv_in",
        "middle_block.0": "mid_block.resnets.0",
        "middle_block.1": "mid_block.attentions.0",
        "middle_block.2": "mid_block.resnets.1",
        "out.0": "conv_norm_out",
        "out.2": "conv_out",
    }
    for ours, module in model.named_modules():
        if ours in whole:
            yield ours, module, whole[ours]
    for list_name, theirs in (("input_blocks", "down"), ("output_blocks", "up")):
        level = place = 0
        for i, stage in enumerate(model.get_submodule(list_name).children()):
            if f"{list_name}.{i}.0" in whole:
                continue
            resampled = False
            for k, layer in enumerate(stage.children()):
                kind = _kind(layer, theirs)
                resampled |= kind.endswith("samplers")
                number = 0 if kind.endswith("samplers") else place
                yield f"{list_name}.{i}.{k}", layer, f"{theirs}_blocks.{level}.{kind}.{number}"
            level, place = (level + 1, 0) if resampled else (level, place + 1)


def _kind(layer: nn.Module, direction: str) -> str:
    if isinstance(layer, (AttentionBlock, SpatialTransformer)):
        return "attentions"
    plain = isinstance(layer, ResBlock) and isinstance(layer.resample, nn.Identity)
    return "resnets" if plain else f"{direction}samplers"
