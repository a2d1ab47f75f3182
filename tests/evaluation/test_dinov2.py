"""FD-DINOv2's features, on a DINOv2 of random weights."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import CLIPVisionConfig, CLIPVisionModel, Dinov2Config, Dinov2Model

from speed_engine.data.config import DataConfig
from speed_engine.evaluation.config import EvaluationConfig
from speed_engine.evaluation.dinov2 import dinov2_features
from speed_engine.evaluation.image_set import extract
from speed_engine.evaluation.metrics import title
from speed_engine.evaluation.references import real_images
from speed_engine.runtime.checks import UserError

SIZE: dict[str, Any] = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dinov2")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Dinov2Model(Dinov2Config(**SIZE, mlp_ratio=2, image_size=70, patch_size=14))
        for weight in model.parameters():
            torch.nn.init.normal_(weight, std=0.3)
        model.save_pretrained(folder)
    return folder


def pictures(count: int, side: int) -> torch.Tensor:
    coarse = np.random.default_rng(0).integers(0, 256, (count, 3, 8, 8), np.uint8)
    return torch.from_numpy(coarse.repeat(side // 8, 2).repeat(side // 8, 3))


def of_definition(folder, pixels: torch.Tensor) -> torch.Tensor:
    """The class token of pixels (N, 3, 224, 224) in 0..255."""
    model = Dinov2Model.from_pretrained(folder).eval()
    normal = (pixels.permute(0, 2, 3, 1) / 255 - torch.tensor([0.485, 0.456, 0.406])) / (
        torch.tensor([0.229, 0.224, 0.225])
    )
    positions = model.embeddings.position_embeddings
    grid = positions[0, 1:].T.reshape(1, 8, 5, 5)
    grid = F.interpolate(grid, scale_factor=(16.1 / 5, 16.1 / 5), mode="bicubic")  # not 16 / 5
    assert grid.shape == (1, 8, 16, 16)
    embeddings: Any = model.embeddings
    embeddings.interpolate_pos_encoding = lambda *_: torch.cat(
        [positions[:, :1], grid.flatten(2).mT], dim=1
    )
    with torch.no_grad():
        tokens = model(pixel_values=normal.permute(0, 3, 1, 2)).last_hidden_state
    return tokens[:, 0]


def test_features_are_the_class_token_of_pictures_of_224_pixels(folder):
    images, extractor = pictures(3, 224), dinov2_features(folder)
    (found,) = extract(images, extractor, ["fid"])
    assert found.shape == (3, extractor.feature_dim) == (3, 8)
    truth = of_definition(folder, images.float())
    assert torch.allclose(found.float(), truth, atol=1e-4) and truth.std() > 0.1


def test_other_pictures_are_resized_as_pillow_does(folder):
    images, bicubic = pictures(2, 32), Image.Resampling.BICUBIC
    resized = [
        np.asarray(Image.fromarray(image.permute(1, 2, 0).numpy()).resize((224, 224), bicubic))
        for image in images
    ]
    (found,) = extract(images, dinov2_features(folder), ["fid"])
    truth = of_definition(folder, torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).float())
    # Pillow rounds to 8 bits; the other kernel of bicubic interpolation is ten times as far off.
    assert (found - truth).norm() < 0.02 * truth.norm()


def test_weights_that_are_not_at_hand_come_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(UserError, match=r"`hf download facebook/dinov2-large` .*--dinov2-weights"):
        dinov2_features()
    with pytest.raises(UserError, match="gone of DINOv2 does not exist; `hf download"):
        dinov2_features(tmp_path / "gone")
    vision = CLIPVisionConfig(**SIZE, intermediate_size=8, image_size=28, patch_size=14)
    CLIPVisionModel(vision).save_pretrained(tmp_path / "clip")
    with pytest.raises(UserError, match="holds a CLIPVisionModel and no Dinov2Model"):
        dinov2_features(tmp_path / "clip")


def test_a_configuration_takes_its_features_and_figures_are_called_after_it(folder):
    settings = EvaluationConfig(features="dinov2", dinov2_weights=folder)
    extractor = real_images(DataConfig(), settings, (1, 8, 8)).extractor
    assert extractor.weights_sha256 == dinov2_features(folder).weights_sha256
    assert title("held_out_fid", extractor.name) == "held-out FID (DINOv2 features)"
    with pytest.raises(UserError, match="isc needs classes, and evaluation.features=dinov2 has"):
        EvaluationConfig(features="dinov2", metrics=("isc",))
