"""Generated latents are measured as pictures, in training and afterwards, by equal figures."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pixels import Pixels, extractor_of
from rich.console import Console
from tiny_latents import COUNT, config_of, pictures, write_latents, write_pictures, write_vae
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY, register_feature_extractor

from speed_engine import cli
from speed_engine.build import build_evaluator, build_model, build_process
from speed_engine.config import DataConfig, EvaluationConfig, TrainConfig
from speed_engine.evaluation import references
from speed_engine.evaluation.fidelity import frechet_distance
from speed_engine.evaluation.image_set import statistics_of
from speed_engine.run.folder import read_config
from speed_engine.run.starting import start
from speed_engine.runtime.checks import UserError
from speed_engine.runtime.records import RECORDS, read_records

ROOT = Path(__file__).parents[2]
FIGURES = ("fid", "kid", "precision", "recall")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("latents")
    write_vae(folder / "vae")
    write_latents(folder / "latents")
    write_pictures(folder / "pictures")
    images, classes = pictures()
    np.savez(folder / "pictures.npz", arr_0=images, arr_1=classes)
    np.savez(folder / "unlabelled.npz", arr_0=images)
    return folder


def without_figures(run: Path) -> dict:
    """Take the evaluation in training out of a run's records, and return it."""
    (record,) = [record for record in read_records(run) if "fid" in record]
    lines = [line for line in (run / RECORDS).read_text().splitlines() if '"fid"' not in line]
    (run / RECORDS).write_text("".join(line + "\n" for line in lines))
    return record


def evaluator_of(config: TrainConfig):
    return build_evaluator(config, build_process(config))


@pytest.fixture
def pixel_features(monkeypatch):
    """In place of Inception's, 768 of them."""
    extractor = replace(extractor_of(16, 48), name="pixels-of-3x16x16", channels=3)
    if extractor.name not in FEATURE_EXTRACTORS_REGISTRY:
        register_feature_extractor(extractor.name, Pixels)
    monkeypatch.setattr(references, "inception_features", lambda path: extractor)
    return extractor


def test_training_prints_fid_and_evaluate_finds_the_same(folder, tmp_path, capsys):
    run = tmp_path / "run"
    start(config_of(folder), run, Console(width=200))
    printed = capsys.readouterr().out
    record = without_figures(run)
    assert f"FID (classifier features) {record['fid']:.3f}" in printed
    assert record["num_reference"] == COUNT and len(record["reference_sha256"]) == 64
    assert len(record["vae_weights_sha256"]) == 64
    cli.main(["evaluate", str(run), "--json"])
    again = json.loads(capsys.readouterr().out)
    assert "evaluated" in read_records(run)[-1]
    for name in FIGURES:
        assert again[name] == pytest.approx(record[name], rel=1e-4), name


def test_two_processes_measure_what_one_does(folder, tmp_path, capsys):
    for name in ("vae", "latents", "pictures"):
        (tmp_path / name).symlink_to(folder / name)
    paths = [ROOT, ROOT / "kernels", ROOT / "tests/evaluation"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, *torchrun, Path(__file__).with_name("latent_figures.py"), tmp_path],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    together = without_figures(tmp_path / "run")
    assert together["evaluated"]
    cli.main(["evaluate", str(tmp_path / "run"), "--json"])
    alone = json.loads(capsys.readouterr().out)
    start(config_of(folder), tmp_path / "alone", Console(quiet=True))
    trained_alone = without_figures(tmp_path / "alone")
    for name in FIGURES:
        assert together[name] == pytest.approx(alone[name], rel=1e-4), name
        assert together[name] == pytest.approx(trained_alone[name], rel=1e-3), name


def test_decoded_latents_are_compared_with_the_pictures_of_the_reference(folder, pixel_features):
    """The definition: FID of what the VAE decodes and of the pictures, in any form of these."""
    settings = {"features": "inception", "num_images": 769, "metrics": ("fid",)}
    images, _ = pictures()
    many = np.concatenate([images] * 7)
    np.savez(folder / "many.npz", arr_0=many)
    config = config_of(folder, reference=str(folder / "many.npz"), **settings)
    evaluator = evaluator_of(config)
    decoded, found = evaluator(build_model(config).eval())
    assert decoded.shape == (769, 3, 16, 16) and found is not None
    both = decoded, torch.from_numpy(many).permute(0, 3, 1, 2)
    generated, real = (statistics_of(x.flatten(1).double()) for x in both)
    assert found.figures["fid"] == pytest.approx(frechet_distance(generated, real), rel=1e-6)
    np.savez(folder / "statistics.npz", mu=real["mu"], sigma=real["sigma"])
    of_statistics = evaluator_of(
        config.with_evaluation(reference=str(folder / "statistics.npz"))
    ).measure(decoded)
    assert of_statistics is not None and "num_reference" not in of_statistics.record()
    assert of_statistics.figures["fid"] == pytest.approx(found.figures["fid"], rel=1e-6)


