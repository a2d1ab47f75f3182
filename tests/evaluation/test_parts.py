"""Generation continues where it stopped, with the same settings or not at all."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from speed_engine.evaluation.image_files import write_archive, write_pictures
from speed_engine.evaluation.parts import ImageParts, generate_in_parts, held_parts, is_begun
from speed_engine.runtime.checks import UserError

HOLD = (
    "import fcntl, sys\n"
    "file = open(sys.argv[1], 'w'); fcntl.lockf(file, fcntl.LOCK_EX)\n"
    "print('held', flush=True); sys.stdin.read()"
)


class Model:
    """Generates images full of their number, and stops after some parts."""

    def __init__(self, parts: int = 1000, channels: int = 3) -> None:
        self.parts, self.channels, self.generated = parts, channels, []

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        if self.parts == 0:
            raise KeyboardInterrupt
        self.parts -= 1
        self.generated += ids.tolist()
        return ids.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, self.channels, 2, 4)


def generate(folder: Path, model: Model, **settings) -> ImageParts:
    return generate_in_parts(model, 10, 3, folder, {"seed": 0, "interval": (0.1, 2.0), **settings})


def test_what_is_there_is_not_generated_again(tmp_path):
    first, second = Model(parts=2), Model()
    with pytest.raises(KeyboardInterrupt):
        generate(tmp_path / "parts", first)
    images = generate(tmp_path / "parts", second)
    assert (first.generated, second.generated) == ([0, 1, 2, 3, 4, 5], [6, 7, 8, 9])
    assert images.images()[:, 0, 0, 0].tolist() == list(range(10))
    images.remove()
    assert not (tmp_path / "parts").exists()


def test_other_settings_are_refused_by_name(tmp_path):
    generate(tmp_path / "parts", Model())
    with pytest.raises(ValueError, match=r"seed 0 \(now 1\), solver None \(now heun\); finish"):
        generate(tmp_path / "parts", Model(), seed=1, solver="heun")
    assert is_begun(tmp_path / "parts")


@pytest.mark.parametrize("text", ["3", "[]", "null", "{", "[" * 10_000])
def test_settings_that_are_none_are_named(tmp_path, text):
    generate(tmp_path, Model())
    (tmp_path / "settings.json").write_text(text)
    with pytest.raises(UserError, match=r"settings\.json: .*Delete the folder"):
        generate(tmp_path, Model())


def test_a_damaged_part_is_named(tmp_path):
    images = generate(tmp_path / "parts", Model())
    images.path(3).write_bytes(images.path(3).read_bytes()[:-20])
    with pytest.raises(ValueError, match="00000003.npy cannot be used.*makes it again"):
        images.images()
    images.path(3).unlink()
    assert generate(tmp_path / "parts", again := Model()).images()[4, 0, 0, 0] == 4
    assert again.generated == [3, 4, 5]


def test_parts_without_settings_are_the_rest_of_a_removal(tmp_path):
    generate(tmp_path / "parts", Model())
    (tmp_path / "parts" / "settings.json").unlink()
    (tmp_path / "parts" / "notes.txt").write_text("somebody's")
    generate(tmp_path / "parts", again := Model(), seed=1)
    assert len(again.generated) == 10 and (tmp_path / "parts" / "notes.txt").exists()


@pytest.mark.parametrize("channels", [1, 3])
def test_the_archive_is_that_of_adm(tmp_path, channels):
    images, labels = generate(tmp_path / "parts", Model(channels=channels)), np.arange(10) % 4
    write_archive(images, labels, tmp_path / "deep" / "x.npz")
    with np.load(tmp_path / "deep" / "x.npz") as archive:
        assert archive["arr_0"].dtype == np.uint8 and archive["arr_0"].shape == (10, 2, 4, 3)
        assert (archive["arr_0"] == np.arange(10)[:, None, None, None]).all()
        assert archive["arr_1"].dtype == np.int64 and (archive["arr_1"] == labels).all()
    write_archive(images, None, tmp_path / "y.npz")
    with np.load(tmp_path / "y.npz") as archive:
        assert archive.files == ["arr_0"]


@pytest.mark.parametrize("channels, size", [(1, (2, 4)), (3, (2, 4, 3))])
def test_pictures_are_numbered_and_named_by_class(tmp_path, channels, size):
    images = generate(tmp_path / "parts", Model(channels=channels))
    write_pictures(images, np.arange(10) % 4, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir())[:2] == [
        "000000-class-0.png", "000001-class-1.png",
    ]  # fmt: skip
    picture = np.asarray(Image.open(tmp_path / "out" / "000007-class-3.png"))
    assert picture.shape == size and (picture == 7).all()
    write_pictures(images, None, tmp_path / "plain")
    assert (tmp_path / "plain" / "000009.png").is_file()


def test_a_folder_without_a_part_holds_no_other_images(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        generate(tmp_path / "parts", Model(parts=0))
    assert is_begun(tmp_path / "parts")
    generate(tmp_path / "parts", other := Model(), seed=1)
    assert len(other.generated) == 10


def test_pictures_that_are_there_are_whole_and_stay(tmp_path):
    images, folder = generate(tmp_path / "parts", Model()), tmp_path / "pictures"
    write_pictures(images, None, folder)
    written = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    write_pictures(images, None, folder)  # the process was ended before the parts were removed
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == written
    assert len(written) == 10 and not (tmp_path / "pictures.partial").exists()


def test_a_folder_in_which_another_command_generates_is_refused(tmp_path):
    folder = tmp_path / "parts"
    folder.mkdir()
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, folder / "lock"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert other.stdout is not None and other.stdout.readline() == "held\n"
    with (
        pytest.raises(UserError, match="parts is being filled by another command"),
        held_parts(folder),
    ):
        pass
    other.communicate()
    with held_parts(folder):
        generate(folder, Model()).remove()
    assert not folder.exists()
