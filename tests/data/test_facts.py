"""What a data set's record says is used before the first step."""

import io
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from speed_engine.commands.config_file import origin
from speed_engine.commands.configured import configured
from speed_engine.commands.train import TrainCommand
from speed_engine.config import TrainConfig
from speed_engine.data.config import DataConfig
from speed_engine.data.format.index import load_index
from speed_engine.data.format.reader import ShardReader
from speed_engine.data.format.repair import RepairList
from speed_engine.data.format.writer import ShardWriter, index_folder
from speed_engine.data.opening import open_data
from speed_engine.data.preparing.check import check_folder
from speed_engine.data.preparing.pictures import npy_bytes
from speed_engine.data.training_data import TrainingData
from speed_engine.evaluation.conditions import generation_conditions
from speed_engine.evaluation.config import EvaluationConfig
from speed_engine.presets import PRESETS
from speed_engine.run.starting import build_trainer
from speed_engine.runtime.checks import UserError
from speed_engine.runtime.world import ALONE


def write(folder, images, labels, metadata=None):
    with ShardWriter(folder, "x", 8, metadata) as writer:
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            writer.write(f"{i:04d}", {"npy": npy_bytes(image), "cls": str(label).encode()})
    return folder


def config(folder, **options):
    data = DataConfig(source=str(folder), **options)
    evaluation = EvaluationConfig(features="none", num_images=7, solver_steps=1)
    return TrainConfig(device="cpu", steps=1, batch_size=4, data=data, evaluation=evaluation)


def opened(run):
    return TrainingData(run.data, run.batch_size, run.seed, ALONE, torch.device("cpu"))


def generated(run):
    conditions = generation_conditions(run.data, run.evaluation.num_images, run.seed)
    return conditions["labels"].tolist()


PIXELS = np.zeros((1, 8, 8), np.uint8)


@pytest.mark.parametrize("channels", [2, 4, 8])
def test_latents_are_not_taken_for_pictures(tmp_path, channels):
    latent = np.zeros((channels, 8, 8), np.float32)
    folder = write(tmp_path / "x", [latent] * 8, [0] * 8)
    with pytest.raises(UserError, match=r"npy of float32 and shape .* add --data.latents"):
        opened(config(folder, image_shape=(channels, 8, 8)))
    opened(config(folder, image_shape=(channels, 8, 8), latents=True))


def test_numbers_outside_of_those_of_pictures_are_refused_as_pictures(tmp_path):
    images = [np.full((3, 8, 8), value, np.float32) for value in (0, 1, -1, 3, 0, 0, 0, 0)]
    folder = write(tmp_path / "x", images, [0] * 8)
    with pytest.raises(UserError, match=r"numbers from -1 to 3; pictures .* in \[-1, 1\]"):
        opened(config(folder, image_shape=(3, 8, 8)))
    folder = write(tmp_path / "y", images[:3], [0] * 3)
    opened(config(folder, image_shape=(3, 8, 8)))


def test_pictures_are_not_taken_for_latents(tmp_path):
    folder = write(tmp_path / "x", [PIXELS] * 8, [0] * 8)
    with pytest.raises(UserError, match="these are pictures, not latents"):
        opened(config(folder, latents=True))


def test_more_classes_than_configured_are_refused_at_the_start(tmp_path):
    labels = [i % 10 for i in range(39)] + [10]
    folder = write(tmp_path / "x", [PIXELS] * 40, labels)
    with pytest.raises(UserError, match=r"up to 10, 11 classes; .*give --data.num-classes 11"):
        build_trainer(config(folder), tmp_path / "run", Console(quiet=True))
    opened(config(folder, num_classes=11))


def test_another_shape_is_refused_by_the_record(tmp_path):
    folder = write(tmp_path / "x", [PIXELS] * 8, [0] * 8)
    with pytest.raises(UserError, match=r"shape \(1, 8, 8\); data.image_shape=\(1, 16, 16\)"):
        opened(config(folder, image_shape=(1, 16, 16)))


@pytest.mark.parametrize("indexed", [True, False])
def test_classes_without_samples_are_not_generated(tmp_path, indexed):
    folder = write(tmp_path / "x", [PIXELS] * 24, [(0, 2, 7)[i % 3] for i in range(24)])
    if not indexed:
        for path in [*folder.glob("*.json"), *folder.glob("*.safetensors")]:
            path.unlink()
    assert generated(config(folder)) == [0, 2, 7, 0, 2, 7, 0]


def test_a_record_without_present_classes_bounds_them(tmp_path):
    """As older versions wrote it."""
    folder = write(tmp_path / "x", [PIXELS] * 6, [0, 2] * 3)
    dataset = ShardReader(folder).dataset
    assert dataset.contents["cls"] == {"classes": 3, "present": [0, 2]}
    del dataset.contents["cls"]["present"]
    (folder / "dataset.json").write_text(dataset.to_json())
    assert generated(config(folder)) == [0, 1, 2, 0, 1, 2, 0]


