"""Real images come from the data set that is trained on, and from one that never is."""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pixels import extractor_of

from speed_engine.build import build_evaluator, build_process, build_validation
from speed_engine.config import TrainConfig
from speed_engine.data.config import DataConfig
from speed_engine.data.format.reader import ShardReader
from speed_engine.data.format.writer import ShardWriter
from speed_engine.data.opening import open_data
from speed_engine.data.preparing.pictures import npy_bytes
from speed_engine.data.preparing.sources.digits import digits_folder
from speed_engine.evaluation import classifier, references
from speed_engine.evaluation.config import EvaluationConfig
from speed_engine.evaluation.references import real_images
from speed_engine.runtime.checks import UserError
from speed_engine.runtime.world import World


@pytest.fixture
def some_digits(tmp_path: Path) -> Path:
    """Shards of 300 digits."""
    reader = ShardReader(digits_folder(), ("npy", "cls"))
    with ShardWriter(tmp_path / "test", "x", 100) as writer:
        for i in range(0, 1500, 5):
            writer.write(f"{i:05d}", reader.read(i))
    return tmp_path / "test"


def test_a_test_data_set_is_the_held_out_part_and_nothing_is_taken_from_training(some_digits):
    data = DataConfig(test_source=str(some_digits))
    config = TrainConfig(
        device="cpu",
        data=data,
        evaluation=EvaluationConfig(num_images=100, metrics=("fid", "copies", "loss")),
    )
    assert len(open_data(data)) == len(open_data(data, part=None)) == 1797
    assert len(open_data(data, part="held_out")) == 300
    process = build_process(config)
    evaluator = build_evaluator(config, process)
    assert evaluator.training is not None and len(evaluator.training) == 1797
    assert evaluator.held_out is not None and len(evaluator.held_out) == 300
    assert {"held_out_fid", "copied_share", "validation_loss"} <= evaluator.fields()
    validation = build_validation(config, process)
    assert len(validation.batch.ids) == 300


def test_no_image_is_read_for_a_classifier_that_is_kept(monkeypatch):
    data, evaluation = DataConfig(), EvaluationConfig()
    first = real_images(data, evaluation, data.image_shape)
    monkeypatch.setattr(references, "read_all", None)
    again = real_images(data, evaluation, data.image_shape)
    assert again.extractor == first.extractor and again.extractor is not first.extractor


def test_the_first_process_alone_reads_all_images_to_train_a_classifier(tmp_path, monkeypatch):
    monkeypatch.setattr(classifier, "LEAST_STEPS", 2)
    with ShardWriter(tmp_path, "x", 100) as writer:
        for i in range(70):
            image = np.full((1, 8, 8), 3 * i, np.uint8)
            writer.write(f"{i:02d}", {"npy": npy_bytes(image), "cls": b"01"[i % 2 : i % 2 + 1]})
    config = TrainConfig(
        device="cpu",
        data=DataConfig(source=str(tmp_path), num_classes=2),
        evaluation=EvaluationConfig(num_images=70, metrics=("fid",)),
    )
    process, events = build_process(config), []
    read_all, from_first = references.read_all, World.from_first

    def reads(*given):
        events.append("reads")
        return read_all(*given)

    def waits(world, compute):
        if world.size == 1:
            return from_first(world, compute)
        events.append("the first process")
        build_evaluator(config, process)
        events.append("another one")

    monkeypatch.setattr(references, "read_all", reads)
    monkeypatch.setattr(World, "from_first", waits)
    evaluator = build_evaluator(config, process, World(rank=1, size=2, local_rank=1, local_size=2))
    assert events == ["the first process", "reads", "another one"]
    assert evaluator.training is not None and len(evaluator.training) == 70


def test_another_number_of_channels_is_another_classifier(tmp_path, monkeypatch):
    monkeypatch.setattr(classifier, "LEAST_STEPS", 2)
    noise, source = np.random.default_rng(0), str(tmp_path)
    with ShardWriter(source, "x", 100) as writer:
        for i in range(12):
            picture = io.BytesIO()
            Image.fromarray(noise.integers(0, 255, (16, 16), np.uint8)).save(picture, "PNG")
            writer.write(f"{i:02d}", {"png": picture.getvalue(), "cls": b"01"[i % 2 : i % 2 + 1]})
    channels = []
    for shape in ((1, 16, 16), (3, 16, 16)):
        data = DataConfig(source=source, image_shape=shape, members=("png", "cls"), num_classes=2)
        channels.append(real_images(data, EvaluationConfig(), shape).extractor.channels)
    assert channels == [1, 3]


