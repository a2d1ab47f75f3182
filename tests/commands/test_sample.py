"""``speed-engine sample`` on a real run: kills, several processes and what is refused."""

import dataclasses
import io
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from speed_engine import cli
from speed_engine.commands import sample
from speed_engine.config import TrainConfig, to_json
from speed_engine.data.preparing.sources.digits import write_digits
from speed_engine.evaluation import conditions
from speed_engine.evaluation.config import EvaluationConfig
from speed_engine.evaluation.parts import ImageParts
from speed_engine.models.config import DiTConfig
from speed_engine.run.folder import read_config
from speed_engine.run.starting import start
from speed_engine.runtime import locks, machine
from speed_engine.runtime.world import World
from speed_engine.training.config import OptimizerConfig

TINY = TrainConfig(
    steps=20,
    batch_size=16,
    optimizer=OptimizerConfig(averages=("power=1",)),
    model=DiTConfig(dim=16, depth=1, num_heads=2),
    evaluation=EvaluationConfig(every=1000, num_images=100, solver_steps=2),
)
HOW = "--count 30 --batch-size 4 --solver ddpm --solver-steps 9 --guidance 1.5".split()


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    none = dataclasses.replace(TINY.evaluation, features="none")
    start(dataclasses.replace(TINY, evaluation=none), folder, Console(file=io.StringIO()))
    return folder


@pytest.fixture(scope="module")
def straight(run) -> bytes:
    """The archive of images whose generation nothing disturbed."""
    out = run.parent / "straight.npz"
    cli.main(["sample", str(run), "--out", str(out), *HOW])
    return out.read_bytes()


def fails(capsys, *arguments: object) -> str:
    with pytest.raises(SystemExit) as stopped:
        cli.main([str(argument) for argument in arguments])
    assert stopped.value.code == 2
    return " ".join(capsys.readouterr().err.split())


def test_generation_killed_by_sigkill_continues_where_it_stopped(run, straight, tmp_path, capsys):
    out, parts = tmp_path / "x.npz", tmp_path / "x.npz.parts"
    stuck = (  # after three parts, so that the kill falls between two
        "import time; from speed_engine.commands import sample; from speed_engine.cli import main\n"
        "def three(*a, f=sample.generate, left=[1, 1, 1], **k):\n"
        "    left.pop() if left else time.sleep(1000); return f(*a, **k)\n"
        f"sample.generate = three; main({['sample', str(run), '--out', str(out), *HOW]})"
    )
    process = subprocess.Popen([sys.executable, "-c", stuck])
    while len(list(parts.glob("*.npy"))) < 3:
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -9 and not out.exists()
    kept = {path: path.stat().st_mtime_ns for path in parts.glob("*.npy")}
    assert len(kept) == 3
    message = fails(capsys, "sample", run, "--out", out, *HOW, "--seed", 1)
    assert "seed 0 (now 1)" in message
    assert {path: path.stat().st_mtime_ns for path in parts.glob("*.npy")} == kept
    cli.main(["sample", str(run), "--out", str(out), *HOW])
    assert out.read_bytes() == straight and not parts.exists()


