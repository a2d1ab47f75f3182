import hashlib
import json
import pickle
import subprocess
import sys
import warnings
from typing import Any

import numpy as np
import pytest
import torch
import torch_fidelity
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pixels import Pixels, extractor_of
from torch_fidelity import feature_extractor_inceptionv3
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

from speed_engine.evaluation import classifier, features, fidelity
from speed_engine.evaluation.classifier import train_classifier
from speed_engine.evaluation.features import Extractor
from speed_engine.evaluation.image_set import ImageSet, statistics_of
from speed_engine.evaluation.metrics import METRICS

COMPARING = ("fid", "kid", "isc", "prc")
# The field of a record: what torch-fidelity calls it
THEIRS = {
    "fid": "frechet_inception_distance",
    "kid": "kernel_inception_distance_mean",
    "isc": "inception_score_mean",
    "precision": "precision",
    "recall": "recall",
}
PIXELS = extractor_of(2, 4)


def gaussian_images(count, mean, covariance, seed):
    """(N, 1, 2, 4) uint8: rounded draws, which adds 1/12 to each variance."""
    drawn = np.random.default_rng(seed).multivariate_normal(mean, covariance, count)
    rounded = np.round(drawn)
    assert rounded.min() >= 0 and rounded.max() <= 255
    return torch.from_numpy(rounded.astype(np.uint8)).view(count, 1, 2, 4)


def frechet_distance(x, y):
    """The definition, with the symmetric square root, in float64."""
    x, y = (v.flatten(1).double().numpy() for v in (x, y))
    s_x, s_y = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    values, vectors = np.linalg.eigh(s_x)
    root = (vectors * np.sqrt(values)) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ s_y @ root)).sum()
    return ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(s_x) + np.trace(s_y) - 2 * cross


def measure(generated, real, extractor, metrics=("fid",)) -> dict[str, float]:
    """The figures of some metrics of two sets of images."""
    logits = "isc" in metrics
    ours = ImageSet(generated, len(generated), extractor, logits=logits)
    given: dict[str, Any] = {"generated": ours, "real": ImageSet(real, len(real), extractor)}
    given["logits"] = ours.logits if logits else None
    figures = {}
    for metric in (METRICS[name] for name in metrics):
        figures |= metric.compute(*(given[need] for need in metric.needs))
    return figures


def fid(generated, real, extractor) -> float:
    return measure(generated, real, extractor)["fid"]


