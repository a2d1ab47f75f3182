import os
import pickle

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from speed_engine.encoders.hub import sha256_of
from speed_engine.evaluation import classifier
from speed_engine.evaluation.classifier import (
    FEATURE_DIM,
    classifier_for,
    kept_classifier,
    train_classifier,
)


def blobs(count=60, channels=1, height=8, width=8, num_classes=3):
    """Noise around one random picture per class."""
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randint(0, 200, (num_classes, channels, height, width), generator=generator)
    labels = torch.arange(count) % num_classes
    noise = torch.randint(0, 56, (count, channels, height, width), generator=generator)
    return (pictures[labels] + noise).to(torch.uint8), labels


@pytest.fixture
def short_training(monkeypatch):
    monkeypatch.setattr(classifier, "LEAST_STEPS", 12)


@pytest.fixture(scope="module")
def digits():
    pixels, labels = load_digits(return_X_y=True)
    images = torch.from_numpy(np.round(np.asarray(pixels) * 255 / 16).astype(np.uint8))
    return images.view(-1, 1, 8, 8), torch.from_numpy(labels)


def test_the_digits_are_told_apart_and_every_feature_is_used(digits):
    images, labels = digits
    network, accuracy = train_classifier(images, labels)
    assert accuracy >= 0.98
    with torch.no_grad():
        found = network.features(images)
    assert found.shape == (len(images), FEATURE_DIM) and found.min() == 0
    assert (found.std(0) > 0).all()


def test_training_is_bitwise_reproducible_for_any_thread_count(short_training):
    images, labels = blobs()
    first, accuracy = train_classifier(images, labels)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        torch.manual_seed(7)
        with torch.no_grad():
            second, second_accuracy = train_classifier(images, labels)
        assert torch.get_num_threads() == threads + 1
    finally:
        torch.set_num_threads(threads)
    assert accuracy == second_accuracy
    for name, weight in first.state_dict().items():
        assert torch.equal(weight, second.state_dict()[name]), name


def test_another_seed_is_another_classifier(short_training):
    networks = [train_classifier(*blobs(), seed=seed)[0] for seed in (0, 1)]
    assert len({sha256_of(network.state_dict()) for network in networks}) == 2


def test_training_never_sees_the_held_out_images(short_training, monkeypatch):
    images, labels = blobs(count=50)
    images[:, 0, 0, 0] = torch.arange(50)
    seen = []
    monkeypatch.setattr(classifier, "_fit", lambda network, images, *rest: seen.append(images))
    train_classifier(images, labels)
    assert len(seen[0]) == 40 and len(seen[0][:, 0, 0, 0].unique()) == 40


def test_the_global_random_state_is_untouched(short_training):
    torch.manual_seed(3)
    before, numpy_before = torch.get_rng_state(), pickle.dumps(np.random.get_state())
    train_classifier(*blobs())
    assert torch.equal(torch.get_rng_state(), before)
    assert pickle.dumps(np.random.get_state()) == numpy_before


@pytest.mark.parametrize(
    "shape", [(3, 32, 32), (1, 28, 20), (2, 5, 9), (1, 1, 1)], ids=lambda s: "C{}-{}x{}".format(*s)
)
def test_any_image_shape_gives_as_many_features_and_one_logit_per_class(shape, monkeypatch):
    monkeypatch.setattr(classifier, "LEAST_STEPS", 2)
    images, labels = blobs(20, *shape, num_classes=4)
    network, _ = train_classifier(images, labels)
    assert network.features(images).shape == (20, FEATURE_DIM)
    assert network(images).shape == (20, 4)


def test_a_shift_moves_whole_images_by_at_most_a_sixteenth():
    images = torch.arange(32.0).expand(200, 2, 32, 32)
    moved = classifier._shifted(images, torch.Generator().manual_seed(0))
    offsets = moved[:, 0, 0, 16] - 16
    assert offsets.unique().tolist() == [-2, -1, 0, 1, 2]
    inner = images[:, :, :, 2:-2] + offsets[:, None, None, None]
    assert torch.equal(moved[:, :, :, 2:-2], inner)


def test_the_cache_returns_the_trained_classifier(short_training, tmp_path, monkeypatch):
    trained = classifier_for(*blobs(), tmp_path / "new", "blobs")
    monkeypatch.setattr(classifier, "train_classifier", None)
    read = classifier_for(*blobs(), tmp_path / "new", "blobs")
    assert read == trained
    count, channels = blobs()[0].shape[:2]
    kept = kept_classifier(count, channels, tmp_path / "new", "blobs")
    assert kept is not None and kept == trained
    assert kept_classifier(count, channels, tmp_path / "new", "others") is None
    assert [path.suffix for path in (tmp_path / "new").iterdir()] == [".safetensors"]
    images = blobs()[0]
    assert torch.equal(read.network(images), trained.network(images))