def test_a_folder_of_parts_that_another_command_fills_is_left_alone(
    run, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(locks, "_locked", lambda file: False)
    message = fails(capsys, "sample", run, "--out", tmp_path / "x.npz", *HOW)
    assert "x.npz.parts is being filled by another command" in message
    assert not (tmp_path / "x.npz").exists() and not list(tmp_path.rglob("*.npy"))


class Two(World):
    """The first of two processes, which exchange nothing."""

    def from_first(self, compute):
        return compute()

    def barrier(self):
        pass


def test_processes_agree_on_the_checkpoint_and_on_whether_to_compile(run, tmp_path, monkeypatch):
    asked, steps = [], []
    load_average, choose = sample.load_average, machine.choose_compile

    def loaded(*given):
        steps.append(given[-1])
        return load_average(*given)

    def chosen(compile, device, evaluations):
        asked.append(evaluations)
        return choose("off", device, evaluations)

    monkeypatch.setattr(sample, "load_average", loaded)
    monkeypatch.setattr(machine, "choose_compile", chosen)
    monkeypatch.setattr(ImageParts, "images", lambda images: torch.zeros(30, 1, 8, 8).byte())
    for world in (World(), Two(size=2)):
        monkeypatch.setattr(sample, "join", lambda device, world=world: world)
        cli.main(["sample", str(run), "--out", str(tmp_path / f"{world.size}.png"), *HOW])
    assert asked == [8 * 9] * 2
    assert steps == [None, 20]


@pytest.mark.long
def test_two_processes_generate_the_images_of_one(run, straight, tmp_path):
    launcher = "torch.distributed.run --standalone --nproc-per-node 2 -m --".split()
    done = subprocess.run(
        [sys.executable, "-m", *launcher, "speed_engine", "sample", run, "--out",
         tmp_path / "x.npz", *HOW],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "x.npz").read_bytes() == straight
    assert done.stdout.count("30 images of step 20") == 1


def test_images_come_from_the_average_that_is_named(run, straight, tmp_path, capsys):
    archives = {}
    for average in ("ema", "power=1"):
        out = tmp_path / f"{average}.npz"
        cli.main(["sample", str(run), "--average", average, "--out", str(out), *HOW])
        archives[average] = out.read_bytes()
    assert archives["ema"] == straight != archives["power=1"]
    message = fails(capsys, "sample", run, "--average", "swa", "--out", tmp_path / "x.npz", *HOW)
    assert "holds no EMA 'swa'; this run keeps ema, power=1" in message


def test_pictures_and_archive_hold_the_same_images(run, straight, tmp_path):
    from PIL import Image

    cli.main(["sample", str(run), "--out", f"{tmp_path}/out/", *HOW])
    with np.load(io.BytesIO(straight)) as archive:
        images, labels = archive["arr_0"], archive["arr_1"]
    assert images.shape == (30, 8, 8, 3) and labels.tolist() == [i % 10 for i in range(30)]
    for i, label in enumerate(labels):
        picture = np.asarray(Image.open(tmp_path / "out" / f"{i:06d}-class-{label}.png"))
        assert (images[i] == picture[..., None]).all()


def test_the_batch_size_moves_no_pixel_by_more_than_one_level(run, straight, tmp_path):
    out = tmp_path / "x.npz"
    cli.main(["sample", str(run), "--out", str(out), *HOW, "--batch-size", "13"])
    with np.load(out) as ours, np.load(io.BytesIO(straight)) as theirs:
        difference = np.abs(ours["arr_0"].astype(int) - theirs["arr_0"])
    assert difference.max() <= 1 and (difference > 0).mean() < 0.01


def test_finished_images_are_not_overwritten(run, tmp_path, capsys):
    two = ["sample", str(run), "--count", "2", "--out"]
    for out in (tmp_path / "x.npz", tmp_path / "folder", tmp_path / "x.png"):
        cli.main([*two, str(out)])
        assert "exists already" in fails(capsys, *two, out)


def test_the_ending_may_be_in_capitals(run, tmp_path, capsys):
    two = ["sample", str(run), "--count", "2", "--out"]
    cli.main([*two, str(tmp_path / "x.PNG")])
    assert Image.open(tmp_path / "x.PNG").format == "PNG"
    cli.main([*two, str(tmp_path / "x.NPZ")])
    with np.load(tmp_path / "x.NPZ") as archive:
        assert len(archive["arr_0"]) == 2
    assert "x.JPG: images are written as FILE.png" in fails(capsys, *two, tmp_path / "x.JPG")


def test_pictures_without_a_name_are_numbered(run):
    for _ in range(3):
        cli.main(["sample", str(run), "--count", "2", "--seed", "5"])
    names = sorted(path.name for path in (run / "samples").glob("sample-seed-5*"))
    assert names == ["sample-seed-5-2.png", "sample-seed-5-3.png", "sample-seed-5.png"]


def test_the_picture_is_as_wide_as_its_images(run, tmp_path):
    sizes = {}
    for count, classes in ((3, ["7"]), (5, ["1", "4"]), (25, ["1"]), (12, [])):
        out = tmp_path / f"{count}.png"
        of = ["--class", *classes] if classes else []
        cli.main(["sample", str(run), "--count", str(count), "--out", str(out), *of])
        sizes[count] = Image.open(out).size
    side, gap = 48, 3
    expected = {3: (3, 1), 5: (3, 2), 25: (10, 1), 12: (2, 10)}
    for count, (columns, rows) in expected.items():
        assert sizes[count] == (columns * (side + gap) + gap, rows * (side + gap) + gap)


def named(source: Path) -> Path:
    """The digits with names of classes."""
    write_digits(source)
    names = "zero one two three four five six seven eight nine".split()
    (source / "facts.json").write_text(json.dumps({"classes": names}))
    cli.main(["shards", "index", str(source), "--metadata", str(source / "facts.json")])
    return source


def test_classes_are_named_and_their_images_are_those_of_their_numbers(
    run, tmp_path, capsys, monkeypatch
):
    config = read_config(run)
    data = dataclasses.replace(config.data, source=str(named(tmp_path / "named")))
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    (copy / "config.json").write_text(to_json(dataclasses.replace(config, data=data)))
    archives = []
    for classes in (["seven", "2"], ["7", "two"]):
        out = tmp_path / f"{classes[0]}.npz"
        cli.main(["sample", str(copy), "--count", "4", "--class", *classes, "--out", str(out)])
        archives.append(np.load(out))
        assert archives[-1]["arr_1"].tolist() == [7, 2, 7, 2]
    assert (archives[0]["arr_0"] == archives[1]["arr_0"]).all()
    message = fails(capsys, "sample", copy, "--class", "sevn")
    assert "unknown class 'sevn'; did you mean 'seven'?" in message
    assert "unknown class '10'" in fails(capsys, "sample", copy, "--class", "10")
    with monkeypatch.context() as patch:
        patch.setattr(conditions, "class_names", lambda data: [*"0123456789", "ten"])
        patch.setattr(sample, "class_names", conditions.class_names)
        message = fails(capsys, "sample", copy, "--class", "1", "ten")
    assert "--class ten is class 10 of the data set, and this model knows the first 10" in message
    cli.main(["sample", str(copy), "--count", "4", "--class", "seven", "2"])
    assert "rows: two, seven" in capsys.readouterr().out


def test_images_come_from_the_checkpoint_that_is_named(run, tmp_path, capsys):
    fast = OptimizerConfig(learning_rate=0.01, warmup_steps=0)
    config = dataclasses.replace(read_config(run), checkpoint_every=10, optimizer=fast)
    start(config, tmp_path / "run", Console(file=io.StringIO()))
    sample = ["sample", str(tmp_path / "run"), "--count", "2"]
    cli.main([*sample, "--checkpoint", "10", "--out", str(tmp_path / "a.npz")])
    assert "2 images of step 10" in capsys.readouterr().out
    cli.main([*sample, "--out", str(tmp_path / "b.npz")])
    early, late = (np.load(tmp_path / name)["arr_0"] for name in ("a.npz", "b.npz"))
    assert (early != late).any()
    message = fails(capsys, *sample, "--checkpoint", "15")
    assert "no checkpoint of step 15; it keeps those of: 10, 20" in message


def test_weights_may_be_read_by_whoever_may_read_the_records(run):
    modes = [(run / name).stat().st_mode for name in ("ema.safetensors", "metrics.jsonl")]
    assert modes[0] == modes[1]


@pytest.mark.parametrize(
    "options, message",
    [
        (["--solver", "plms"], "ddpm_large"),
        (["--batch-size", "0"], "batch_size=0"),
        (["--batch-size", "-3"], "batch_size=-3"),
        (["--out", "."], "--out .: name FILE.png, FILE.npz, or a folder"),
        (["--out", "x.jpg"], "x.jpg: images are written as FILE.png, FILE.npz, or a folder"),
        (["--solver-steps", "1001"], "must be at most num_timesteps=1000"),
        (["--guidance-interval", "3", "1"], "guidance_interval=(3.0, 1.0): needs two noise levels"),
    ],
)
def test_bad_options_are_named_before_generation(run, tmp_path, capsys, options, message):
    out = tmp_path / "x.npz"
    with pytest.raises(SystemExit):
        cli.main(["sample", str(run), "--out", str(out), *options])
    shown = capsys.readouterr()
    assert message in " ".join((shown.out + shown.err).split()) and not list(tmp_path.iterdir())
