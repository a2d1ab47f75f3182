"""Names of users' folders and classes are text wherever they are shown, never markup."""

import io
import os

import pytest
from PIL import Image
from rich.console import Console

from speed_engine import cli
from speed_engine.commands import doctor
from speed_engine.commands.evaluate import show
from speed_engine.data.format.writer import ShardWriter

HOSTILE = "x[red] [y] [b] :cat: |`<b>"
TINY = (
    "digits --steps 2 --batch-size 16 --log-every 1 --model.dim 16 --model.depth 1 "
    "--model.num-heads 2 --evaluation.every 2 --evaluation.num-images 9 --evaluation.features none "
    "--evaluation.solver-steps 2 --device cpu --compile off"
).split()


def test_every_command_shows_the_name_of_a_run_as_it_is(tmp_path, capsys):
    run = tmp_path / HOSTILE
    cli.main(["train", *TINY, "--run", str(run)])
    assert f"run       {run}" in capsys.readouterr().out
    cli.main(["sample", str(run), "--count", "2", "--solver-steps", "2"])
    assert str(run) in capsys.readouterr().out
    cli.main(["export", str(run), "--out", f"{run}.safetensors"])
    assert f"{run}.safetensors" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main(["train", "--resume", str(run)])
    assert f"error: {run} is complete" in capsys.readouterr().err


def test_curves_of_a_run_of_any_name_are_beside_it(tmp_path):
    run = tmp_path / f"{HOSTILE}\nnew line"
    cli.main(["train", *TINY, "--run", str(run)])
    assert list((run / "tensorboard").glob("events.*"))


def test_a_run_whose_name_is_no_unicode_is_refused_before_anything_is_made(tmp_path, capsys):
    run = tmp_path / os.fsdecode(b"x\xff")
    with pytest.raises(SystemExit) as stopped:
        cli.main(["train", *TINY, "--run", str(run)])
    assert stopped.value.code == 2 and "no Unicode" in capsys.readouterr().err
    assert not run.exists()


def test_the_folder_of_shards_is_shown_as_it_is(tmp_path, capsys):
    folder = tmp_path / "[/x] :cat:"
    with ShardWriter(folder, "x", 3) as writer:
        writer.write("1", {"cls": b"1"})
    cli.main(["shards", "index", str(folder)])
    assert f"shards of {folder}: " in capsys.readouterr().out


def test_facts_of_this_machine_are_shown_as_they_are(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("SPEED_ENGINE_CACHE", str(tmp_path / "[/x]"))
    monkeypatch.setenv("COLUMNS", "1000")  # nothing is cut
    monkeypatch.setattr(doctor.kernels, "kernel_obstacle", lambda device: "no [red] [/y]")
    cli.main(["doctor"])
    shown = "".join(capsys.readouterr().out.split())
    assert "[/x]" in shown and "no[red][/y]" in shown


def test_the_words_of_a_record_are_shown_as_they_are():
    console = Console(file=io.StringIO(), width=200, markup=False, emoji=False)
    record = {
        "step": 1, "solver": "[/x]", "solver_steps": 2, "guidance": 1.0, "num_generated": 3,
        "extractor": "[red] :cat:", "fid": 1.0, "num_reference": 3,
    }  # fmt: skip
    show(record, console)
    assert isinstance(console.file, io.StringIO)
    assert "[/x]" in console.file.getvalue() and "[red] :cat:" in console.file.getvalue()


def test_names_of_classes_and_files_steer_no_terminal(tmp_path, capsys):
    hostile = "a\x1b[31m\nb"
    folder = tmp_path / "pictures" / hostile
    folder.mkdir(parents=True)
    for i in range(2):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(folder / f"{i}.png")
    cli.main(
        ["shards", "make", str(tmp_path / "pictures"), str(tmp_path / "shards"), "--workers", "1"]
    )
    assert r"1 class: a\x1b[31m\nb 2" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main(["shards", "check", f"{tmp_path}/gone\x1b[31m"])
    assert r"gone\x1b[31m holds no .tar shards" in capsys.readouterr().err
