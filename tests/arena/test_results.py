import json

import pytest

from speed_engine.arena.gather import curve_of
from speed_engine.arena.planned import FINAL_FILE
from speed_engine.arena.results import (
    Contestant,
    Curve,
    Point,
    Results,
    read_results,
    write_results,
)
from speed_engine.runtime.checks import UserError

RESULTS = Results(
    metric="held_out_fid",
    extractor="an extractor",
    budget_images=200,
    contestants=(
        Contestant(
            name="uniform", method="uniform", schedule="linear", prediction="epsilon",
            options={}, learning_rate=1e-3, tuning={"0.001": 2.0},
        ),
    ),
    seeds=(0, 1),
    curves=(
        Curve(
            contestant="uniform", seed=0, run="runs/uniform/seed-0",
            points=(Point(images=100, seconds=1.5, values={"held_out_fid": 3.25}),),
        ),
        Curve(contestant="uniform", seed=1, run="runs/uniform/seed-1", failure="killed"),
    ),
    baselines=("uniform",),
    config={"steps": 2},
    environment={"python": "3"},
    command="speed-engine compare",
)  # fmt: skip


def test_results_are_read_as_they_were_written(tmp_path):
    write_results(RESULTS, tmp_path / "results.json")
    assert read_results(tmp_path / "results.json") == RESULTS


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"curves": [{"seed": 0}]}', "\x00", "[" * 9999])
def test_another_file_is_refused(tmp_path, text):
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"results.json: .* holds no results of a comparison"):
        read_results(path)


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("config", 5, "config=5: should be"),
        ("seeds", ["0"], 'seeds.0="0": should be'),
        (
            "curves",
            [{"contestant": "x", "seed": 0, "run": "x", "points": [5]}],
            "curves.0.points",
        ),
        ("references", {"x": {"fid": "low"}}, 'references.x.fid="low": should be'),
    ],
)
def test_results_that_a_hand_has_damaged_are_refused(tmp_path, field, value, message):
    path = tmp_path / "results.json"
    write_results(RESULTS, path)
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(UserError) as refused:
        read_results(path)
    assert str(path) in str(refused.value) and message in str(refused.value)


@pytest.mark.parametrize("text", ["", "[]", '{"by_solver_steps": 5}', '{"denoising": {"-8": "x"}}'])
def test_measurements_of_a_final_model_that_a_hand_has_damaged_are_refused(tmp_path, text):
    (tmp_path / FINAL_FILE).write_text(text)
    with pytest.raises(UserError, match=r"final.json: .* Delete it and run the same comparison"):
        curve_of("uniform", 0, tmp_path, tmp_path, None)