def test_two_ways_of_holding_out_are_one_too_many():
    with pytest.raises(UserError, match=r"data\.test_source=other holds images out already"):
        DataConfig(test_source="other", held_out=0.1)


def write_pictures(folder: Path, side: int = 16, mode: str = "RGB") -> np.ndarray:
    """Twelve PNGs and JPEGs of two classes at two depths; their pixels in the order of names."""
    noise = np.random.default_rng(0)
    pixels = {}
    for i in range(12):
        name = f"{'ab'[i % 2]}/{i % 3}/{i:02d}." + ("jpg" if i == 5 else "png")
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        grey = noise.integers(0, 255, (side, side), np.uint8)
        Image.fromarray(grey).convert(mode).save(folder / name)
        pixels[name] = np.asarray(Image.open(folder / name).convert("RGB"))
    return np.stack([pixels[name] for name in sorted(pixels)]).transpose(0, 3, 1, 2)


@pytest.fixture
def labelled(monkeypatch) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What classifiers were to be trained on; their features are pixels."""
    given: list[tuple[torch.Tensor, torch.Tensor]] = []

    def classifier_for(images, labels, *_):
        given.append((images, labels))
        return replace(extractor_of(16, 16), channels=3)

    monkeypatch.setattr(references, "classifier_for", classifier_for)
    return given


def reference_in(folder: Path):
    return real_images(DataConfig(), EvaluationConfig(reference=str(folder)), (3, 16, 16))


def test_a_folder_of_pictures_is_a_reference_and_its_folders_are_classes(tmp_path, labelled):
    truth = write_pictures(tmp_path / "real", mode="L")
    (tmp_path / "real/a/notes.txt").write_text("not a picture")
    (tmp_path / "real/a/.hidden.png").write_text("nor this")
    real = reference_in(tmp_path / "real")
    assert real.reference is not None and real.training is None and len(real.reference) == 12
    assert np.array_equal(real.reference.images.numpy(), truth)
    ((images, labels),) = labelled
    assert images is real.reference.images and labels.tolist() == [0] * 6 + [1] * 6  # by name


def test_a_picture_that_changes_is_another_reference(tmp_path, labelled):
    write_pictures(tmp_path)
    first = reference_in(tmp_path).reference_sha256
    assert reference_in(tmp_path).reference_sha256 == first
    path = tmp_path / "b/2/11.png"
    Image.open(path).transpose(Image.Transpose.FLIP_TOP_BOTTOM).save(path)
    assert reference_in(tmp_path).reference_sha256 != first


def test_pictures_beside_folders_have_no_classes(tmp_path):
    write_pictures(tmp_path)
    (tmp_path / "a/0/00.png").rename(tmp_path / "00.png")
    with pytest.raises(UserError, match="needs the labels of the images .* or a sub-folder per"):
        reference_in(tmp_path)


def test_a_folder_that_cannot_be_a_reference_says_what_to_do(tmp_path):
    with pytest.raises(UserError, match=r"evaluation\.reference=.*gone does not exist; correct"):
        reference_in(tmp_path / "gone")
    write_pictures(tmp_path / "real")
    Image.new("RGB", (16, 20)).save(tmp_path / "real/b/tall.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "real/b/small.png")
    with pytest.raises(UserError) as refused:
        reference_in(tmp_path / "real")
    assert "holds 2 pictures of another height and width than (16, 16)" in str(refused.value)
    assert "such as b/small.png of (8, 8)" in str(refused.value)
    make = f"`speed-engine shards make {tmp_path}/real shards/real --size 16`"
    assert make in str(refused.value) and "name shards/real instead" in str(refused.value)
    (tmp_path / "real/b/tall.png").unlink()
    (tmp_path / "real/b/small.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"b/small\.png cannot be used: .*Take it out of"):
        reference_in(tmp_path / "real")


def test_a_picture_whose_pixels_are_cut_off_is_named(tmp_path):
    write_pictures(tmp_path)
    path = tmp_path / "b/2/11.png"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UserError, match=r"b/2/11\.png cannot be used: .*Take it out of"):
        reference_in(tmp_path)
