"""What is measured follows from the table of metrics; few images are called few."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from pixels import extractor_of
from rich.console import Console

from speed_engine.arena.gather import curve_of
from speed_engine.commands.evaluate import show
from speed_engine.config import DataConfig, EvaluationConfig, TrainConfig
from speed_engine.diffusion.processes import build_schedule
from speed_engine.diffusion.table import TimestepTable
from speed_engine.evaluation import classifier, metrics
from speed_engine.evaluation import evaluator as evaluator_module
from speed_engine.evaluation.evaluator import Evaluator
from speed_engine.evaluation.features import INCEPTION
from speed_engine.evaluation.generate import GenerationSettings
from speed_engine.evaluation.image_set import ImageSet
from speed_engine.evaluation.metrics import FIGURES, METRICS, Figure, Metric

EXTRACTOR = extractor_of(2, 4)


def pictures(count: int, seed: int) -> torch.Tensor:
    normal = np.random.default_rng(seed).normal(128, 20, (count, 1, 2, 4))
    return torch.from_numpy(normal.round().clip(0, 255).astype(np.uint8))


TRAINING, HELD_OUT, GENERATED = pictures(600, 0), pictures(200, 1), pictures(250, 2)


def evaluator_of(*names: str, **changes) -> Evaluator:
    schedule = build_schedule("flow", 10)
    settings = {
        "table": TimestepTable(schedule, "velocity", torch.ones(10)),
        "settings": GenerationSettings(solver="heun", steps=5, guidance=1.0, interval=(0.5, 9.0)),
        "training": ImageSet(TRAINING, len(TRAINING), EXTRACTOR),
        "held_out": ImageSet(HELD_OUT, len(HELD_OUT), EXTRACTOR),
        "extractor": EXTRACTOR,
        "conditions": {},
        "null": {},
        "image_shape": (1, 2, 4),
        "latents": False,
        "num_images": len(GENERATED),
        "seed": 0,
        "metrics": names,
    }
    return Evaluator(**{**settings, **changes})


def measured(*names: str, **changes) -> dict:
    found = evaluator_of(*names, **changes).measure(GENERATED)
    assert found is not None
    return found.record()


def frechet_distance(x: torch.Tensor, y: torch.Tensor) -> float:
    """The definition, for covariances C: tr (C_x C_y)^(1/2) is the sum of roots of eigenvalues."""
    a, b = x.flatten(1).double().numpy(), y.flatten(1).double().numpy()
    s_x, s_y = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    cross = np.sqrt(np.linalg.eigvals(s_x @ s_y).real).sum()
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s_x) + np.trace(s_y) - 2 * cross


@pytest.fixture
def two_more(monkeypatch) -> None:
    """Metrics as somebody adds them: a function and an entry."""

    def brightness(images):
        return {"brightness": images.double().mean().item()}

    def shift(generated, real):
        return {"shift": (generated.features.mean() - real.features.mean()).item()}

    entries = {
        "brightness": Metric(
            about="mean pixel", figures={"brightness": Figure("brightness", "higher", ".1f")},
            needs=("images",), compute=brightness,
        ),
        "shift": Metric(
            about="shift of the features", figures={"shift": Figure("shift", "lower", "+.2f")},
            needs=("generated", "real"), compute=shift, least=lambda features: 3, why="or so",
        ),
    }  # fmt: skip
    for name, entry in entries.items():
        monkeypatch.setitem(METRICS, name, entry)
        for field, figure in entry.figures.items():
            monkeypatch.setitem(FIGURES, field, figure)


def test_an_entry_is_all_that_a_metric_takes(two_more, capsys, tmp_path):
    record = measured("shift", "brightness")
    assert record["brightness"] == GENERATED.double().mean().item()
    for field, real in (("shift", TRAINING), ("held_out_shift", HELD_OUT)):
        assert record[field] == pytest.approx(
            (GENERATED.double().mean() - real.double().mean()).item()
        )
    evaluator = evaluator_of("shift", "brightness")
    assert evaluator.fields() == {"shift", "held_out_shift", "brightness"}
    with pytest.raises(ValueError, match="shift in .* needs 3 images .*, or so; got"):
        evaluator_of("shift", num_images=2)
    assert EvaluationConfig(metrics=("brightness",)).metrics == ("brightness",)
    show({"step": 1, **record}, Console())
    shown = capsys.readouterr().out
    assert f"{record['brightness']:.1f}" in shown and f"{record['held_out_shift']:+.2f}" in shown
    (tmp_path / "run").mkdir()
    line = json.dumps({"step": 1, "images": 8, "seconds": 1.0, **record})
    (tmp_path / "run" / "metrics.jsonl").write_text(line + "\n")
    (point,) = curve_of("uniform", 0, tmp_path / "run", tmp_path, None).points
    assert set(point.values) == {"shift", "held_out_shift", "brightness"}


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_is_in_the_help_text(name):
    assert f"{name} ({METRICS[name].about})" in metrics.HELP


def test_what_lacks_its_needs_is_not_measured():
    assert evaluator_of("fid", "copies", held_out=None).fields() == {"fid"}
    assert evaluator_of("fid", "clip").fields() == {"fid", "held_out_fid"}
    nothing = evaluator_of("fid", "clip", training=None, extractor=None, held_out=None)
    assert nothing.fields() == set() and nothing.measure(GENERATED) is None


def test_no_more_images_are_generated_at_a_time_than_asked_for():
    sizes = set()

    class Counting(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.zeros(()))

        def forward(self, x, t):
            sizes.add(len(x))
            return self.scale * x

    images = evaluator_of("fid", batch_size=100).generate(Counting())
    assert len(images) == len(GENERATED) and sizes == {100, 50}


def test_a_record_says_how_images_were_generated():
    record = measured("kid")
    assert record.keys() - {"kid", "held_out_kid"} == {
        "extractor", "weights_sha256", "feature_dim", "num_generated", "num_reference",
        "num_held_out", "solver", "solver_steps", "guidance", "guidance_interval",
    }  # fmt: skip
    how = [record[name] for name in ("solver", "solver_steps", "guidance", "guidance_interval")]
    assert how == ["heun", 5, 1.0, [0.5, 9.0]]
    counts = record["num_generated"], record["num_reference"], record["num_held_out"]
    assert counts == (250, 600, 200)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"image_shape": (3, 2, 4)}, "3 channels, pixels-of-2x4 takes 1"),
        ({"num_images": 8}, "8 features.* needs 9 images .*singular; got 8 generated, 600 real"),
        ({"held_out": ImageSet(HELD_OUT, 8, EXTRACTOR)}, "got 250 generated, 8 real"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_is_generated(changes, message):
    with pytest.raises(ValueError, match=message):
        evaluator_of("fid", **changes)


def test_few_pictures_suffice_where_their_statistics_came_with_them():
    known = ImageSet(TRAINING, len(TRAINING), EXTRACTOR).statistics
    few = ImageSet(TRAINING[:3], 3, EXTRACTOR, known=known)
    assert measured("fid", "kid", reference=few)["fid"] == measured("fid")["fid"]
    with pytest.raises(ValueError, match="prc in .* needs 4 images.* 3 real"):
        evaluator_of("fid", "prc", reference=few)
    with pytest.raises(ValueError, match="8 features.* got 8 generated"):
        evaluator_of("fid", reference=few, num_images=8)


def test_few_images_come_with_the_distance_of_as_few_real_ones():
    record = measured("fid", "kid")
    for prefix, real, count in (("", TRAINING, 250), ("held_out_", HELD_OUT, 100)):
        order = torch.randperm(len(real), generator=torch.Generator().manual_seed(0))
        truth = frechet_distance(real[order[:count]], real[order[count : 2 * count]])
        assert record[f"{prefix}fid_within"] == pytest.approx(truth, rel=1e-6)
        assert record[f"{prefix}fid_within_images"] == count
    assert record["held_out_fid_within"] > 1.5 * record["fid_within"] > 0
    assert not any("kid_within" in name for name in record)  # KID is unbiased


def test_enough_images_come_without_and_real_ones_are_not_read_for_it(monkeypatch, tmp_path):
    file = tmp_path / "statistics.npz"
    assert ImageSet(TRAINING, 600, EXTRACTOR, file).statistics
    kept = ImageSet(lambda: pytest.fail("they were read"), 600, EXTRACTOR, file)
    assert "fid_within" not in measured("fid", training=kept)
    monkeypatch.setattr(evaluator_module, "ENOUGH", 100)
    assert not any("within" in name for name in measured("fid", "kid"))


@pytest.fixture(scope="module")
def classified() -> tuple[classifier.ClassifierFeatures, torch.Tensor, torch.Tensor]:
    """Features of a classifier, and what it was tested on: images, and labels, a fourth wrong."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(1500) % 3
    pictures = torch.randint(0, 200, (3, 1, 8, 8), generator=generator)
    noise = torch.randint(0, 56, (1500, 1, 8, 8), generator=generator)
    images = (pictures[labels] + noise).to(torch.uint8)
    labels[::4] = (labels[::4] + 1) % 3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(classifier, "LEAST_STEPS", 40)
        features = classifier._as_features(*classifier.train_classifier(images, labels))
    order = torch.randperm(1500, generator=torch.Generator().manual_seed(0))
    tested = order[:: classifier.HOLD_OUT_EVERY]
    return features, images[tested], labels[tested]