def test_another_data_set_is_another_cache_file(short_training, tmp_path):
    images, labels = blobs()
    first = classifier_for(images, labels, tmp_path, "blobs")
    second = classifier_for(255 - images, labels, tmp_path, "inverse")
    assert first.name != second.name and len(list(tmp_path.iterdir())) == 2


def damage_header(path):
    path.write_bytes(path.read_bytes()[:7])


def damage_one_weight(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def put_a_pickle(path):
    path.write_bytes(pickle.dumps({"weights": 1}))


@pytest.mark.parametrize("damage", [damage_header, damage_one_weight, put_a_pickle])
def test_a_damaged_cache_file_is_named_with_the_remedy(short_training, tmp_path, damage):
    classifier_for(*blobs(), tmp_path, "blobs")
    (path,) = tmp_path.iterdir()
    damage(path)
    with pytest.raises(ValueError, match="Delete the file") as error:
        classifier_for(*blobs(), tmp_path, "blobs")
    assert str(path) in str(error.value)


def test_the_classifier_of_another_data_set_is_refused(short_training, tmp_path):
    classifier_for(*blobs(), tmp_path, "blobs")
    with pytest.raises(ValueError, match="3 channels, 3 classes"):
        classifier_for(*blobs(channels=3), tmp_path, "blobs")


def test_an_interrupted_write_leaves_no_file(short_training, tmp_path, monkeypatch):
    def fail(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(KeyboardInterrupt):
        classifier_for(*blobs(), tmp_path, "blobs")
    assert not list(tmp_path.iterdir())


def test_other_weights_have_another_name_and_each_is_registered_once(short_training, tmp_path):
    from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

    extractor = classifier_for(*blobs(), tmp_path, "blobs")
    extractor.register()
    registered = FEATURE_EXTRACTORS_REGISTRY[extractor.name]
    classifier_for(*blobs(), tmp_path, "blobs").register()
    assert FEATURE_EXTRACTORS_REGISTRY[extractor.name] is registered

    with torch.no_grad():
        extractor.network.to_logits.bias[0] += 1e-3
    changed = classifier._as_features(extractor.network, extractor.accuracy)
    assert changed.name != extractor.name
    assert changed.weights_sha256[:16] in changed.name


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda x, y: (x.float(), y), "torch.float32; need .* torch.uint8"),
        (lambda x, y: (x[:, 0], y), r"\(60, 8, 8\)"),
        (lambda x, y: (x, y[:-1]), "one integer class for each of the 60 images"),
        (lambda x, y: (x, y.float()), "labels are .* torch.float32"),
        (lambda x, y: (x, y - 1), "numbered from 0"),
        (lambda x, y: (x, y * 0), "two classes or more"),
        (lambda x, y: (x[:3], y[:3]), "5 images or more"),
        (lambda x, y: (x[:0], y[:0]), "5 images or more"),
    ],
)
def test_unfit_training_data_are_refused(change, message, tmp_path):
    images, labels = change(*blobs())
    with pytest.raises(ValueError, match=message):
        train_classifier(images, labels)
    with pytest.raises(ValueError, match=message):
        classifier_for(images, labels, tmp_path, "blobs")


def test_a_fingerprint_cannot_leave_the_cache_folder(tmp_path):
    with pytest.raises(ValueError, match="fingerprint='../x'"):
        classifier_for(*blobs(), tmp_path, "../x")


def test_larger_data_sets_are_trained_on_for_longer():
    assert classifier.training_steps(1797) == classifier.training_steps(4000) == 300
    assert classifier.training_steps(50_000) == 2500  # 8 epochs of four images in five


@pytest.mark.parametrize("accuracy, warned", [(0.56, True), (0.79, True), (0.8, False)])
def test_a_classifier_that_is_often_wrong_is_doubted(accuracy, warned):
    features = classifier._as_features(classifier.Classifier(1, 3), accuracy)
    doubt = features.doubt()
    assert (doubt is not None) == warned
    assert doubt is None or f"right on {accuracy:.1%} of held-out images only" in doubt


def test_a_classifier_that_cannot_be_kept_is_used_and_said(short_training, tmp_path, caplog):
    (tmp_path / "file").write_text("no folder")
    trained = classifier_for(*blobs(), tmp_path / "file", "blobs")
    assert trained.accuracy > 0 and "could not be kept" in caplog.text
