import pytest
import torch

from speed_engine.evaluation.classifier import Classifier, ClassifierFeatures
from speed_engine.evaluation.consistency import (
    likeness,
    partners_of,
    side_by_side,
)
from speed_engine.evaluation.image_set import ImageSet


def pixels(count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, 1, 8, 8), dtype=torch.uint8, generator=generator)


def test_a_model_is_wholly_consistent_with_itself():
    images = pixels(40, 0)
    found = likeness(images, images, partners_of(None, 40))
    assert found.distance == 0 == found.ratio and found.cosine == pytest.approx(1)
    # two independent uniform pixels from -1 to 1 are 2/3 apart in the mean square
    assert found.distance_unpaired == pytest.approx(2 / 3, rel=0.1)


def test_unrelated_models_are_as_far_apart_as_partners():
    found = likeness(pixels(400, 0), pixels(400, 1), partners_of(None, 400))
    assert found.ratio == pytest.approx(1, abs=0.05)
    assert abs(found.cosine) < 0.03 and abs(found.cosine_unpaired) < 0.03


def test_half_the_images_shared_are_half_the_distance():
    a, b = pixels(400, 0), pixels(400, 1)
    b[::2] = a[::2]
    assert likeness(a, b, partners_of(None, 400)).ratio == pytest.approx(0.5, abs=0.05)


def test_partners_are_others_of_the_same_class_each_once():
    labels = torch.tensor([0, 1, 2, 2, 1, 0, 0, 1, 2, 0])
    partners = partners_of(labels, 10)
    assert torch.equal(labels[partners], labels)
    assert (partners != torch.arange(10)).all()
    assert torch.equal(partners.sort().values, torch.arange(10))


def test_a_class_of_one_image_is_refused():
    with pytest.raises(ValueError, match="class 2 has one only.*--count 6 or more"):
        partners_of(torch.tensor([0, 1, 2, 0, 1]), 5)
    with pytest.raises(ValueError, match="--count 2 or more"):
        partners_of(None, 1)


def test_features_are_those_of_the_extractor_and_nothing_is_printed(capfd):
    images, network = pixels(300, 0), Classifier(1, 2).eval()
    extractor = ClassifierFeatures(
        name="consistency-test", weights_sha256="0" * 64, feature_dim=64, channels=1,
        accuracy=0.5, network=network,
    )  # fmt: skip
    ours = ImageSet(images, 300, extractor).features
    assert ours.shape == (300, 64) and capfd.readouterr() == ("", "")
    torch.testing.assert_close(ours, network.features(images).double().detach())


def test_rows_of_the_two_models_alternate():
    a, b = pixels(70, 0), pixels(70, 1)
    images, rows = side_by_side(a, b)
    assert len(images) == 100 and rows.bincount().tolist() == [10] * 10
    assert torch.equal(images[rows == 2], a[10:20]) and torch.equal(images[rows == 3], b[10:20])
