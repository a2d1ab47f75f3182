import dataclasses
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from speed_engine.arena import runs
from speed_engine.arena.planned import Run, failure, is_complete
from speed_engine.arena.runs import execute
from speed_engine.config import TrainConfig
from speed_engine.evaluation.config import EvaluationConfig
from speed_engine.models.config import DiTConfig
from speed_engine.training import checkpoint
from speed_engine.training.config import OptimizerConfig

TINY = TrainConfig(
    steps=40,
    batch_size=16,
    log_every=10,
    checkpoint_every=10,
    model=DiTConfig(dim=16, depth=1, num_heads=2),
    evaluation=EvaluationConfig(every=40, num_images=20, solver_steps=2, features="none"),
)
LONG = dataclasses.replace(TINY, steps=4000, log_every=1, checkpoint_every=20)
# The loss overflows float32 within a few steps, and so does every later one.
DIVERGING = dataclasses.replace(
    TINY, log_every=1, optimizer=OptimizerConfig(learning_rate=1e30, warmup_steps=0)
)


class Ended:
    """Remembers which runs ended."""

    def __init__(self) -> None:
        self.complete: dict[str, bool] = {}

    def __call__(self, run: Run, complete: bool) -> None:
        self.complete[run.folder.name] = complete


def average(run: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load_group(checkpoint.newest(run / "checkpoints"), "ema")


def pid_of(run: Path) -> int:
    return int(re.findall(r"process (\d+)", run.with_name(f"{run.name}.log").read_text())[-1])


def in_background(function: Callable[..., None], *arguments: object) -> None:
    """In a thread that nobody waits for: where a run fails, no checkpoint comes."""
    threading.Thread(target=function, args=arguments, daemon=True).start()


def comes(event: Callable[[], object], seconds: float = 300) -> bool:
    """Whether it does, rather than waiting for ever."""
    until = time.monotonic() + seconds
    while not event():
        if time.monotonic() > until:
            return False
        time.sleep(0.01)
    return True


def has_checkpoint(run: Path) -> bool:
    return any((run / "checkpoints").glob("step-*"))


def kill_when_there_is_a_checkpoint(run: Path) -> None:
    if comes(lambda: has_checkpoint(run)):
        os.kill(pid_of(run), signal.SIGKILL)


def test_one_failing_run_is_told_and_does_not_stop_the_others(tmp_path):
    outcome = tmp_path / "outcome"
    outcome.write_text("done")
    started = [
        Run(config=TINY, folder=tmp_path / "first"),
        Run(config=DIVERGING, folder=tmp_path / "diverging"),
        Run(
            config=TINY, folder=tmp_path / "last", outcome="outcome",
            finish=partial(shutil.copy, outcome),  # (outcome, folder)
        ),
    ]  # fmt: skip
    ended = Ended()
    execute(started, slots=2, threads=1, done=ended)
    assert ended.complete == {"first": True, "diverging": False, "last": True}
    assert "not finite in 3 steps in a row" in failure(started[1])
    assert (tmp_path / "last" / "outcome").read_text() == "done"
    for name, tensor in average(started[0].folder).items():  # processes do not disturb each other
        assert torch.equal(tensor, average(started[2].folder)[name])


def test_a_killed_run_is_told_and_resumed_by_the_next_call_as_if_it_had_not_been(tmp_path):
    killed, straight = (Run(config=LONG, folder=tmp_path / name) for name in ("killed", "straight"))
    short = [
        dataclasses.replace(run, config=dataclasses.replace(LONG, steps=200))
        for run in (killed, straight)
    ]
    ended = Ended()
    in_background(kill_when_there_is_a_checkpoint, killed.folder)
    execute([killed], slots=1, threads=1, done=ended)
    assert ended.complete == {"killed": False}
    assert failure(killed) == "the process was killed by SIGKILL"
    config = killed.folder / "config.json"
    config.write_text(config.read_text().replace('"steps": 4000', '"steps": 200'))
    execute(short, slots=2, threads=1, done=ended)
    assert ended.complete == {"killed": True, "straight": True}
    for name, tensor in average(killed.folder).items():
        assert torch.equal(tensor, average(straight.folder)[name])


class Processes:
    """A context of multiprocessing whose processes end at once, and what they were given."""

    def __init__(self) -> None:
        self.gpus: list[str] = []

    def set_forkserver_preload(self, modules: list[str]) -> None:
        pass

    def Process(self, target: Callable[..., None], args: tuple[Run, str, int]) -> SimpleNamespace:  # noqa: N802
        self.gpus.append(args[1])
        ended, end = os.pipe()
        os.close(end)
        nothing = lambda: None
        return SimpleNamespace(sentinel=ended, exitcode=0, start=nothing, join=nothing)


@pytest.mark.parametrize("gpus, given", [(["2", "5"], ["2", "5", "2"]), ([], ["", "", ""])])
def test_more_slots_than_gpus_share_them(gpus, given, tmp_path, monkeypatch):
    processes = Processes()
    monkeypatch.setattr(runs, "get_context", lambda method: processes)
    monkeypatch.setattr(runs, "_gpus", lambda: gpus)
    planned = [Run(config=TINY, folder=tmp_path / str(i)) for i in range(3)]
    execute(planned, slots=3, threads=1, done=Ended())
    assert processes.gpus == given


def test_the_gpus_are_those_that_the_process_may_use(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert runs._gpus() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,7")
    assert runs._gpus() == ["3", "7"]


def test_a_complete_run_is_passed_over(tmp_path):
    run = Run(config=TINY, folder=tmp_path / "run")
    execute([run], slots=1, threads=1, done=Ended())
    assert is_complete(run)
    written = (run.folder / "metrics.jsonl").stat().st_mtime_ns
    execute([run], slots=1, threads=1, done=Ended())
    assert (run.folder / "metrics.jsonl").stat().st_mtime_ns == written


def test_a_run_that_has_not_begun_says_so(tmp_path):
    assert failure(Run(config=TINY, folder=tmp_path / "run")) == "it has not begun"


@pytest.fixture
def interruptible():
    """A shell starts what it runs in the background with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interruption_stops_all_runs_with_a_checkpoint(tmp_path, interruptible):
    run = Run(config=LONG, folder=tmp_path / "run")

    def interrupt() -> None:
        if comes(lambda: has_checkpoint(run.folder)):
            os.kill(os.getpid(), signal.SIGINT)

    in_background(interrupt)
    with pytest.raises(KeyboardInterrupt):
        execute([run], slots=1, threads=1, done=Ended())
    assert not Path(f"/proc/{pid_of(run.folder)}").exists()
    assert "stopped by SIGTERM" in failure(run)
    assert checkpoint.newest(run.folder / "checkpoints")


KILLED = """
import os, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_runs import LONG, Ended, Run, execute

if __name__ == "__main__":
    execute([Run(config=LONG, folder=Path({folder!r}))], slots=1, threads=1, done=Ended())
"""


def test_runs_of_a_comparison_that_was_killed_stop_with_a_checkpoint(tmp_path):
    """Else they would train on, and the same command would start them a second time."""
    run, script = Run(config=LONG, folder=tmp_path / "run"), tmp_path / "comparison.py"
    script.write_text(KILLED.format(tests=str(Path(__file__).parent), folder=str(run.folder)))
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": f"{root}:{root / 'kernels'}"}
    comparison = subprocess.Popen([sys.executable, str(script)], env=environment)
    assert comes(lambda: has_checkpoint(run.folder) or comparison.poll() is not None)
    assert comparison.poll() is None
    comparison.kill()
    comparison.wait()
    assert comes(lambda: not Path(f"/proc/{pid_of(run.folder)}").exists())
    assert "stopped by SIGTERM" in failure(run)
    assert checkpoint.newest(run.folder / "checkpoints")


def test_a_run_whose_last_checkpoint_a_full_disk_cost_is_trained_again(tmp_path):
    """Its EMA alone is not what a final model is measured by."""
    finished = tmp_path / "outcome"
    finished.write_text("done")
    run = Run(
        config=TINY, folder=tmp_path / "run", outcome="outcome",
        finish=partial(shutil.copy, finished),  # (outcome, folder)
    )  # fmt: skip
    run.folder.mkdir()
    (run.folder / "ema.safetensors").write_bytes(b"")
    ended = Ended()
    execute([run], slots=1, threads=1, done=ended)
    assert ended.complete == {"run": True}
    assert checkpoint.newest(run.folder / "checkpoints").name == "step-00000040"
