"""Configuration files: what they start from, what holds before what, and what is refused."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest

from speed_engine import cli
from speed_engine.arena.recipes import RECIPES
from speed_engine.build import build_process
from speed_engine.commands.config_file import origin, write
from speed_engine.config import TrainConfig, from_json, to_json
from speed_engine.data.config import DataConfig
from speed_engine.data.format.writer import ShardWriter
from speed_engine.data.preparing.pictures import npy_bytes
from speed_engine.evaluation.config import EvaluationConfig
from speed_engine.models.config import DiTConfig, UNetConfig
from speed_engine.presets import PRESETS
from speed_engine.runtime.checks import UserError
from speed_engine.training.config import OptimizerConfig

DIGITS = PRESETS["digits"][1]
UNUSUAL = TrainConfig(
    seed=-5,
    init_from=Path('/a "b"\\c\x7f\n'),
    data=DataConfig(source="Infinity é", members=("Infinity",), image_shape=(3, 32, 16)),
    optimizer=OptimizerConfig(grad_clip=math.inf, averages=("ema=0.9", "power=2")),
    evaluation=EvaluationConfig(guidance_interval=(0.3, math.inf)),
)


def file(tmp_path, text: str, name: str = "mine.toml") -> str:
    path = tmp_path / name
    path.write_text(text)
    return str(path)


def trained(monkeypatch, *arguments: str) -> tuple[TrainConfig, Path]:
    """What a run would be started with."""
    started = []
    monkeypatch.setattr("speed_engine.run.starting.start", lambda *run: started.append(run[:2]))
    cli.main(["train", *arguments])
    return started[0]


@pytest.mark.parametrize("suffix", [".toml", ".json"])
@pytest.mark.parametrize("config", [*(config for _, config in PRESETS.values()), UNUSUAL])
def test_what_is_written_is_read_again(tmp_path, config, suffix):
    path = tmp_path / "new" / f"x{suffix}"
    write(config, path)
    assert origin(str(path)).config() == config


def test_the_command_line_holds_before_the_file_and_the_file_before_the_preset(
    tmp_path, monkeypatch
):
    text = 'preset = "digits"\nsteps = 7\nseed = 3\n[optimizer]\nbeta1 = 0.5\nbeta2 = 0.9\n'
    path = file(tmp_path, text)
    config, folder = trained(monkeypatch, path, "--steps", "500", "--optimizer.beta2", "0.99")
    optimizer = dataclasses.replace(DIGITS.optimizer, beta1=0.5, beta2=0.99)
    assert config == dataclasses.replace(DIGITS, steps=500, seed=3, optimizer=optimizer)
    assert folder == Path("runs/mine-speed_paper-3")


def test_without_a_preset_the_other_fields_have_their_defaults(tmp_path):
    assert origin(file(tmp_path, "steps = 7")).config() == TrainConfig(steps=7)


def test_the_config_of_a_run_starts_another_like_it(tmp_path, monkeypatch):
    path = file(tmp_path, to_json(UNUSUAL), "config.json")
    assert trained(monkeypatch, path)[0] == UNUSUAL


def test_a_model_of_another_family_starts_from_its_own_defaults(tmp_path):
    text = 'preset = "digits"\n[model]\nfamily = "unet"\nmodel_channels = 32\n'
    assert origin(file(tmp_path, text)).config().model == UNetConfig(model_channels=32)
    text = 'preset = "digits"\n[model]\ndepth = 1\n'
    assert origin(file(tmp_path, text)).config().model == DiTConfig(depth=1)


def test_the_record_of_the_data_holds_before_the_preset_and_the_file_before_the_record(
    tmp_path, monkeypatch
):
    image = np.zeros((3, 16, 12), np.uint8)
    with ShardWriter(tmp_path / "shards", "x", 8) as writer:
        for i in range(6):
            writer.write(f"{i:03}", {"npy": npy_bytes(image), "cls": str(i % 3).encode()})
    source = f'[data]\nsource = "{tmp_path / "shards"}"\n'
    config, _ = trained(monkeypatch, file(tmp_path, source))
    assert (config.data.image_shape, config.data.num_classes) == ((3, 16, 12), 3)
    path = file(tmp_path, source + "num_classes = 7\n")
    assert trained(monkeypatch, path)[0].data.num_classes == 7
    path = file(tmp_path, "[data]\nnum_classes = 7\n")
    config, _ = trained(monkeypatch, path, "--data.source", str(tmp_path / "shards"))
    assert (config.data.image_shape, config.data.num_classes) == ((3, 16, 12), 7)


@pytest.mark.parametrize("name", ["saved.toml", "saved.json"])
def test_save_config_writes_every_field_and_trains_nothing(tmp_path, monkeypatch, capsys, name):
    path = tmp_path / name
    monkeypatch.setattr("speed_engine.run.starting.start", lambda *_: pytest.fail("it trained"))
    cli.main(["train", "emoji32", "--steps", "9", "--save-config", str(path)])
    assert "written" in capsys.readouterr().out
    expected = dataclasses.replace(PRESETS["emoji32"][1], steps=9)
    assert origin(str(path)).config() == expected
    assert name.endswith("toml") or from_json(path.read_text()) == expected


@pytest.mark.parametrize(
    "text, message",
    [
        ("step = 5", "step is unknown, the nearest is steps;"),
        ("[optimizer]\nlearning_rat = 1.0", "optimizer.learning_rat is unknown, the nearest is op"),
        ('steps = "5"', 'steps="5": should be a valid integer.'),
        ("steps = 2020-01-01", 'steps="2020-01-01": should be a valid integer.'),
        ('preset = "digitz"', "mine.toml: unknown preset 'digitz'; did you mean 'digits'?"),
        ("preset = 5", "mine.toml: unknown preset '5'; choose from digits"),
        ("steps = ", "mine.toml: Invalid value"),
        ('preset = ["digits"]', "mine.toml: unknown preset"),
        ("x = " + "[" * 5000, "mine.toml: it is nested too deeply"),
        ("steps = 5.5", "mine.toml: steps=5.5: should be"),
        ('"optimizer.beta1" = 0.5', 'as in {"optimizer": {"beta1": ...}}.'),
        ("optimizer = 5", "optimizer=5: should be an object."),
        ('[model]\nfamily = "dut"', """model.family="dut": should be one of 'dit'"""),
    ],
)
def test_what_is_wrong_in_a_file_is_one_message(tmp_path, text, message):
    with pytest.raises(UserError) as refused:
        origin(file(tmp_path, text)).config()
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_a_path_that_is_no_configuration_is_refused(tmp_path):
    with pytest.raises(UserError, match="gone.toml does not exist; give a preset, or the path of"):
        origin(str(tmp_path / "gone.toml"))
    with pytest.raises(UserError, match="unknown preset"):
        origin(str(tmp_path / "gone.yaml"))
    with pytest.raises(UserError, match=r"x.yaml: a configuration is written as FILE.toml or FIL"):
        write(DIGITS, tmp_path / "x.yaml")
    broken = file(tmp_path, '{"steps": 1, "steps": 2}', "twice.json")
    with pytest.raises(UserError, match="twice.json: steps is there twice"):
        origin(broken)


@pytest.mark.parametrize("name, text", [("x.toml", "steps = 7"), ("x.json", '{"steps": 7}')])
def test_a_file_that_begins_as_editors_of_windows_begin_it_is_read(tmp_path, name, text):
    path = tmp_path / name
    path.write_bytes(b"\xef\xbb\xbf" + text.encode() + b"\r\n")
    assert origin(str(path)).config().steps == 7


def test_a_recipe_of_a_file_holds_before_the_preset_and_after_the_file(tmp_path, monkeypatch):
    path = file(tmp_path, 'preset = "digits"\nrecipe = "flow"\n[optimizer]\nschedule = "cosine"\n')
    config, folder = trained(monkeypatch, path, "--prediction", "x0")
    assert (config.method, config.schedule, config.prediction) == ("logit_normal", "flow", "x0")
    assert config.optimizer == dataclasses.replace(DIGITS.optimizer, schedule="cosine")
    assert folder == Path("runs/mine-logit_normal-0")


def test_a_recipe_that_is_asked_for_holds_before_the_file_and_options_before_it(
    tmp_path, monkeypatch
):
    text = 'preset = "digits"\nrecipe = "flow_muon_decay"\nsteps = 7\n[optimizer]\nbeta2 = 0.9\n'
    path = file(tmp_path, text + 'name = "adamw"\nschedule = "cosine"\n')
    config, _ = trained(monkeypatch, path, "--recipe", "flow_muon", "--optimizer.beta1=0.8")
    optimizer = dataclasses.replace(
        DIGITS.optimizer, name="muon", schedule="linear", beta1=0.8, beta2=0.9
    )  # without the decay of the recipe that it takes the place of
    assert (config.steps, config.optimizer) == (7, optimizer)
    config, _ = trained(monkeypatch, path, "--recipe=flow_muon", "--optimizer.schedule", "wsd")
    assert (config.optimizer.name, config.optimizer.schedule) == ("muon", "wsd")


@pytest.mark.parametrize("suffix", [".toml", ".json"])
def test_a_recipe_holds_before_a_file_that_says_every_field(tmp_path, monkeypatch, suffix):
    path = tmp_path / f"config{suffix}"
    said = dataclasses.replace(DIGITS, steps=7, prediction="v")
    write(said, path)
    config, _ = trained(monkeypatch, str(path), "--recipe", "flow_muon")
    optimizer = dataclasses.replace(DIGITS.optimizer, name="muon", schedule="linear")
    assert config == dataclasses.replace(
        said, method="logit_normal", schedule="flow", prediction=None, optimizer=optimizer
    )


@pytest.mark.parametrize("options", [("--recipe", "flow_muon"), ("--optimizer.name", "muon")])
def test_what_has_no_effect_in_a_file_may_have_one_by_what_holds_before_it(
    tmp_path, monkeypatch, capsys, options
):
    path = file(tmp_path, 'preset = "digits"\n[optimizer]\nadamw_learning_rate = 0.01\n')
    config, _ = trained(monkeypatch, path, *options)
    assert config.optimizer.adamw_learning_rate == 0.01
    with pytest.raises(SystemExit):
        cli.main(["train", path, "--dry-run"])
    assert "has no effect with optimizer.name=adamw" in " ".join(capsys.readouterr().err.split())


def test_on_another_process_a_recipe_predicts_what_that_process_does(tmp_path, monkeypatch):
    named = file(tmp_path, 'preset = "digits"\nrecipe = "flow_muon"\nschedule = "linear"\n')
    for arguments in (["digits", "--recipe", "flow_muon", "--schedule", "linear"], [named]):
        config, _ = trained(monkeypatch, *arguments)
        process = build_process(config)
        assert (config.method, process.schedule.name) == ("logit_normal", "linear")
        assert process.prediction == "epsilon"
    config, _ = trained(monkeypatch, named, "--schedule", "flow")
    assert build_process(config).prediction == "velocity"
    config, _ = trained(monkeypatch, named, "--prediction", "v")
    assert build_process(config).prediction == "v"


def test_the_dry_run_says_what_is_trained_wherever_the_recipe_was_named(tmp_path, capsys):
    path = file(tmp_path, 'preset = "digits"\nrecipe = "flow"\nmethod = "speed_paper+k=3"\n')
    adamw = "optimizer.name=adamw+optimizer.schedule"
    for arguments, spelled in (
        (["digits", "--recipe=flow_muon_decay"], RECIPES["flow_muon_decay"][1]),
        ([path], f"speed_paper@flow:velocity+k=3+{adamw}=linear"),
        ([path, "--schedule", "cosine"], f"speed_paper@cosine:epsilon+k=3+{adamw}=linear"),
        (
            ["digits", "--recipe=flow", "--optimizer.schedule=wsd"],
            f"logit_normal@flow:velocity+{adamw}=wsd",
        ),
    ):
        cli.main(["train", *arguments, "--dry-run"])
        assert f"method      {spelled}\n" in capsys.readouterr().out


@pytest.mark.parametrize("option", [("--method", "speed"), ("--method=speed",)])
def test_a_recipe_given_as_a_method_is_refused_with_the_option_that_takes_it(capsys, option):
    with pytest.raises(SystemExit):
        cli.main(["train", "digits", *option])
    printed = " ".join(capsys.readouterr().err.split())
    assert "'speed' is a recipe" in printed
    assert "give --recipe speed, or its method alone, --method speed_paper." in printed


@pytest.mark.parametrize("recipe", ['"flow_moun"', "3", '["flow"]'])
def test_a_recipe_that_does_not_exist_is_refused_with_those_that_do(tmp_path, capsys, recipe):
    path = file(tmp_path, f"recipe = {recipe}\n")
    with pytest.raises(UserError, match="unknown recipe .*hoose from ddpm, speed, flow"):
        origin(path)
    assert origin(path, recipe="flow").config().schedule == "flow"


@pytest.mark.parametrize(
    "option, value, message",
    [
        ("--method", "unifrom", "unknown method 'unifrom'"),
        ("--optimizer.name", "moun", "unknown optimizer.name 'moun'; did you mean 'muon'?"),
        ("--optimizer.averages", "swa=1", "optimizer.averages='swa=1' is unknown"),
    ],
)
@pytest.mark.parametrize("what", ["--dry-run", "--save-config"])
def test_what_trains_nothing_knows_names_as_well(tmp_path, capsys, what, option, value, message):
    out = [str(tmp_path / "mine.toml")] * (what == "--save-config")
    with pytest.raises(SystemExit):
        cli.main(["train", "digits", option, value, what, *out])
    assert message in " ".join(capsys.readouterr().err.split()) and not list(tmp_path.iterdir())
