import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from speed_engine.arena.rehearsal import in_time, seconds_per_step
from speed_engine.arena.planned import Run
from speed_engine.config import TrainConfig
from speed_engine.evaluation.config import EvaluationConfig

BASE = TrainConfig(steps=400, evaluation=EvaluationConfig(every=40))


def write_records(run: Path, *of_steps: tuple[int, float]) -> None:
    run.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"step": s, "seconds": t, "loss": 1.0}) + "\n" for s, t in of_steps]
    lines.insert(1, json.dumps({"step": 20, "seconds": 99.0, "fid": 1.0}) + "\n")
    (run / "metrics.jsonl").write_text("".join(lines))


def taking(seconds_a_step: float):
    """Runs that are said to have taken so long."""

    def run_all(runs: Sequence[Run]) -> None:
        for run in runs:
            assert run.config.steps == 60 and run.config.log_every == 20
            times = [(step, 5 + step * seconds_a_step) for step in (20, 40, 60)]
            write_records(run.folder, *times)
            (run.folder / run.outcome).touch()

    return run_all


def test_the_pace_is_that_of_the_median_interval_without_the_first(tmp_path):
    write_records(tmp_path, (20, 50.0), (40, 54.0), (60, 56.0), (80, 57.0))
    assert seconds_per_step(tmp_path) == pytest.approx(2 / 20)


def test_a_run_gets_the_whole_evaluations_that_fit_into_the_time(tmp_path):
    configs = in_time({"uniform": BASE}, 31.0, {"uniform": tmp_path / "run"}, taking(0.1))
    assert configs["uniform"].steps == 280  # of 310, in fortieths
    assert configs["uniform"].checkpoint_every == 280
    assert configs["uniform"].evaluation == BASE.evaluation


def test_a_time_too_short_for_an_evaluation_is_refused(tmp_path):
    with pytest.raises(ValueError, match="uniform makes 31 steps in 3.1 seconds.*every 40"):
        in_time({"uniform": BASE}, 3.1, {"uniform": tmp_path / "run"}, taking(0.1))


def test_a_run_that_fails_is_named(tmp_path):
    with pytest.raises(ValueError, match="pace of uniform could not be measured: it has not begun"):
        in_time({"uniform": BASE}, 3.1, {"uniform": tmp_path / "run"}, lambda runs: None)