def test_statistics_of_an_archive_are_used_before_its_pictures_for_inception_alone(
    folder, pixel_features, tmp_path, monkeypatch
):
    images, classes = pictures()
    mu, sigma = np.full(768, 7.0), np.eye(768)
    np.savez(tmp_path / "both.npz", arr_0=images, arr_1=classes, mu=mu, sigma=sigma)
    config = config_of(
        folder, reference=str(tmp_path / "both.npz"), features="inception", metrics=("kid",)
    )
    real = evaluator_of(config).reference
    assert real is not None and len(real) == COUNT
    assert (real.statistics["mu"] == 7).all() and real.features.mean() > 7
    monkeypatch.setattr(references, "classifier_for", lambda *arguments: pixel_features)
    of_classifier = evaluator_of(config.with_evaluation(features="classifier")).reference
    assert of_classifier is not None and (of_classifier.statistics["mu"] > 7).all()


@pytest.mark.parametrize("reference", ["pictures", "pictures.npz"])
def test_shards_and_an_archive_of_the_same_pictures_give_the_same_features(folder, reference):
    """Of classifiers, which are equal where pictures and classes are."""
    evaluator = evaluator_of(config_of(folder, reference=str(folder / reference)))
    images, _ = pictures()
    assert evaluator.reference is not None and evaluator.training is None
    assert np.array_equal(evaluator.reference.images.numpy(), images.transpose(0, 3, 1, 2))
    assert evaluator.fields() == {"fid", "kid", "precision", "recall"}


def test_pictures_are_compared_with_a_reference_in_place_of_their_own_data(
    tmp_path, pixel_features
):
    grey = np.random.default_rng(0).integers(0, 255, (100, 8, 8, 1), np.uint8).repeat(3, axis=3)
    np.savez(tmp_path / "grey.npz", arr_0=grey)
    settings = EvaluationConfig(
        reference=str(tmp_path / "grey.npz"),
        num_images=70,
        features="inception",
        metrics=("kid", "prc", "loss"),
    )
    config = TrainConfig(device="cpu", data=DataConfig(held_out=0.2), evaluation=settings)
    evaluator = evaluator_of(config)
    assert evaluator.fields() == {"kid", "precision", "recall", "validation_loss"}
    assert evaluator.circumstances()["num_reference"] == 100


def test_another_reference_is_another_measurement(folder, tmp_path, capsys):
    run = tmp_path / "run"
    start(config_of(folder), run, Console(quiet=True))
    cli.main(["evaluate", str(run), "--reference", str(folder / "pictures.npz")])
    shown = capsys.readouterr()
    assert "measured before" not in shown.err
    assert "reference" in shown.out and f"{COUNT} images" in shown.out
    first, second = (record for record in read_records(run) if "fid" in record)
    assert first["reference_sha256"] != second["reference_sha256"]


def test_a_run_that_measured_nothing_is_measured_afterwards(folder, tmp_path, capsys):
    config = config_of(folder, features="none", reference=None, metrics=("loss",))
    run = tmp_path / "run"
    plain = replace(config, data=replace(config.data, vae=None))
    start(plain, run, Console(quiet=True))
    options = "--features classifier --metrics fid --json".split()
    named = ["--vae", str(folder / "vae"), "--reference", str(folder / "pictures")]
    cli.main(["evaluate", str(run), *options, *named])
    record = json.loads(capsys.readouterr().out)
    start(config_of(folder, metrics=("fid",)), tmp_path / "other", Console(quiet=True))
    assert record["fid"] == pytest.approx(without_figures(tmp_path / "other")["fid"], rel=1e-4)


