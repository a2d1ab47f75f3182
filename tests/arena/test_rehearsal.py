import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

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


def rehearsed(folder: Path, *seconds_a_step: float) -> dict[str, Run]:
    """A rehearsal whose intervals are said to have taken so long, after one that compiled."""
    run = rehearsal(BASE, folder)
    first, last = run.config.log_every, run.config.steps
    seconds, records = 50.0, [(first, 50.0)]
    for step, pace in zip(range(2 * first, last + 1, first), seconds_a_step, strict=True):
        seconds += first * pace
        records.append((step, seconds))
    write_records(run.folder, *records)
    (run.folder / run.outcome).touch()
    return {"uniform": run}


def test_the_pace_is_that_of_the_median_interval_without_the_first(tmp_path):
    (run,) = rehearsed(tmp_path, 0.3, 0.1, 0.2).values()
    assert seconds_per_step(run.folder) == pytest.approx(0.2)


@pytest.mark.parametrize("evaluations, steps", [(10, 310), (7, 308)])
def test_a_run_gets_the_steps_that_fit_into_the_time_and_its_evaluations(
    tmp_path, evaluations, steps
):
    base = replace(BASE, steps=evaluations, evaluation=EvaluationConfig(every=1))
    configs = in_time({"uniform": base}, rehearsed(tmp_path / "run", 0.1, 0.1, 0.1), 31.05)
    assert configs["uniform"].steps == configs["uniform"].checkpoint_every == steps
    assert configs["uniform"].evaluation == EvaluationConfig(every=steps // evaluations)


def test_a_time_too_short_for_its_evaluations_is_refused(tmp_path):
    runs = rehearsed(tmp_path / "run", 0.1, 0.1, 0.1)
    with pytest.raises(ValueError, match="makes 5 steps in 0.55 seconds, .* evaluated 10 times"):
        in_time({"uniform": BASE}, runs, 0.55)


def test_a_run_that_fails_is_named(tmp_path):
    runs = {"uniform": rehearsal(BASE, tmp_path)}
    with pytest.raises(ValueError, match="pace of uniform could not be measured: it has not begun"):
        in_time({"uniform": BASE}, runs, 3.1)


def test_what_is_left_of_an_interrupted_rehearsal_is_removed(tmp_path):
    (run,) = rehearsed(tmp_path / "run", 0.1, 0.1, 0.1).values()
    rehearsal(BASE, run.folder)
    assert run.folder.exists()
    (run.folder / run.outcome).unlink()
    rehearsal(BASE, run.folder)
    assert not run.folder.exists()


def test_a_rehearsal_compares_no_images(tmp_path):
    compared = EvaluationConfig(features="inception", reference="pictures.npz", metrics=("fid",))
    config = rehearsal(replace(BASE, evaluation=compared), tmp_path).config
    assert (config.evaluation.features, config.evaluation.reference) == ("none", None)


@pytest.mark.parametrize("steps", [COMPILE_PAYS_ON_CPU, COMPILE_PAYS_ON_CPU - 1])
def test_a_rehearsal_compiles_as_the_long_run_does(steps):
    chosen = compiled_as_chosen(replace(BASE, steps=steps, device="cpu"))
    assert chosen.compile == ("on" if steps >= COMPILE_PAYS_ON_CPU else "off")


@pytest.mark.parametrize("fits, compiled", [(None, "graphs"), (8, "blocks")])
def test_graphs_that_the_memory_is_too_small_for_are_not_rehearsed(monkeypatch, fits, compiled):
    chosen = SimpleNamespace(compile=SimpleNamespace(value="graphs"))
    monkeypatch.setattr("speed_engine.arena.rehearsal.machine_choices", lambda config: chosen)
    monkeypatch.setattr("speed_engine.arena.rehearsal.images_that_fit", lambda *_, resident: fits)
    assert compiled_as_chosen(BASE).compile == compiled