def test_a_run_generates_where_its_data_are_not_at_hand(tmp_path, caplog):
    labels = generated(config(tmp_path / "gone", num_classes=3))
    assert labels == [0, 1, 2, 0, 1, 2, 0] and "gone" in caplog.text


def command(*arguments):
    made = lambda name, config: TrainCommand(preset=name, config=config)
    return configured(made, [*map(str, arguments)], "train")


def parsed(*arguments):
    return command(*arguments).config.data


def test_what_the_record_knows_need_not_be_given(tmp_path):
    image = np.zeros((3, 16, 12), np.uint8)
    folder = write(tmp_path / "x", [image] * 8, [0, 4] * 4)
    data = parsed("digits", "--data.source", folder)
    assert (data.members, data.image_shape, data.num_classes) == (("npy", "cls"), (3, 16, 12), 5)
    data = parsed("digits", "--data.source", folder, "--data.num-classes", 9)
    assert (data.image_shape, data.num_classes) == ((3, 16, 12), 9)
    assert parsed("digits") == PRESETS["digits"][1].data


def write_pictures(folder, mode, classes=("cat", "dog"), per_shard=8):
    """One picture a sample, as ``shards make`` writes them."""
    with ShardWriter(folder, "x", per_shard, {"classes": list(classes)}) as writer:
        for i in range(8):
            picture = io.BytesIO()
            Image.new(mode, (12, 16)).save(picture, "PNG")
            label = str(i % len(classes)).encode()
            writer.write(f"{i:04d}", {"png": picture.getvalue(), "cls": label})
    return folder


@pytest.mark.parametrize("mode, channels", [("L", 1), ("RGB", 3)])
@pytest.mark.parametrize("preset", ["digits", "dit-s", "unet-s", "cifar10-edm"])
def test_pictures_are_trained_on_as_they_are_whatever_the_preset_has(
    tmp_path, preset, mode, channels
):
    folder = write_pictures(tmp_path / "x", mode)
    data = parsed(preset, "--data.source", folder)
    assert (data.members, data.image_shape) == (("png", "cls"), (channels, 16, 12))
    assert data.num_classes == 2
    TrainingData(data, 4, 0, ALONE, torch.device("cpu"))


def test_a_source_alone_is_trained_on_by_the_preset_for_own_images(tmp_path):
    folder = write_pictures(tmp_path / "x", "RGB")
    for arguments in (("--data.source", folder), (f"--data.source={folder}",)):
        found = command(*arguments, "--steps", 7)
        assert found.preset == "dit-s" and found.config.steps == 7
        assert found.config.schedule == "flow" and found.config.data.image_shape == (3, 16, 12)
    with pytest.raises(UserError, match="a preset is missing: .* train --data.source SHARDS"):
        command("--steps", 7)


def test_what_the_preset_for_own_images_names_is_looked_up_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_pictures(tmp_path / "shards/own", "L")
    assert parsed("dit-s").image_shape == (1, 16, 12)


@pytest.mark.parametrize("classes, features", [(("all",), "none"), (("a", "b"), "classifier")])
def test_without_classes_there_are_no_features_of_a_classifier(tmp_path, classes, features):
    folder = write_pictures(tmp_path / "x", "RGB", classes)
    assert command("--data.source", folder).config.evaluation.features == features


def test_latents_are_recognised_by_their_recorded_scale(tmp_path):
    latents = [np.zeros((8, 4, 6), np.float16)] * 8
    folder = write(tmp_path / "x", latents, [0, 1] * 4, {"latent_scale": 0.2, "vae": "x"})
    config = command("--data.source", folder).config
    assert config.data.latents and config.data.image_shape == (4, 4, 6)
    assert config.evaluation.features == "none"


def test_whether_latents_of_others_have_a_deviation_is_asked_for(tmp_path):
    latents = [np.zeros((8, 4, 6), np.float16)] * 8
    folder = write(tmp_path / "x", latents, [0, 1] * 4, {"latent_scale": 0.2})
    open_it = lambda *shape: TrainingData(
        parsed("dit-s", "--data.source", folder, *shape), 4, 0, ALONE, torch.device("cpu")
    )
    with pytest.raises(UserError, match=r"--data.image-shape 8 4 6 trains .* with 4 channels"):
        open_it()
    assert not open_it("--data.image-shape", 8, 4, 6).cleaning.posterior
    assert open_it("--data.image-shape", 4, 4, 6).cleaning.posterior
    latents = [np.zeros((5, 4, 6), np.float16)] * 8
    odd = write(tmp_path / "odd", latents, [0, 1] * 4, {"latent_scale": 0.2})
    assert parsed("dit-s", "--data.source", odd).image_shape == (5, 4, 6)


@pytest.mark.parametrize("damaged", ["tar", "picture", "all"])
def test_what_is_damaged_does_not_hinder_looking_at_pictures(tmp_path, damaged):
    folder = write_pictures(tmp_path / "x", "L", per_shard=4)
    index, _ = load_index(folder / "x-000000.index.safetensors")
    place = int(index.offset[0, index.extensions.index("png")])
    for path in sorted(folder.glob("*.tar"))[: 2 if damaged == "all" else 1]:
        data = bytearray(path.read_bytes())
        data[place] ^= 1
        path.write_bytes(data if damaged == "picture" else data[:700])
    shape = parsed("dit-s", "--data.source", folder).image_shape
    assert shape == (3 if damaged == "all" else 1, 16, 12)


