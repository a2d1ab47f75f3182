"""Weights in other libraries' layouts, read from and written to files.

``original``    names as in the model's original code, such as facebookresearch/DiT, which are ours;
                one safetensors file, or the .pt files that such code writes
``diffusers``   ``DiTTransformer2DModel``: a folder with config.json and one safetensors file

diffusers keeps a copy of the timestep and label embedding in every block, splits queries, keys and
values, does not store positions, and computes time features with a frequency shift of 1 (see
``embeddings.sinusoid``) whatever the weights were trained with: a model trained with 0 answers
otherwise there until ``set_frequency_shift`` is called on it.
"""

import argparse
import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from speed_engine.models.dit import DiT

LAYOUTS = ("original", "diffusers")
DIFFUSERS_FILE = "diffusion_pytorch_model.safetensors"
SHIFT = "frequency_shift"  # in the metadata of files written here

# Our module: diffusers' modules. ``{}`` stands for the number of a block.
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


def load_pretrained(model: nn.Module, path: Path) -> None:
    """Copy the weights of a file into a model, by name.

    Args:
        model: of the file's sizes.
        path: a .safetensors file of either layout, a folder that diffusers saved, or a .pt file of
            facebookresearch/DiT, of which the average is taken where there is one. A .pt file is a
            pickle: it is read by PyTorch's restricted reader, which runs no code.

    Raises:
        ValueError: no such file, not such a file, or tensors that are missing, left over or of
            other shapes (lists them); time features of another frequency shift; diffusers' layout
            for a model that it cannot hold, or with embeddings that differ between blocks.
    """
    path = path / DIFFUSERS_FILE if path.is_dir() else path
    tensors, metadata = _read(path)
    layout = (
        "diffusers" if any(n.startswith("transformer_blocks.") for n in tensors) else LAYOUTS[0]
    )
    ours = model.state_dict()
    sources = _names(model, layout)
    _require_shift(model, layout, metadata, path)
    expected = {
        n: tuple(part.shape)
        for name, there in sources.items()
        for n, part in zip(there, _parts(name, ours[name], len(there)), strict=True)
    }
    require_shapes(expected, tensors, path)
    found = {
        name: _joined(name, [tensors[n] for n in there], path)
        for name, there in sources.items()
        if there
    }
    model.load_state_dict(ours | found)


def save_pretrained(model: nn.Module, path: Path, layout: str) -> list[Path]:
    """Write a model's weights: a .safetensors file for ``original``, a folder for ``diffusers``.

    Returns:
        The files written.

    Raises:
        ValueError: an unknown layout, a path that is taken, or a model that diffusers cannot hold.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r} is unknown; choose from {', '.join(LAYOUTS)}.")
    if path.exists():
        raise ValueError(f"{path} exists already; name another path.")
    if layout == "original" and path.suffix != ".safetensors":
        raise ValueError(f"{path} does not end in .safetensors, as a file of layout original must.")
    tensors = _exported(model, layout)
    metadata = {"format": "pt", SHIFT: str(_shift_of(model))}
    if layout == "original":
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path, metadata)
        return [path]
    config = _diffusers_config(model)
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(tensors, path / DIFFUSERS_FILE, metadata)
    return [path / "config.json", path / DIFFUSERS_FILE]


def set_frequency_shift(transformer: nn.Module, shift: float) -> None:
    """Make a loaded ``DiTTransformer2DModel`` compute its time features with this shift.

    Its configuration has no place for it; call this after every ``from_pretrained``.

    Raises:
        ValueError: the model has no such features.
    """
    features = [m for name, m in transformer.named_modules() if name.endswith("emb.time_proj")]
    if not features:
        raise ValueError(f"{type(transformer).__name__} has no time features named emb.time_proj.")
    for module in features:
        module.downscale_freq_shift = shift  # type: ignore[assignment]


def require_shapes(
    expected: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Tensor], source: Path
) -> None:
    """Raise one error that lists every tensor that is missing, left over or of another shape.

    Raises:
        ValueError: there is any.
    """
    found = {name: tuple(value.shape) for name, value in tensors.items()}
    if found == expected:
        return
    missing, unexpected = sorted(expected.keys() - found), sorted(found.keys() - expected)
    reshaped = [
        f"{name} is {found[name]} there and {expected[name]} here"
        for name in sorted(expected.keys() & found)
        if expected[name] != found[name]
    ]
    raise ValueError(
        f"{source} is a checkpoint of another model: "
        f"missing {missing}, unexpected {unexpected}, reshaped {reshaped}."
    )


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata) of a file."""
    if not path.is_file():
        raise ValueError(f"{path} is no file.")
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
        except SafetensorError as error:
            raise ValueError(f"{path} is no safetensors file ({error}).") from error
    if path.suffix not in (".pt", ".pth"):
        raise ValueError(f"{path} ends in none of .safetensors, .pt and .pth.")
    try:
        # The original's training script stores its arguments beside the weights.
        with torch.serialization.safe_globals([argparse.Namespace]):
            stored = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"{path} holds more than tensors, or is damaged; nothing of it was run. If you trust "
            f"it, convert it to .safetensors elsewhere. ({str(error).splitlines()[0]})"
        ) from error
    for part in ("ema", "model"):
        stored = stored.get(part, stored) if isinstance(stored, dict) else stored
    if not isinstance(stored, dict) or not all(isinstance(v, Tensor) for v in stored.values()):
        raise ValueError(f"{path} holds no dictionary of tensors, nor one named ema or model.")
    return stored, {}


