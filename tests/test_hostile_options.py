"""Whatever options a command is given: one clear error and status 2, or a valid outcome.

What takes long is left out: commands that train stop where they would begin to, those that generate
where images would be made.
"""

import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import hostile
from speed_engine import cli
from speed_engine.arena.compare import Comparison
from speed_engine.commands import consistency, evaluate, sample
from speed_engine.encoders import text, vae

TRAIN = (
    "train digits --steps 2 --batch-size 16 --model.dim 16 --model.depth 1 --model.num-heads 2 "
    "--evaluation.every 2 --evaluation.num-images 9 --evaluation.features none --device cpu "
    "--evaluation.solver-steps 2 --compile off --run"
).split()


class Reached(Exception):
    """All options were accepted."""


@pytest.fixture(scope="module")
def place(tmp_path_factory, cache) -> Path:
    folder = tmp_path_factory.mktemp("options")
    cli.main([*TRAIN, str(folder / "run")])
    (folder / "pictures").mkdir()
    for i in range(3):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(folder / "pictures" / f"{i}.png")
    cli.main(["shards", "make", str(folder / "pictures"), str(folder / "shards"), "--workers", "1"])
    return folder


COMMANDS = {
    "train": "digits --dry-run --run {new}",
    "train --resume": "{run}",
    "sample": "{run} --out {new}",
    "evaluate": "{run}",
    "export": "{run} --out {new}.safetensors",
    "compare": "digits --seeds 1 --out {new}",
    "plan": "digits --gpus 2",
    "methods": "--num-timesteps 8",
    "consistency": "{run} {run} --out {new}",
    "doctor": "",
    "shards make": "{pictures} {new} --workers 1",
    "shards check": "{shards} --out {new}",
    "shards index": "{shards} --workers 1",
    "shards encode": "{shards} {new}",
    "nonsense": "x",
}


@pytest.fixture
def nothing_takes_long(monkeypatch):
    def reached(*arguments, **options):
        raise Reached

    monkeypatch.setattr(Comparison, "run", reached)
    monkeypatch.setattr(sample, "generate_in_parts", reached)
    monkeypatch.setattr(evaluate, "generate_in_parts", reached)
    monkeypatch.setattr(evaluate, "build_evaluator", reached)
    monkeypatch.setattr(consistency, "_generate", reached)
    monkeypatch.setattr(vae, "load_vae", reached)
    monkeypatch.setattr(text.TextEncoder, "__init__", reached)


@pytest.mark.parametrize("command", COMMANDS)
def test_whatever_the_options_are_there_is_one_error_or_an_outcome(
    command, place, monkeypatch, capsys, tmp_path_factory, nothing_takes_long
):
    monkeypatch.chdir(tmp_path_factory.mktemp("work"))
    words = command.split()
    with pytest.raises(SystemExit):
        cli.main([*words[:2], "--help"] if words[0] == "shards" else [words[0], "--help"])
    options = hostile.options_of(capsys.readouterr().out)

    @settings(max_examples=12)
    @given(seed=st.integers(0, 2**32 - 1))
    def attack(seed: int) -> None:
        rng = random.Random(seed)
        new = tmp_path_factory.mktemp("new") / "out"
        names = ("run", "pictures", "shards")
        places = {name: str(place / name) for name in names} | {"new": str(new)}
        usual = COMMANDS[command].format(**places).split()
        line = [*words, *hostile.arguments(rng, usual, options)]
        status = 0
        try:
            cli.main(line)
        except Reached:
            pass
        except SystemExit as end:
            status = end.code
        said = capsys.readouterr().err
        assert status in (0, 2) or (status == 1 and command == "shards check"), line
        assert status != 2 or said, line
        assert "Traceback" not in said, line

    attack()
