"""Curves of recorded runs: figures that were not finite, by whichever version, are not there."""

import math

import pytest

from speed_engine.arena.gather import curve_of, extractor_of, final_value
from speed_engine.arena.speedup import why_unusable
from speed_engine.runtime.checks import UserError

EVALUATION = (
    '{{"step": {step}, "images": {step}, "seconds": 1.0, "extractor": "x", "fid": {fid}}}\n'
)


@pytest.mark.parametrize("written", ["null", "NaN"])
def test_a_figure_that_was_not_finite_makes_a_run_unusable(tmp_path, written):
    lines = [EVALUATION.format(step=step, fid=fid) for step, fid in ((8, "2.5"), (16, written))]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(lines))
    curve = curve_of("uniform", 0, tmp_path / "run", tmp_path, None)
    assert [point.values for point in curve.points] == [{"fid": 2.5}, {}]
    assert why_unusable(curve, "fid") == "fid is not a positive number at every evaluation"
    assert final_value(tmp_path / "run", "fid") == math.inf


def test_runs_that_were_measured_in_different_features_are_refused(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    for run, extractor in ((first, "x"), (second, "y")):
        run.mkdir()
        line = EVALUATION.format(step=8, fid=2.5).replace('"x"', f'"{extractor}"')
        (run / "metrics.jsonl").write_text(line)
    assert extractor_of([first, first]) == "x" and extractor_of([]) == ""
    with pytest.raises(UserError, match="in different features, .* cannot be compared: x, y"):
        extractor_of([second, first])