@pytest.fixture(scope="module")
def blobs():
    """(200, 1, 8, 8) uint8 around three pictures, and their classifier's features."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(200) % 3
    pictures = torch.randint(0, 200, (3, 1, 8, 8), generator=generator)
    noise = torch.randint(0, 56, (200, 1, 8, 8), generator=generator)
    images = (pictures[labels] + noise).to(torch.uint8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(classifier, "LEAST_STEPS", 40)
        return images, classifier._as_features(*train_classifier(images, labels))


def test_fid_is_the_frechet_distance_of_the_features():
    rng = np.random.default_rng(1)
    mixing = rng.standard_normal((2, 8, 8)) * 4
    covariances = mixing @ mixing.transpose(0, 2, 1) + 20 * np.eye(8)
    x = gaussian_images(700, np.full(8, 128), covariances[0], seed=2)
    y = gaussian_images(500, np.linspace(118, 138, 8), covariances[1], seed=3)
    assert fid(x, y, PIXELS) == pytest.approx(frechet_distance(x, y), rel=1e-6)


@given(st.integers(0, 2**32 - 1))
def test_fid_of_exact_moments_is_the_closed_form_of_gaussians(seed):
    """A design of +-1 has the covariance it is mixed to, times N / (N - 1), and no other.

    Of 2 x 2 blocks, tr (A B)^(1/2) = (tr A B + 2 (det A B)^(1/2))^(1/2).
    """
    rng = np.random.default_rng(seed)
    sign = np.array([[1, 1], [1, -1]])
    design = np.kron(np.kron(sign, sign), np.kron(sign, sign))[:, 1:9]  # (16, 8), orthogonal
    means, mixings = rng.integers(100, 150, (2, 8)), rng.integers(-20, 21, (2, 4, 2, 2))
    truth, sets = ((means[0] - means[1]) ** 2).sum() * 1.0, []
    for mean, mixing in zip(means, mixings, strict=True):
        points = mean + (design.reshape(16, 4, 1, 2) @ mixing)[:, :, 0].reshape(16, 8)
        sets.append(torch.from_numpy(points.astype(np.uint8)).view(16, 1, 2, 4))
    for a, b in zip(*(mixings.transpose(0, 1, 3, 2) @ mixings * 16 / 15), strict=True):
        root = np.sqrt(max(0, np.linalg.det(a) * np.linalg.det(b)))
        truth += np.trace(a) + np.trace(b) - 2 * np.sqrt(np.trace(a @ b) + 2 * root)
    # Where a covariance is singular, square roots of rounding errors remain.
    assert fid(sets[0], sets[1], PIXELS) == pytest.approx(truth, rel=1e-6, abs=1e-4)


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    """The network of published numbers with weights of no meaning, in a file."""
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    with torch.random.fork_rng(devices=[]), pytest.MonkeyPatch.context() as patch:
        torch.manual_seed(0)
        module = feature_extractor_inceptionv3
        patch.setattr(module, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(torch.nn.Module, "load_state_dict", lambda *_: None)
        network = module.FeatureExtractorInceptionV3("", ["2048"])
        for layer in network.modules():
            if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear):
                torch.nn.init.kaiming_normal_(layer.weight)
        network.fc.weight.mul_(10)
    torch.save(network.state_dict(), path)
    # Twelve images will do: how many FID needs is not what is tested here.
    return Extractor(
        name="inception-v3-compat",
        weights_sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        feature_dim=11,
        channels=3,
        weights_path=path,
    )


class Images(torch.utils.data.Dataset):
    """As torch-fidelity takes them."""

    def __init__(self, images):
        self.images = images

    def __getitem__(self, i):
        return self.images[i]

    def __len__(self):
        return len(self.images)


@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes")
def test_metrics_are_those_that_torch_fidelity_computes_of_the_same_images():
    x, y = (gaussian_images(60 + n, np.full(8, 120 + n), 100 * np.eye(8), n) for n in range(2))
    compared = ("fid", "kid", "prc")
    theirs = torch_fidelity.calculate_metrics(
        input1=Images(x),
        input2=Images(y),
        feature_extractor=PIXELS.name,
        kid_subset_size=60,
        cuda=False,
        cache=False,
        verbose=False,
        **dict.fromkeys(compared, True),
    )
    ours = measure(x, y, PIXELS, compared)
    for field in ("fid", "kid", "precision", "recall"):
        assert ours[field] == pytest.approx(theirs[THEIRS[field]], rel=1e-6), field


@pytest.mark.long
def test_metrics_of_two_folders_are_those_of_torch_fidelitys_command(
    inception, tmp_path, monkeypatch
):
    rng = np.random.default_rng(0)
    sets = {
        "a": rng.integers(0, 256, (12, 2, 2, 3), dtype=np.uint8).repeat(8, 1).repeat(8, 2),
        "b": rng.integers(40, 200, (14, 4, 4, 3), dtype=np.uint8).repeat(4, 1).repeat(4, 2),
    }
    for name, images in sets.items():
        (tmp_path / name).mkdir()
        for i, image in enumerate(images):
            Image.fromarray(image).save(tmp_path / name / f"{i:02d}.png")
    options = "--cpu --json --silent --no-cache --save-cpu-ram --fid --kid --isc --prc"
    command = [sys.executable, "-m", "torch_fidelity.fidelity", *options.split()]
    command += ["--input1", "a", "--input2", "b", "--kid-subset-size", "12"]
    command += ["--feature-extractor", inception.name]
    command += ["--feature-extractor-weights-path", str(inception.weights_path)]
    # A layer of 192 features: the roots of a 2048 x 2048 matrix take half a minute.
    compared = ("fid", "kid", "prc")
    command += [word for metric in compared for word in (f"--feature-layer-{metric}", "192")]
    layers = dict.fromkeys(compared, "192") | {"isc": "logits_unbiased"}
    network = feature_extractor_inceptionv3.FeatureExtractorInceptionV3
    monkeypatch.setattr(network, "get_default_feature_layer_for_metric", layers.get)
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    theirs = json.loads(done.stdout)
    a, b = (torch.from_numpy(images).permute(0, 3, 1, 2) for images in sets.values())
    ours = measure(a, b, inception, COMPARING)
    for field, key in THEIRS.items():
        assert ours[field] == pytest.approx(theirs[key], rel=1e-6), field
    assert ours["isc"] > 1.001 and ours["fid"] > 0.1  # the weights tell images apart


def test_fid_of_known_gaussians_approaches_its_closed_form():
    means = np.stack([np.full(8, 120), np.linspace(110, 140, 8)])
    deviations = np.stack([np.full(8, 10), np.linspace(8, 20, 8)])
    x, y = (
        gaussian_images(4000, mean, np.diag(deviation**2), seed)
        for seed, (mean, deviation) in enumerate(zip(means, deviations, strict=True))
    )
    rounded = np.sqrt(deviations**2 + 1 / 12)
    truth = ((means[0] - means[1]) ** 2).sum() + ((rounded[0] - rounded[1]) ** 2).sum()
    assert fid(x, y, PIXELS) == pytest.approx(truth, rel=0.02)


def test_a_set_has_no_distance_to_itself_in_any_order(blobs):
    images, extractor = blobs
    assert fid(images, images, extractor) == pytest.approx(0, abs=1e-6)
    assert fid(images.flip(0), images, extractor) == pytest.approx(0, abs=1e-6)


def test_more_noise_is_a_larger_distance(blobs):
    images, extractor = blobs
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    noisy = {s: (images + s * noise).clamp(0, 255).byte() for s in (0, 10, 20, 40, 80)}
    fids = [fid(x, images, extractor) for x in noisy.values()]
    assert fids == sorted(set(fids))
    kids = [measure(noisy[s][:80], images, extractor, ["kid"])["kid"] for s in (0, 80)]
    assert kids[0] < 0.01 < kids[1]


def test_a_metric_is_the_same_beside_others(blobs):
    images, extractor = blobs
    figures = measure(images[:150], images, extractor, COMPARING)
    assert figures["fid"] == fid(images[:150], images, extractor)
    assert figures["precision"] == 1.0  # every generated image is a real one
    assert 2 < figures["isc"] <= 3  # three classes, told apart


def test_measuring_twice_agrees_and_leaves_the_random_state_and_the_disk_alone(
    blobs, tmp_path, monkeypatch
):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    images, extractor = blobs
    torch.manual_seed(5)
    before, numpy_before = torch.get_rng_state(), pickle.dumps(np.random.get_state())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first, second = (measure(images[:120], images, extractor, COMPARING) for _ in range(2))
    assert first == second
    assert torch.equal(torch.get_rng_state(), before)
    assert pickle.dumps(np.random.get_state()) == numpy_before
    assert not (tmp_path / "torch").exists()


def test_changed_weights_are_never_measured_as_the_old_ones(blobs):
    images, extractor = blobs
    noisy = (images.float() * 0.9).byte()
    old = fid(noisy, images, extractor)
    network = classifier.Classifier(1, 3).eval()
    network.load_state_dict(extractor.network.state_dict())
    with torch.no_grad():
        for weight in network.parameters():
            weight.mul_(1.1)
    changed = classifier._as_features(network, extractor.accuracy)
    assert changed.name != extractor.name and fid(noisy, images, changed) != old
    assert fid(images, images, extractor) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("metric", COMPARING)
def test_each_metric_works_from_its_smallest_number_of_images(blobs, metric):
    images, extractor = blobs
    enough = METRICS[metric].least(extractor.feature_dim)
    figures = measure(images[:enough], images[:enough], extractor, [metric])
    assert np.isfinite(list(figures.values())).all()
    assert figures.keys() == METRICS[metric].figures.keys()


class RgbPixels(Pixels):
    """Stands in for Inception: the features are the pixels, of three channels."""

    def __init__(self, name, features_list, feature_extractor_weights_path, **_settings):
        super().__init__(name, features_list)
        assert feature_extractor_weights_path.read_bytes() == b"weights"

    def forward(self, images):
        assert images.shape[1] == 3
        return super().forward(images)


def test_inception_gets_its_verified_weights_and_grey_images_as_rgb(blobs, tmp_path, monkeypatch):
    registry = FEATURE_EXTRACTORS_REGISTRY
    monkeypatch.setitem(registry, "inception-v3-compat", RgbPixels)
    monkeypatch.setattr(features, "INCEPTION_SHA256", hashlib.sha256(b"weights").hexdigest())
    (tmp_path / "weights.pth").write_bytes(b"weights")
    inception = features.inception_features(tmp_path / "weights.pth")

    grey, rgb = blobs[0][:4], blobs[0][:4].expand(-1, 3, -1, -1)
    assert measure(grey, grey, inception, ["kid"]) == measure(rgb, rgb, inception, ["kid"])


def test_statistics_of_another_precision_than_the_features_are_compared():
    rng = np.random.default_rng(4)
    features = torch.from_numpy(rng.standard_normal((30, 5)).astype(np.float32))
    ours = statistics_of(features)
    theirs = {"mu": np.zeros(5), "sigma": np.eye(5, dtype=np.float32)}
    expected = statistics_of(features.double())
    truth = (expected["mu"] ** 2).sum() + np.trace(expected["sigma"]) + 5
    truth -= 2 * np.sqrt(np.linalg.eigvalsh(expected["sigma"])).sum()
    assert fidelity.frechet_distance(ours, theirs) == pytest.approx(truth, rel=1e-5)
