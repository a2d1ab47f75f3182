import pytest

from speed_engine.arena.results import (
    Contestant,
    Curve,
    Point,
    Results,
    read_results,
    write_results,
)

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


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"curves": [{"seed": 0}]}'])
def test_another_file_is_refused(tmp_path, text):
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="holds no results of a comparison"):
        read_results(path)
