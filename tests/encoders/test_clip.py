"""CLIP score of pictures and texts, on a CLIP of random weights."""

import json
import subprocess

import pytest
import torch
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

from speed_engine.config import TrainConfig
from speed_engine.data.config import DataConfig
from speed_engine.encoders.clip import ClipScore
from speed_engine.evaluation.config import EvaluationConfig

WORDS = ["a</w>", "b</w>", "c</w>", "<|startoftext|>", "<|endoftext|>"]
DEVICE = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(WORDS)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    size = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    text = {**size, "num_hidden_layers": 1, "vocab_size": 5, "max_position_embeddings": 8}
    text |= {"bos_token_id": 3, "eos_token_id": 4, "pad_token_id": 4}
    vision = {**size, "num_hidden_layers": 1, "image_size": 32, "patch_size": 16}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = CLIPModel(config)
        for weight in model.parameters():
            torch.nn.init.normal_(weight, std=0.5)
        model.save_pretrained(folder)
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(images, tokenizer).save_pretrained(folder)
    return folder


def test_the_score_is_the_mean_of_clipped_cosines(folder):
    generator = torch.Generator().manual_seed(0)
    colours = torch.randint(0, 256, (70, 3, 2, 2), dtype=torch.uint8, generator=generator)
    images = colours.repeat_interleave(16, 2).repeat_interleave(16, 3)
    texts = ["a b", "c", "a", "a c a b", "b c b c"] * 14
    model, processor = CLIPModel.from_pretrained(folder), CLIPProcessor.from_pretrained(folder)
    cosines = []
    for image, text in zip(images, texts, strict=True):
        inputs = processor(text=[text], images=[image], return_tensors="pt")  # pyright: ignore[reportCallIssue]
        with torch.no_grad():
            cosines.append(model(**inputs).logits_per_text.item() / model.logit_scale.exp().item())
    truth = 100 * sum(max(0.0, c) for c in cosines) / 70
    score = ClipScore(str(folder), DEVICE)
    assert score(images, texts) == pytest.approx(truth, rel=1e-4)
    assert score(images[:1], ["a b " * 9]) >= 0  # cut where the model ends
    assert 0 < min(cosines) < max(cosines) and len(score.weights_sha256) == 64


def test_clip_computes_in_exact_float32(folder):
    score, exact = ClipScore(str(folder), DEVICE), []
    score._model.register_forward_hook(lambda *_: exact.append(not torch.backends.cudnn.allow_tf32))
    score(torch.zeros(1, 3, 32, 32, dtype=torch.uint8), ["a"])
    assert exact == [True] and torch.backends.cudnn.allow_tf32


def test_pictures_of_the_opposite_score_nothing(folder, tmp_path):
    subprocess.run(["cp", "-r", folder, tmp_path / "opposite"], check=True)
    model = CLIPModel.from_pretrained(folder)
    with torch.no_grad():
        model.visual_projection.weight.neg_()
    model.save_pretrained(tmp_path / "opposite")
    images = torch.full((2, 1, 32, 32), 7, dtype=torch.uint8)  # grey ones are taken, too
    assert ClipScore(str(folder), DEVICE)(images, ["a b", "c"]) > 0
    assert ClipScore(str(tmp_path / "opposite"), DEVICE)(images, ["a b", "c"]) == 0


def test_what_is_no_picture_or_has_no_text_is_refused(folder):
    score = ClipScore(str(folder), DEVICE)
    with pytest.raises(ValueError, match="Latents need data.vae"):
        score(torch.zeros(2, 4, 8, 8), ["a", "b"])
    with pytest.raises(ValueError, match="2 images and 1 texts"):
        score(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), ["a"])


def test_models_that_are_conditioned_on_no_texts_have_no_score():
    clip = EvaluationConfig(metrics=("clip",), clip_model="somewhere")
    with pytest.raises(ValueError, match="needs a model that is conditioned on texts"):
        TrainConfig(evaluation=clip)
    with pytest.raises(ValueError, match="set data.vae to decode"):
        TrainConfig(
            evaluation=EvaluationConfig(metrics=("clip",), clip_model="x", features="none"),
            data=DataConfig(members=("npy", "tokens.npy"), latents=True),
        )
    with pytest.raises(ValueError, match="clip needs evaluation.clip_model"):
        EvaluationConfig(metrics=("clip",))


def test_a_model_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match="nothing-here"):
        ClipScore(str(tmp_path / "nothing-here"), DEVICE)
