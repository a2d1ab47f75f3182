"""A run that is asked to stop answers at once, keeps what is done, and goes on from there."""

import dataclasses
import io
import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from tensorboard.summary.writer.event_file_writer import _AsyncWriterThread

import fault_harness
from speed_engine.config import TrainConfig
from speed_engine.data.training_data import TrainingData
from speed_engine.evaluation import evaluator as evaluator_module
from speed_engine.evaluation.config import EvaluationConfig
from speed_engine.evaluation.evaluator import Evaluator
from speed_engine.models.config import DiTConfig
from speed_engine.run.folder import newest_checkpoint
from speed_engine.run.starting import resume, start
from speed_engine.runtime.progress import TrainingProgress
from speed_engine.runtime.records import read_records
from speed_engine.runtime.stopping import StopRequest
from speed_engine.runtime.watchdog import PATIENT, Watchdog
from speed_engine.runtime.world import ALONE
from speed_engine.training.checkpoint import Checkpoints
from speed_engine.training.engine import Engine

CONFIG = TrainConfig(
    steps=12,
    batch_size=16,
    log_every=1,
    checkpoint_every=5,
    device="cpu",
    model=DiTConfig(dim=16, depth=1, num_heads=2),
    evaluation=EvaluationConfig(every=4, num_images=4, solver_steps=2, features="none"),
)


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("straight") / "run"
    start(CONFIG, run, Console(quiet=True))
    return run


