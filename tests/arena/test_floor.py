"""Images without a network: what a metric says of two moments, and of the training images."""

import torch

from speed_engine.arena.floor import gaussian_images, measure_references
from speed_engine.arena.results import GAUSSIAN, REAL
from speed_engine.config import TrainConfig
from speed_engine.data.config import DataConfig
from speed_engine.evaluation.config import EvaluationConfig


def test_draws_have_mean_and_covariance_of_their_class():
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(2, 6, 6, generator=generator) * 8
    normal = torch.randn(2, 400, 6, generator=generator)
    rows = (128 + normal @ mixing + torch.tensor([[[-30.0]], [[30.0]]])).round().clamp(0, 255)
    images = rows.to(torch.uint8).flatten(0, 1).view(-1, 1, 2, 3)
    labels = torch.arange(2).repeat_interleave(400)
    wanted = torch.arange(2).repeat(20_000)
    drawn = gaussian_images(images, labels, wanted, generator)
    assert drawn.shape == (40_000, 1, 2, 3) and drawn.dtype == torch.uint8
    for label in (0, 1):
        fitted = images[labels == label].flatten(1).float()
        found = drawn[wanted == label].flatten(1).float()
        assert (found.mean(0) - fitted.mean(0)).abs().max() < 1.5
        assert (found.T.cov() - fitted.T.cov()).norm() < 0.1 * fitted.T.cov().norm()


def test_a_class_without_images_is_drawn_from_all():
    images = torch.full((50, 1, 1, 1), 90, dtype=torch.uint8)
    drawn = gaussian_images(
        images, torch.zeros(50).long(), torch.tensor([3]), torch.Generator().manual_seed(0)
    )
    assert drawn.item() == 90


def test_latents_have_no_pictures_to_fit():
    config = TrainConfig(
        data=DataConfig(latents=True), evaluation=EvaluationConfig(features="none")
    )
    assert measure_references(config) == {}


def test_one_image_of_a_class_is_drawn_as_it_is():
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(256, (1, 3, 2, 2), generator=generator).to(torch.uint8)
    drawn = gaussian_images(image, torch.tensor([4]), torch.tensor([4, 4]), generator)
    assert torch.equal(drawn, image.expand(2, -1, -1, -1))


def test_the_training_images_are_nearer_to_themselves_than_a_gaussian_is():
    config = TrainConfig(
        device="cpu",
        data=DataConfig(held_out=0.3),
        evaluation=EvaluationConfig(
            num_images=500, metrics=("fid", "copies", "class_agreement", "loss")
        ),
    )
    found = measure_references(config)
    assert list(found) == [GAUSSIAN, REAL]
    of_models = {"class_agreement", "validation_loss"}  # images here are of no class asked for
    assert not any(of_models & figures.keys() for figures in found.values())
    assert found[REAL]["fid"] < found[GAUSSIAN]["fid"]
    assert 1 < found[GAUSSIAN]["held_out_fid"] < 6
    assert found[REAL]["copied_share"] > 0.9 > 0.5 > found[GAUSSIAN]["copied_share"]