def _names(model: nn.Module, layout: str) -> dict[str, list[str]]:
    """Where each tensor of ours is found: in several parts or copies, or nowhere (positions)."""
    if layout == "original":
        return {name: [name] for name in model.state_dict()}
    depth = len(_require_dit(model).blocks)
    return {name: _diffusers_names(name, depth) for name in model.state_dict()}


def _require_dit(model: nn.Module) -> DiT:
    if not isinstance(model, DiT) or model.num_classes is None:
        raise ValueError(
            f"layout diffusers is for class-conditional DiTs, not "
            f"{type(model).__name__} as it is here."
        )
    return model


def _diffusers_names(name: str, depth: int) -> list[str]:
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
        raise ValueError(f"diffusers' DiTTransformer2DModel has nothing that is our {name}.")
    return [f"transformer_blocks.{number}.{theirs}.{kind}" for theirs in _IN_BLOCK[inner]]


def _parts(name: str, value: Tensor, count: int) -> list[Tensor]:
    """Inverse of ``_joined``."""
    return list(value.chunk(count)) if _is_split(name) and count else [value] * count


def _is_split(name: str) -> bool:
    return ".attn.qkv." in name


def _joined(name: str, parts: list[Tensor], source: Path) -> Tensor:
    """One tensor of ours from its parts or copies."""
    if _is_split(name):
        return torch.cat(parts)
    if any(not torch.equal(parts[0], other) for other in parts[1:]):
        raise ValueError(
            f"{source}: the blocks' copies of {name} differ, as they do after training in "
            "diffusers; a DiT has one for all blocks and cannot hold them."
        )
    return parts[0]


def _exported(model: nn.Module, layout: str) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    names = _names(model, layout)
    for name, value in model.state_dict().items():
        there = names[name]
        parts = _parts(name, value, len(there))
        # Copies, since safetensors refuses tensors that share memory.
        tensors |= {n: part.detach().cpu().clone() for n, part in zip(there, parts, strict=True)}
    return tensors


def _shift_of(model: nn.Module) -> float:
    return model.t_embedder.frequency_shift if isinstance(model, DiT) else 0.0


def _require_shift(
    model: nn.Module, layout: str, metadata: Mapping[str, str], source: Path
) -> None:
    """The time features that the weights were trained with must be the model's."""
    told, ours = metadata.get(SHIFT), _shift_of(model)
    theirs = float(told) if told is not None else float(layout == "diffusers")
    if theirs != ours:
        reason = "is recorded in it" if told is not None else f"is that of layout {layout}"
        raise ValueError(
            f"{source}: a frequency shift of {theirs:g} {reason}, and the model has {ours:g}; set "
            f"model.frequency_shift={theirs:g}."
        )


def _diffusers_config(module: nn.Module) -> dict[str, Any]:
    model = _require_dit(module)
    rows, columns = model.grid
    embedding = model.x_embedder.proj
    dim = embedding.out_channels
    if rows != columns or model.mlp_ratio != 4:
        raise ValueError(
            f"diffusers' DiTTransformer2DModel has square inputs and an mlp_ratio of 4; this model "
            f"has {rows} x {columns} patches and {model.mlp_ratio:g}."
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
