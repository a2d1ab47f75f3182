"""For tests: a run on latents of four numbers a side, its random VAE, and real pictures."""

import importlib
import io
from pathlib import Path

import numpy as np
import torch

from speed_engine.config import TrainConfig
from speed_engine.data.config import DataConfig
from speed_engine.data.format.writer import ShardWriter
from speed_engine.evaluation.config import EvaluationConfig
from speed_engine.models.config import DiTConfig

COUNT = 120  # pictures and latents


def write_vae(folder: Path, channels: int = 4) -> Path:
    """A random one, four times as coarse as the pictures."""
    torch.manual_seed(0)
    importlib.import_module("diffusers").AutoencoderKL(
        block_out_channels=(4, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=2,
        latent_channels=channels,
    ).save_pretrained(folder)
    return folder


def pictures(side: int = 16) -> tuple[np.ndarray, np.ndarray]:
    """(N, side, side, 3) uint8 and their classes, dark or bright."""
    classes = np.arange(COUNT) % 2
    random = np.random.default_rng(0).integers(0, 90, (COUNT, side, side, 3), np.uint8)
    brightness = np.where(classes, 160, 60).astype(np.uint8)
    return random + brightness[:, None, None, None], classes


def write_arrays(folder: Path, arrays: np.ndarray, classes: np.ndarray | None, **metadata) -> Path:
    """Shards of arrays (C, H, W)."""
    with ShardWriter(folder, "x", 50, metadata) as writer:
        for i, array in enumerate(arrays):
            file = io.BytesIO()
            np.save(file, array)
            label = {} if classes is None else {"cls": b"%d" % classes[i]}
            writer.write(f"{i:04d}", {"npy": file.getvalue(), **label})
    return folder


def write_pictures(folder: Path, side: int = 16, labelled: bool = True) -> Path:
    """Shards of the pictures."""
    images, classes = pictures(side)
    return write_arrays(folder, images.transpose(0, 3, 1, 2), classes if labelled else None)


def write_latents(folder: Path) -> Path:
    """Shards of mean and standard deviation of latents."""
    latents = np.random.default_rng(1).normal(size=(COUNT, 8, 4, 4)).astype(np.float16)
    return write_arrays(folder, np.abs(latents), np.arange(COUNT) % 2, latent_scale=0.5)


def config_of(folder: Path, **evaluation) -> TrainConfig:
    """A short run whose files lie in a folder: its latents, its VAE and its reference."""
    settings = {
        "every": 1000,
        "num_images": 70,
        "solver_steps": 2,
        "metrics": ("fid", "kid", "prc"),
        "reference": str(folder / "pictures"),
    }
    return TrainConfig(
        steps=3,
        batch_size=16,
        log_every=3,
        device="cpu",
        compile="off",
        model=DiTConfig(dim=16, depth=1, num_heads=2),
        data=DataConfig(
            source=str(folder / "latents"),
            image_shape=(4, 4, 4),
            latents=True,
            vae=str(folder / "vae"),
            num_classes=2,
        ),
        evaluation=EvaluationConfig(**(settings | evaluation)),
    )
