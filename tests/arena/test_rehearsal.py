import json
from dataclasses import replace
from pathlib import Path

import pytest

from speed_engine.arena.planned import Run
from speed_engine.arena.rehearsal import (
    compiled_as_chosen,
    in_time,
    rehearsal,
    seconds_per_step,
)
from speed_engine.config import TrainConfig
from speed_engine.evaluation.config import EvaluationConfig
from speed_engine.runtime.machine import COMPILE_PAYS_ON_CPU

BASE = TrainConfig(steps=400, evaluation=EvaluationConfig(every=40))


def write_records(run: Path, *of_steps: tuple[int, float]) -> None:
    run.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"step": s, "seconds": t, "loss": 1.0}) + "\n" for s, t in of_steps]
    lines.insert(1, json.dumps({"step": 20, "seconds": 99.0, "fid": 1.0}) + "\n")
    (run / "metrics.jsonl").write_text("".join(lines))


def rehearsed(folder: Path, seconds_a_step: float) -> dict[str, Run]:
    """A rehearsal that is said to have taken so long."""
    run = rehearsal(BASE, folder)
    assert run.config.steps == 60 and run.config.log_every == 20
    times = [(step, 5 + step * seconds_a_step) for step in (20, 40, 60)]
    write_records(run.folder, *times)
    (run.folder / run.outcome).touch()
    return {"uniform": run}


def test_the_pace_is_that_of_the_median_interval_without_the_first(tmp_path):
    write_records(tmp_path, (20, 50.0), (40, 54.0), (60, 56.0), (80, 57.0))
    assert seconds_per_step(tmp_path) == pytest.approx(2 / 20)


def test_a_run_gets_the_whole_evaluations_that_fit_into_the_time(tmp_path):
    configs = in_time({"uniform": BASE}, rehearsed(tmp_path / "run", 0.1), 31.0)
    assert configs["uniform"].steps == 280  # of 310, in fortieths
    assert configs["uniform"].checkpoint_every == 280
    assert configs["uniform"].evaluation == BASE.evaluation


def test_a_time_too_short_for_an_evaluation_is_refused(tmp_path):
    with pytest.raises(ValueError, match="uniform makes 31 steps in 3.1 seconds.*every 40"):
        in_time({"uniform": BASE}, rehearsed(tmp_path / "run", 0.1), 3.1)


def test_a_run_that_fails_is_named(tmp_path):
    runs = {"uniform": rehearsal(BASE, tmp_path)}
    with pytest.raises(ValueError, match="pace of uniform could not be measured: it has not begun"):
        in_time({"uniform": BASE}, runs, 3.1)


@pytest.mark.parametrize("steps", [COMPILE_PAYS_ON_CPU, COMPILE_PAYS_ON_CPU - 1])
def test_a_rehearsal_compiles_as_the_long_run_does(tmp_path, steps):
    chosen = compiled_as_chosen(replace(BASE, steps=steps, device="cpu"))
    assert chosen.compile == ("on" if steps >= COMPILE_PAYS_ON_CPU else "off")
    assert rehearsal(chosen, tmp_path).config.compile == chosen.compile