def of_classes(classified, labels: torch.Tensor, **changes) -> Evaluator:
    """That generates the images of the classifier for these labels."""
    extractor, images, _ = classified
    settings = {
        "training": ImageSet(images, len(images), extractor),
        "held_out": None,
        "extractor": extractor,
        "conditions": {"labels": labels},
        "image_shape": (1, 8, 8),
        "num_images": len(images),
    }
    return evaluator_of("class_agreement", **{**settings, **changes})


def test_real_images_agree_with_their_classes_as_often_as_the_classifier_is_right(classified):
    extractor, images, labels = classified
    found = of_classes(classified, labels).measure(images)
    assert found is not None and set(found.figures) == {"class_agreement"}
    assert 0.6 < extractor.accuracy < 0.9  # a fourth of the labels is wrong
    assert found.figures["class_agreement"] == pytest.approx(extractor.accuracy, abs=0.01)


def test_images_of_other_classes_than_asked_for_agree_by_chance_alone(classified):
    _, images, labels = classified
    shuffled = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))]
    found = of_classes(classified, shuffled).measure(images)
    assert found is not None and found.figures["class_agreement"] == pytest.approx(1 / 3, abs=0.08)


def test_without_classes_or_a_classifier_of_them_there_is_no_class_agreement(classified):
    _, images, labels = classified
    assert of_classes(classified, labels).fields() == {"class_agreement"}
    assert of_classes(classified, labels, conditions={}).fields() == set()
    pixels = extractor_of(8, 8)
    real = ImageSet(images, len(images), pixels)
    assert of_classes(classified, labels, extractor=pixels, training=real).fields() == set()
    of_others = {"training": None, "reference": real}  # which may number their classes otherwise
    assert of_classes(classified, labels, **of_others).fields() == set()