def test_a_run_keeps_the_place_of_its_reference(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    config = config_of(folder, reference="pictures.npz", metrics=("fid",))
    start(config, tmp_path / "run", Console(quiet=True))
    assert read_config(tmp_path / "run").evaluation.reference == str(folder / "pictures.npz")


def refusal(config: TrainConfig) -> str:
    with pytest.raises(UserError) as refused:
        evaluator_of(config)
    return str(refused.value)


def test_latents_need_a_vae_and_a_reference_to_be_compared(folder):
    config = config_of(folder)
    with pytest.raises(UserError, match=r"compared as pictures: set data\.vae"):
        replace(config, data=replace(config.data, vae=None))
    with pytest.raises(UserError, match=r"compared as pictures: set evaluation\.reference"):
        config_of(folder, reference=None)
    with pytest.raises(UserError, match=r"evaluation\.reference=.*is compared in features"):
        config_of(folder, features="none")
    with pytest.raises(UserError, match="copies needs the pictures that are trained on; leave"):
        config_of(folder, metrics=("copies",))


def test_a_vae_of_other_latents_is_refused(folder, tmp_path):
    config = config_of(folder)
    other = replace(config.data, vae=str(write_vae(tmp_path / "vae", channels=8)))
    assert "decodes latents of 8 channels" in refusal(replace(config, data=other))


def test_a_reference_unlike_the_pictures_is_refused(folder, tmp_path):
    images, classes = pictures(8)
    np.savez(tmp_path / "small.npz", arr_0=images, arr_1=classes)
    shape = "and this run generates pictures of (channels, height, width) (3, 16, 16)"
    for reference in (write_pictures(tmp_path / "small", side=8), tmp_path / "small.npz"):
        told = refusal(config_of(folder, reference=str(reference)))
        assert "holds pictures of shape (3, 8, 8)" in told and shape in told
    told = refusal(config_of(folder, reference=str(folder / "latents")))
    assert "none of which are pictures of 8 bits; name the shards that the latents were" in told
    bare = write_pictures(tmp_path / "bare", labelled=False)
    for reference in (bare, folder / "unlabelled.npz"):
        told = refusal(config_of(folder, reference=str(reference)))
        assert "needs the labels of the images (member cls, arr_1 of an .npz, or" in told


def test_statistics_suffice_for_fid_in_their_own_features_only(folder, tmp_path, pixel_features):
    path = tmp_path / "statistics.npz"
    np.savez(path, mu=np.zeros(768), sigma=np.eye(768))
    told = refusal(config_of(folder, reference=str(path), features="inception", metrics=("prc",)))
    assert "prc compares with real pictures" in told and "suffice for fid; leave prc out" in told
    assert "no pictures, which evaluation.features=classifier needs" in refusal(
        config_of(folder, reference=str(path))
    )
    np.savez(path, mu=np.zeros(64), sigma=np.eye(64))
    told = refusal(config_of(folder, reference=str(path), features="inception", metrics=("fid",)))
    assert "statistics of 64 features, pixels-of-3x16x16 has 768" in told


@pytest.mark.parametrize(
    "arrays, what",
    [
        ({"images": np.zeros(3)}, "holds images; needed"),
        ({"arr_0": np.zeros((2, 16, 16, 3))}, "holds arr_0 of float64"),
        ({"arr_0": np.zeros((2, 3, 16, 16), np.uint8)}, r"and shape \(2, 3, 16, 16\)"),
        ({"arr_0": np.zeros((2, 16, 16, 3), np.uint8), "arr_1": np.arange(3)}, "holds arr_1 of"),
        ({"mu": np.zeros(3), "sigma": np.eye(4)}, r"holds mu and sigma of \(3,\) and \(4, 4\)"),
        ({"mu": np.full(3, np.nan), "sigma": np.eye(3)}, "not finite"),
        ({"arr_0": np.array([None])}, "holds arr_0 of object"),
        (b"PK damaged", "cannot be read"),
        (None, "does not exist; correct the path"),
    ],
)
def test_an_archive_of_another_form_is_refused_with_what_it_holds(folder, tmp_path, arrays, what):
    path = tmp_path / "reference.npz"
    if isinstance(arrays, bytes):
        path.write_bytes(arrays)
    elif arrays is not None:
        np.savez(path, **arrays)
    with pytest.raises(UserError, match=what):
        evaluator_of(config_of(folder, reference=str(path)))