@pytest.fixture(autouse=True)
def hears_ctrl_c():
    """A shell starts what it runs in the background with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_signal_is_remembered_where_nobody_reads_what_is_said(monkeypatch):
    def gone(*_):
        raise BrokenPipeError

    monkeypatch.setattr(os, "write", gone)
    with StopRequest(ALONE, torch.device("cpu")) as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal is signal.SIGTERM


def test_a_checkpoint_is_complete_where_nobody_reads_what_is_logged(monkeypatch, tmp_path):
    """rich ends the process then."""

    def gone(*_):
        raise SystemExit(1)

    monkeypatch.setattr(TrainingProgress, "figures", gone)
    config = dataclasses.replace(CONFIG, checkpoint_every=4, log_every=4)
    with pytest.raises(SystemExit):
        start(config, tmp_path / "run", Console(quiet=True))
    assert newest_checkpoint(tmp_path / "run").name == "step-00000004"


def test_what_may_take_long_is_said_to_the_watchdog(monkeypatch, tmp_path):
    said: list[str] = []
    monkeypatch.setattr(Watchdog, "doing", lambda _, step, what: said.append(what))
    wait = Checkpoints.wait

    def waits(checkpoints):
        said.append("waits")
        wait(checkpoints)

    monkeypatch.setattr(Checkpoints, "wait", waits)
    data = dataclasses.replace(CONFIG.data, resident="on")
    start(dataclasses.replace(CONFIG, data=data), tmp_path / "run", Console(quiet=True))
    assert said[0] == "reading the data set" and said.count("reading the data set") == 1
    before = {said[i - 1] for i, what in enumerate(said) if what == "waits"}
    assert before == {"evaluating", "saving"} and before <= set(PATIENT)


def asked_to_stop(number: signal.Signals) -> None:
    """As long work that a signal meets; it ends when the signal is answered."""
    os.kill(os.getpid(), number)
    time.sleep(60)
    pytest.fail("the signal was not answered")


def checkpoints(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").glob("step-*"))


def pictures(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "samples").iterdir())


def losses(run: Path) -> list[tuple[int, float]]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(record["step"], record["loss"]) for record in records if "loss" in record]


def assert_same(run: Path, straight: Path) -> None:
    assert losses(run) == losses(straight) and pictures(run) == pictures(straight)
    ours, theirs = (load_file(folder / "ema.safetensors") for folder in (run, straight))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
@pytest.mark.parametrize("step", [4, 12])  # between checkpoints, and the last one
def test_an_evaluation_is_given_up_and_made_up_for(
    monkeypatch, tmp_path, capfd, straight, number, step
):
    run, said = tmp_path / "run", io.StringIO()
    generate = Evaluator.generate

    def interrupted(self, model, advance):
        if not (run / "samples" / f"step-{step:08d}.png").exists() and len(asked) == step // 4 - 1:
            asked_to_stop(number)
        asked.append(model)
        return generate(self, model, advance)

    asked = []
    with monkeypatch.context() as patch:
        patch.setattr(Evaluator, "generate", interrupted)
        start(CONFIG, run, Console(file=said, width=200))
    assert f"stopped by {number.name} at step {step} of 12" in said.getvalue()
    assert f"{number.name}: saving a checkpoint" in capfd.readouterr().err
    assert checkpoints(run)[-1] == f"step-{step:08d}"
    assert not (run / "samples" / f"step-{step:08d}.png").exists()
    resume(run, Console(quiet=True))
    assert_same(run, straight)


def test_an_evaluation_is_lost_with_its_process_and_made_up_for(monkeypatch, tmp_path, straight):
    run = tmp_path / "run"

    def dies(self, model, advance):
        raise MemoryError

    config = dataclasses.replace(CONFIG, checkpoint_every=4)
    before = set(threading.enumerate())
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(Evaluator, "generate", dies)
        start(config, run, Console(quiet=True))
    assert checkpoints(run) == ["step-00000004"]  # saved before it was evaluated
    left = set(threading.enumerate()) - before
    assert not any(isinstance(each, _AsyncWriterThread) for each in left)
    resume(run, Console(quiet=True))
    assert_same(run, straight)


def test_waiting_for_data_is_given_up(monkeypatch, tmp_path, straight):
    run, batches = tmp_path / "run", TrainingData.batches

    def slow(self, start, resident):
        for number, batch in enumerate(batches(self, start, resident)):
            if number == 7:
                asked_to_stop(signal.SIGTERM)
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(TrainingData, "batches", slow)
        start(CONFIG, run, Console(quiet=True))
    assert checkpoints(run)[-1] == "step-00000007"
    resume(run, Console(quiet=True))
    assert_same(run, straight)


@pytest.mark.parametrize("done", [0, 5])  # of a new run, and of one that is resumed
def test_a_first_step_that_compiles_is_given_up(monkeypatch, tmp_path, straight, done):
    run, said = tmp_path / "run", io.StringIO()
    if done:
        start(dataclasses.replace(CONFIG, steps=done), run, Console(quiet=True))
        config = dataclasses.replace(CONFIG, checkpoint_every=5)
        (run / "ema.safetensors").unlink()
        for picture in (run / "samples").glob(f"step-{done:08d}.*"):
            picture.unlink()

    def compiling(self, batch):
        asked_to_stop(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "step", compiling)
        if done:
            resume(run, Console(file=said, width=200), changed=config)
        else:
            start(CONFIG, run, Console(file=said, width=200))
    assert f"stopped by SIGTERM at step {done} of 12" in said.getvalue()
    assert checkpoints(run) == [f"step-{step:08d}" for step in (done,) if step]
    resume(run, Console(quiet=True))
    assert [step for step, _ in losses(run)] == list(range(1, 13))
    ours, theirs = (load_file(folder / "ema.safetensors") for folder in (run, straight))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_brackets_in_the_name_of_a_run_are_no_markup(tmp_path):
    run, said = tmp_path / "x[/y] [red]", io.StringIO()
    start(dataclasses.replace(CONFIG, steps=4), run, Console(file=said, width=300))
    assert said.getvalue().count(str(run)) >= 3


def test_a_run_without_a_checkpoint_is_resumed_from_its_start(monkeypatch, tmp_path, straight):
    run, said = tmp_path / "run", io.StringIO()

    def slow(self, start, resident):
        asked_to_stop(signal.SIGTERM)
        yield

    with monkeypatch.context() as patch:
        patch.setattr(TrainingData, "batches", slow)
        start(CONFIG, run, Console(quiet=True))
    assert not checkpoints(run)
    resume(run, Console(file=said, width=200))
    assert "has no checkpoint yet; training from its start" in said.getvalue()
    assert_same(run, straight)


def test_a_second_ctrl_c_stops_at_once(monkeypatch, tmp_path):
    def twice(self, model, advance):
        try:
            os.kill(os.getpid(), signal.SIGINT)
        finally:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Evaluator, "generate", twice)
    with pytest.raises(KeyboardInterrupt):
        start(CONFIG, tmp_path / "run", Console(quiet=True))


def test_several_processes_give_up_an_evaluation_together(tmp_path):
    """Only the second is asked; the evaluation would take hours."""
    options = "--steps 20 --checkpoint-every 20 --evaluation.every 5 --parallel fsdp"
    long = (
        "--evaluation.features none --evaluation.num-images 1000000 --evaluation.solver-steps 900"
    )
    training = fault_harness.train(tmp_path / "run", [*options.split(), *long.split()])
    assert training.wait_for_step(5)
    training.kill(signal.SIGTERM, ranks=[1])
    assert training.join() == [0, 0], training.said()
    assert "stopped by a signal to another process at step 5 of 20" in training.said()
    assert fault_harness.checkpoints(training.run) == ["step-00000005"]


def test_an_evaluation_is_made_up_for_although_evaluate_has_begun_one_of_its_own(
    monkeypatch, tmp_path, straight
):
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(Evaluator, "generate", lambda *_: asked_to_stop(signal.SIGTERM))
        start(CONFIG, run, Console(quiet=True))
    parts = run / "samples" / "step-00000004.parts"  # of `speed-engine evaluate`, interrupted
    parts.mkdir(parents=True)
    resume(run, Console(quiet=True))
    parts.rmdir()
    assert_same(run, straight)


def test_an_evaluation_of_images_that_are_not_finite_has_no_figures_and_ends_no_run(
    monkeypatch, tmp_path, caplog
):
    generate = evaluator_module.generate

    def broken(*given, on_broken, **settings):
        images = generate(*given, **settings)
        on_broken("2 of 4 generated images are not finite.")
        return images

    monkeypatch.setattr(evaluator_module, "generate", broken)
    evaluation = dataclasses.replace(CONFIG.evaluation, features="classifier", num_images=100)
    start(dataclasses.replace(CONFIG, evaluation=evaluation), tmp_path / "run", Console(quiet=True))
    records = [r for r in read_records(tmp_path / "run") if "extractor" in r]
    assert [record["step"] for record in records] == [4, 8, 12]
    assert all(record["fid"] is None for record in records)
    warned = [of.getMessage() for of in caplog.records if of.levelname == "WARNING"]
    assert warned[0].startswith("step 4: 2 of 4 generated images are not finite.")
    assert not (tmp_path / "run" / "samples").exists()