def test_class_agreement_is_refused_without_classes_and_left_out_with_features_of_others():
    asked = EvaluationConfig(metrics=("fid", "class_agreement"))
    with pytest.raises(ValueError, match="class_agreement needs a model that is conditioned on"):
        TrainConfig(data=DataConfig(members=("npy",)), evaluation=asked)
    others = dataclasses.replace(asked, features="dinov2")
    TrainConfig(data=DataConfig(members=("npy",)), evaluation=others)


def test_titles_say_whose_features_a_published_figure_is_of():
    assert metrics.title("fid", INCEPTION) == "FID"
    assert metrics.title("fid", "speed-classifier-v1-0a") == "FID (classifier features)"
    assert metrics.title("held_out_kid", "dino") == "held-out KID (dino features)"
    assert metrics.title("recall", "dino") == "recall"
    assert metrics.title("a figure of another version", "dino") == "a figure of another version"
    found = evaluator_of("fid").measure(GENERATED)
    assert found is not None
    assert found.headline() == f"FID (pixels-of-2x4 features) {found.figures['fid']:.3f}"


def test_needs_that_the_configuration_cannot_meet_are_named():
    with pytest.raises(ValueError, match="copies needs images that were never trained on"):
        TrainConfig(evaluation=EvaluationConfig(metrics=("fid", "copies")))
    config = TrainConfig(data=DataConfig(held_out=0.1))
    dataclasses.replace(config, evaluation=EvaluationConfig(metrics=("fid", "copies")))