def test_arrays_of_no_images_are_left_to_the_options(tmp_path):
    folder = write(tmp_path / "x", [np.zeros(8, np.float32)] * 8, [0] * 8)
    data = parsed("dit-s", "--data.source", folder)
    assert data.image_shape == PRESETS["dit-s"][1].data.image_shape


def test_a_repair_list_is_of_the_training_data_alone(tmp_path):
    for name in ("train", "test"):
        write(tmp_path / name, [PIXELS] * 16, [0] * 16)
    repair = RepairList({"x-000001.tar": "cut"}, {"x-000000.tar": {"0001": "CRC"}})
    repair.save(tmp_path / "repair.json")
    test_source = str(tmp_path / "test")
    run = config(tmp_path / "train", exclude=tmp_path / "repair.json", test_source=test_source)
    assert len(open_data(run.data)) == 7 and len(open_data(run.data, part="held_out")) == 16


def test_of_two_sources_the_last_one_is_looked_up(tmp_path):
    grey, coloured = (write_pictures(tmp_path / mode, mode) for mode in ("L", "RGB"))
    data = parsed("dit-s", "--data.source", coloured, "--data.source", grey)
    assert (data.source, data.image_shape) == (str(grey), (1, 16, 12))


def test_options_may_need_what_the_record_knows(tmp_path):
    latents = [np.zeros((8, 4, 6), np.float16)] * 8
    folder = write(tmp_path / "x", latents, [0, 1] * 4, {"latent_scale": 0.2})
    config = command("dit-s", "--data.vae", "some/vae", "--data.source", folder).config
    assert config.data.latents and config.data.vae == "some/vae"
    values = {"data": {"source": str(folder), "vae": "some/vae"}}
    assert origin("dit-s").config(values).data == config.data


@pytest.mark.parametrize(
    "option, message",
    [
        (("--data.image-shape", 3, 8, 8), r"needs \(8, 8\). Correct --data.image-shape"),
        (("--data.num-classes", 1), "give --data.num-classes 2"),
    ],
)
def test_an_option_that_contradicts_the_record_is_an_error(tmp_path, option, message):
    folder = write_pictures(tmp_path / "x", "RGB")
    data = parsed("dit-s", "--data.source", folder, *option)
    with pytest.raises(UserError, match=message):
        TrainingData(data, 4, 0, ALONE, torch.device("cpu"))


def test_pictures_in_place_of_shards_are_refused_with_the_command_that_makes_shards(tmp_path):
    (tmp_path / "photos/cat").mkdir(parents=True)
    archive = tmp_path / "photos.zip"
    archive.write_bytes(b"PK")
    for source in (tmp_path / "photos", archive):
        with pytest.raises(FileNotFoundError, match=f"shards make {source} shards/photos --size"):
            ShardReader(source)
    with pytest.raises(FileNotFoundError, match=r"`speed-engine shards make SOURCE .*/none`"):
        ShardReader(tmp_path / "none")


def write_tar(path, extension="cls"):
    with tarfile.open(path, "w") as archive:
        for i in range(4):
            for kind, content in (("npy", npy_bytes(PIXELS)), (extension, b"0")):
                info = tarfile.TarInfo(f"{path.stem}{i}.{kind}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))


@pytest.mark.parametrize("indexed", [True, False])
def test_a_single_tar_is_a_data_set(tmp_path, indexed):
    for name in ("a", "b"):
        write_tar(tmp_path / f"{name}.tar")
    if indexed:
        index_folder(tmp_path)
    reader = ShardReader(tmp_path / "b.tar")
    assert len(reader) == 4 and reader.key(0) == "b0" and len(ShardReader(tmp_path)) == 8


def test_the_home_folder_may_be_written_short(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_tar(tmp_path / "a.tar")
    assert len(opened(config("~")).reader) == 4
    assert len(ShardReader("~/a.tar")) == 4


@pytest.mark.parametrize(
    "source, message",
    [
        ("{00..09}.tar", r"\{00\.\.09\} is a brace pattern .* name the folder"),
        ("a-{x,y}.tar", "is a brace pattern"),
        ("a.tar.gz", "is a compressed tar.*unpack it first"),
        ("a.tgz", "is a compressed tar"),
    ],
)
def test_other_ways_to_name_data_are_explained(tmp_path, source, message):
    for where in (tmp_path / source, f"https://example.org/{source}"):
        with pytest.raises(UserError, match=message):
            ShardReader(where)


def test_a_folder_of_compressed_tars_is_explained(tmp_path):
    (tmp_path / "a-000000.tar.gz").write_bytes(b"\x1f\x8b")
    for read in (ShardReader, check_folder, index_folder):
        with pytest.raises(FileNotFoundError, match="compressed ones .* unpack them first"):
            read(tmp_path)
