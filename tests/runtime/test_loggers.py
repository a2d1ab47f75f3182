"""Loggers: what each service is asked for, and what a run does without one."""

import io
import json
import re
import sys
import typing
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import speed_engine as se
from speed_engine.config import TrainConfig, flat
from speed_engine.run.starting import resume
from speed_engine.runtime.checks import UserError
from speed_engine.runtime.loggers import LOGGERS, open_loggers
from speed_engine.runtime.records import RunLog, read_records

QUIET = Console(file=io.StringIO())
TINY = {
    "steps": 4,
    "batch_size": 4,
    "log_every": 2,
    "checkpoint_every": 2,
    "model": {"dim": 16, "depth": 1, "num_heads": 2},
    "evaluation": {"features": "none", "num_images": 10, "solver_steps": 2, "every": 4},
}


class FakeModule(ModuleType):
    """A module whose functions write down how they were called."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.calls: list[tuple] = []

    def note(self, name: str, answer: object = None):
        def call(*arguments, **options):
            self.calls.append((name, *arguments, options) if options else (name, *arguments))
            return answer

        return call

    def named(self, name: str) -> list[tuple]:
        return [call[1:] for call in self.calls if call[0] == name]


@pytest.fixture
def wandb(monkeypatch) -> FakeModule:
    """The part of its public API that is used, as of 0.31."""
    module = FakeModule("wandb")
    run = SimpleNamespace(**{n: module.note(n) for n in ("define_metric", "log", "finish")})
    module.init = module.note("init", run)  # pyright: ignore[reportAttributeAccessIssue]
    module.Image = lambda path: ("image", path)  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    return module


@pytest.fixture
def mlflow(monkeypatch) -> FakeModule:
    """The part of its public API that is used, as of 3.17."""
    module = FakeModule("mlflow")
    answers = {
        "get_experiment_by_name": None,
        "create_experiment": "7",
        "create_run": SimpleNamespace(info=SimpleNamespace(run_id="abc")),
    }
    others = ("update_run", "log_batch", "log_artifact", "set_terminated")
    client = {name: module.note(name, answer) for name, answer in answers.items()}
    client |= {name: module.note(name) for name in others}
    module.MlflowClient = lambda: SimpleNamespace(**client)  # pyright: ignore
    module.entities = SimpleNamespace(  # pyright: ignore[reportAttributeAccessIssue]
        Metric=lambda *values: ("metric", *values), Param=lambda *values: ("param", *values)
    )
    monkeypatch.setitem(sys.modules, "mlflow", module)
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    return module


def test_the_configuration_names_every_logger():
    kind, _ = typing.get_args(typing.get_type_hints(TrainConfig)["logger"])
    assert list(typing.get_args(kind)) == list(LOGGERS)


def test_weights_and_biases_gets_the_figures_and_pictures_of_a_run(tmp_path, wandb):
    run = se.train("digits", tmp_path / "run", console=QUIET, logger=["wandb"], **TINY)
    name = (run.folder / "wandb-id").read_text()
    ((options,),) = wandb.named("init")
    as_given = flat(run.config) | {"compile": "auto", "attention": "auto"}
    assert options == {
        "project": "speed_engine", "name": "run", "id": name, "resume": "allow",
        "dir": str(run.folder), "config": as_given,
    }  # fmt: skip
    assert wandb.named("define_metric") == [("*", {"step_metric": "step"})]
    *rows, picture = (row for (row,) in wandb.named("log"))
    records = read_records(run.folder)
    assert rows == [{name: of for name, of in r.items() if name != "images"} for r in records]
    assert [row["step"] for row in rows] == [2, 4, 4]
    assert rows[-1].keys() == {"step", "seconds", "validation_loss"}
    path = str(run.folder / "samples/step-00000004.png")
    assert picture == {"samples": ("image", path), "step": 4}
    assert wandb.calls[-1] == ("finish",)
    assert not (run.folder / "tensorboard").exists()


def test_a_resumed_run_goes_on_with_the_same_run_of_each_service(
    tmp_path, wandb, mlflow, monkeypatch
):
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    options = TINY | {"logger": ["wandb", "mlflow"], "steps": 2}
    run = se.train("digits", tmp_path / "run", console=QUIET, **options)
    resume(run.folder, QUIET, 4)
    (first,), (second,) = wandb.named("init")
    assert first["id"] == second["id"] and second["project"] == "mine"
    assert len(mlflow.named("create_run")) == 1
    assert mlflow.named("update_run") == [("abc", {"status": "RUNNING"})]


def test_mlflow_gets_the_figures_and_pictures_of_a_run(tmp_path, mlflow):
    run = se.train("digits", tmp_path / "run", console=QUIET, logger=["mlflow"], **TINY)
    assert mlflow.calls[:3] == [
        ("get_experiment_by_name", "speed_engine"),
        ("create_experiment", "speed_engine"),
        ("create_run", "7", {"run_name": "run"}),
    ]
    batches = mlflow.named("log_batch")
    assert {run_id for run_id, _ in batches} == {"abc"}
    parameters = [part["params"] for _, part in batches if "params" in part]
    assert max(map(len, parameters)) <= 100
    named = {name: value for part in parameters for _, name, value in part}
    assert named["steps"] == "4" and named["optimizer.beta1"] == "0.9"
    assert named.keys() == flat(run.config).keys()
    metrics = [metric for _, part in batches for metric in part.get("metrics", ())]
    seen = {(step, name): value for _, name, value, _, step in metrics}
    losses = {r["step"]: r["loss"] for r in read_records(run.folder) if "loss" in r}
    assert losses == {step: seen[step, "loss"] for step in (2, 4)}
    assert mlflow.named("log_artifact") == [
        ("abc", str(run.folder / "samples/step-00000004.png"), "samples")
    ]
    assert mlflow.calls[-1] == ("set_terminated", "abc")


def test_tensorboard_shows_figures_and_pictures(tmp_path):
    Image.fromarray(np.full((6, 4), 200, np.uint8)).save(tmp_path / "x.png")
    records = RunLog(tmp_path, 0, open_loggers(["tensorboard"], tmp_path, {}, 0))
    records.write(3, {"loss": 0.5, "solver": "ddim", "steps": 7, "num_generated": 9})
    records.picture(3, tmp_path / "x.png")
    records.close()
    curves = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert curves.Tags()["scalars"] == ["loss", "steps"]
    ((step, value),) = [(e.step, e.value) for e in curves.Scalars("loss")]
    (picture,) = curves.Images("samples")
    assert (step, value) == (3, 0.5)
    assert (picture.step, picture.width, picture.height) == (3, 4, 6)


def test_a_service_that_fails_is_left_and_the_run_goes_on(tmp_path, wandb, caplog):
    (tmp_path / "run").mkdir()
    wandb.init = lambda **_: SimpleNamespace(  # pyright: ignore[reportAttributeAccessIssue]
        define_metric=lambda *_, **__: None, log=fails, finish=lambda: pytest.fail("it is gone")
    )
    records = RunLog(tmp_path, 0, open_loggers(["wandb"], tmp_path, {}, 0))
    for step in range(3):
        records.write(step, {"loss": 0.5})
    records.close()
    assert len(read_records(tmp_path)) == 3
    assert caplog.messages == ["what the logger wandb shows ends at step 0: no route to host"]


def fails(*_, **__):
    raise RuntimeError("no route to host")


def test_a_service_that_refuses_to_begin_is_one_message(tmp_path, wandb):
    wandb.init = fails  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(UserError, match=r"the logger wandb cannot begin: no route to host; see th"):
        se.train("digits", tmp_path / "run", console=QUIET, logger=["tensorboard", "wandb"], **TINY)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_logger_that_is_not_installed_is_refused_before_the_run_begins(
    tmp_path, monkeypatch, name
):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=re.escape(f"pip install 'speed-engine[{name}]'")):
        se.train("digits", tmp_path / "run", console=QUIET, logger=["tensorboard", name], **TINY)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "names, message",
    [
        (["tensorbord"], """logger.0="tensorbord": should be 'tensorboard', 'wandb' or 'mlflow'"""),
        (["wandb", "wandb"], "logger=wandb wandb: name each logger once"),
    ],
)
def test_an_unknown_logger_is_refused(tmp_path, names, message):
    with pytest.raises(UserError, match=re.escape(message)):
        se.train("digits", tmp_path / "run", logger=names)


def test_without_loggers_the_records_are_the_file(tmp_path):
    run = se.train("digits", tmp_path / "run", console=QUIET, logger=[], **TINY)
    assert not (run.folder / "tensorboard").exists()
    lines = (run.folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2, 4, 4]
