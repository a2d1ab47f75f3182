"""DiT weights in the layout of diffusers' ``DiTTransformer2DModel``.

Tensors by name in, tensors by name out; reading the file is the caller's part. diffusers keeps a
copy of the timestep and label embedding in every block, splits queries, keys and values, does not
store positions, and computes time features with a frequency shift of 1 (see
``embeddings.sinusoid``) whatever the weights were trained with: a model trained with 0 answers
otherwise there until ``set_frequency_shift`` is called on it.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from speed_engine.models.dit import DiT
from speed_engine.runtime.checks import UserError

DIFFUSERS_SHIFT = 1.0
# Our module: diffusers'. ``{}`` stands for the number of a block.
_OUTER = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
_IN_EVERY_BLOCK = {
    "t_embedder.mlp.0": "transformer_blocks.{}.norm1.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "transformer_blocks.{}.norm1.emb.timestep_embedder.linear_2",
    "y_embedder.embedding_table": "transformer_blocks.{}.norm1.emb.class_embedder.embedding_table",
}
_IN_BLOCK = {
    "adaLN_modulation.1": ["norm1.linear"],
    "attn.qkv": ["attn1.to_q", "attn1.to_k", "attn1.to_v"],
    "attn.proj": ["attn1.to_out.0"],
    "mlp.fc1": ["ff.net.0.proj"],
    "mlp.fc2": ["ff.net.2"],
}


def to_diffusers(model: DiT) -> dict[str, Tensor]:
    """The weights as ``DiTTransformer2DModel`` loads them, built as ``diffusers_config`` says.

    Raises:
        UserError: it cannot hold this model.
    """
    tensors: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        there = _names(name, len(model.blocks))
        tensors |= dict(zip(there, _parts(name, value, len(there)), strict=True))
    return tensors


def from_diffusers(tensors: Mapping[str, Tensor], model: DiT) -> dict[str, Tensor]:
    """What ``model`` loads, from tensors of the names that ``to_diffusers`` gives it.

    Raises:
        UserError: embeddings differ between blocks.
    """
    ours = model.state_dict()
    for name in ours:
        parts = [tensors[there] for there in _names(name, len(model.blocks))]
        if _is_split(name):
            ours[name] = torch.cat(parts)
        elif parts:
            ours[name] = _shared(name, parts)
    return ours


def diffusers_config(model: DiT) -> dict[str, Any]:
    """The config.json of a ``DiTTransformer2DModel`` of the model's sizes.

    Raises:
        UserError: it cannot be of these sizes.
    """
    rows, columns = model.grid
    embedding = model.x_embedder.proj
    dim = embedding.out_channels
    if rows != columns or model.mlp_ratio != 4 or model.num_classes is None:
        raise UserError(
            "diffusers' DiTTransformer2DModel has square inputs, classes and an mlp_ratio of 4; "
            f"this model has {rows} x {columns} patches, {model.num_classes} classes and "
            f"{model.mlp_ratio:g}."
        )
    return {
        "_class_name": "DiTTransformer2DModel",
        "num_attention_heads": model.num_heads,
        "attention_head_dim": dim // model.num_heads,
        "in_channels": embedding.in_channels,
        "out_channels": model.out_channels,
        "num_layers": len(model.blocks),
        "sample_size": rows * model.patch_size,
        "patch_size": model.patch_size,
        "num_embeds_ada_norm": model.num_classes,
        "norm_type": "ada_norm_zero",
        "activation_fn": "gelu-approximate",
        "norm_eps": 1e-6,
    }


def set_frequency_shift(transformer: nn.Module, shift: float) -> None:
    """Make a loaded ``DiTTransformer2DModel`` compute its time features with this shift.

    Its configuration has no place for it; call this after every ``from_pretrained``.

    Raises:
        UserError: the model has no such features.
    """
    features = [m for name, m in transformer.named_modules() if name.endswith("emb.time_proj")]
    if not features:
        raise UserError(f"{type(transformer).__name__} has no time features named emb.time_proj.")
    for module in features:
        module.downscale_freq_shift = shift  # type: ignore[assignment]


def _names(name: str, depth: int) -> list[str]:
    """Where a tensor of ours is found: in several parts or copies, or nowhere (positions)."""
    if name == "pos_embed":
        return []
    module, _, kind = name.rpartition(".")
    if module in _OUTER:
        return [f"{_OUTER[module]}.{kind}"]
    if module in _IN_EVERY_BLOCK:
        return [f"{_IN_EVERY_BLOCK[module].format(i)}.{kind}" for i in range(depth)]
    blocks, _, rest = module.partition(".")
    number, _, inner = rest.partition(".")
    if blocks != "blocks" or inner not in _IN_BLOCK:
        raise UserError(f"diffusers' DiTTransformer2DModel has nothing that is our {name}.")
    return [f"transformer_blocks.{number}.{theirs}.{kind}" for theirs in _IN_BLOCK[inner]]


def _is_split(name: str) -> bool:
    return ".attn.qkv." in name


def _parts(name: str, value: Tensor, count: int) -> list[Tensor]:
    return list(value.chunk(count)) if _is_split(name) else [value] * count


def _shared(name: str, copies: list[Tensor]) -> Tensor:
    if any(not torch.equal(copies[0], other) for other in copies[1:]):
        raise UserError(
            f"the blocks' copies of {name} differ, as they do after training in diffusers; a DiT "
            "has one for all blocks and cannot hold them."
        )
    return copies[0]
