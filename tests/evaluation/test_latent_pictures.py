"""What a model of latents draws becomes pictures where its VAE is known."""

import importlib
import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_latents import write_vae

from speed_engine import build
from speed_engine.config import TrainConfig
from speed_engine.data.config import DataConfig
from speed_engine.data.format.writer import ShardWriter
from speed_engine.evaluation.config import EvaluationConfig


@pytest.fixture
def vae(tmp_path) -> Path:
    return write_vae(tmp_path / "vae")


def write_latents(folder: Path, metadata: dict[str, float]) -> Path:
    file = io.BytesIO()
    np.save(file, np.ones((8, 4, 4), np.float16))
    with ShardWriter(folder, "x", 4, metadata) as writer:
        writer.write("0", {"npy": file.getvalue(), "cls": b"0"})
    return folder


def configured(vae: Path, shards: Path) -> TrainConfig:
    data = DataConfig(
        source=str(shards),
        image_shape=(4, 4, 4),
        latents=True,
        vae=str(vae),
        num_classes=2,
    )
    evaluation = EvaluationConfig(features="none", num_images=5, solver_steps=2, metrics=("fid",))
    return replace(TrainConfig(), data=data, evaluation=evaluation, device="cpu")


def test_evaluation_decodes_what_it_draws_at_the_scale_of_the_data(vae, tmp_path):
    scales = {"latent_scale": 0.5, "latent_shift": 0.25}
    config = configured(vae, write_latents(tmp_path / "shards", scales))
    model, process = build.build_model(config).eval(), build.build_process(config)
    evaluator = build.build_evaluator(config, process)
    images, fidelity = evaluator(model)
    latents, _ = replace(evaluator, decode=None)(model)
    assert fidelity is None and latents.dtype == torch.float32 and latents.shape == (5, 4, 4, 4)
    decoder = importlib.import_module("diffusers").AutoencoderKL.from_pretrained(vae).eval()
    with torch.no_grad():
        expected = (decoder.decode(latents / 0.5 + 0.25).sample + 1) * 127.5
    assert images.dtype == torch.uint8 and images.shape == (5, 3, 16, 16)
    assert (images - expected.clamp(0, 255)).abs().max() <= 0.51


def test_without_a_vae_latents_stay_what_they_are(vae, tmp_path):
    config = configured(vae, write_latents(tmp_path / "shards", {}))
    plain = replace(config, data=replace(config.data, vae=None))
    assert build.build_decoder(plain) is None


def test_a_scale_that_is_not_recorded_is_not_guessed(vae, tmp_path):
    config = configured(vae, write_latents(tmp_path / "shards", {}))
    with pytest.raises(ValueError, match="does not record its latent_scale"):
        build.build_decoder(config)


def test_a_vae_is_for_latents_only():
    with pytest.raises(ValueError, match="data.vae=vae: is for data.latents True"):
        DataConfig(vae="vae")
