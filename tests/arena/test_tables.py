"""What tables and sentences say of a synthetic comparison, word by word."""

import dataclasses

import pytest
from arena_curves import BUDGET, comparison

from speed_engine.api.comparison import Compared
from speed_engine.arena import summary, verdicts
from speed_engine.arena.results import GAUSSIAN, REAL, Results, write_results

FID = "held-out FID (digits classifier features)"
# Such that no level of quality is that of a first or last evaluation, where a rounding decides.
SPEEDS = {"uniform": 1.0, "clts": 0.72, "min_snr": 1.5, "p2": 2.5}


def failing(results: Results, *failed: tuple[str, int]) -> Results:
    curves = [
        dataclasses.replace(c, failure="killed", points=())
        if (c.contestant, c.seed) in failed
        else c
        for c in results.curves
    ]
    return dataclasses.replace(results, curves=tuple(curves))


def test_in_seconds_a_contestant_is_as_fast_as_its_clock_says():
    results = comparison({"uniform": 1.0, "p2": 3.0}, 3)
    curves = [
        dataclasses.replace(
            curve,
            points=tuple(dataclasses.replace(p, seconds=p.seconds / 2) for p in curve.points),
        )
        if curve.contestant == "p2"
        else curve
        for curve in results.curves
    ]
    found = verdicts.against(dataclasses.replace(results, curves=tuple(curves)), "uniform")
    for speedups, unit, speed in ((found.by_images, "images", 3), (found.by_seconds, "seconds", 6)):
        median = speedups["p2"].median
        assert (median.low, median.high) == pytest.approx((speed, speed))
        assert speedups["p2"].unit == unit


@pytest.mark.parametrize(
    "baseline, reached, missed",
    [
        (
            "logit_normal@flow",
            "a speed-up of 3.00× in images in the median over levels of quality (",
            "p2 never got to half of its levels of quality: ",
        ),
        (
            "uniform",
            "a speed-up of 3.00× in images to its final quality (",
            "p2 never got to its final quality: ",
        ),
    ],
)
def test_a_headline_says_where_it_measures_against_its_baseline(baseline, reached, missed):
    for speed, words in ((3.0, reached), (0.3, missed)):
        results = comparison({baseline: 1.0, "p2": speed}, 3)
        assert words in summary.headline(results, verdicts.against(results, baseline))


def test_contestants_are_listed_from_the_best_to_those_that_failed_then_what_was_not_trained():
    results = comparison({"clts": 8.0, "uniform": 1.0, "p2": 4.0, "min_snr@flow": 2.0}, 2)
    results = failing(results, ("clts", 0), ("clts", 1), ("p2", 1))
    *curves, last = results.curves
    last = dataclasses.replace(last, by_solver_steps={"8": 11.0, "50": 4.0}, copied_share=0.07)
    contestants = [
        dataclasses.replace(c, tuning={}) if c.name == "p2" else c for c in results.contestants
    ]
    references = {
        GAUSSIAN: {"held_out_fid": 3.5, "copied_share": 0.01},
        REAL: {"held_out_fid": 0.25},
        "of another metric": {"fid": 1.0},
    }
    table = summary.contestants_table(
        dataclasses.replace(
            results,
            curves=(*curves, last),
            contestants=tuple(contestants),
            references=references,
        )
    )
    assert table.header == [
        "method", "process", "target", "learning rate", "seeds", FID, "8 steps", "50 steps",
        "copied share",
    ]  # fmt: skip
    tuned = "0.001 ⚠ of 0.0005, 0.001"
    assert table.rows == [
        ["p2", "linear", "epsilon", "0.001", "1 of 2", "1.14", "9.00", "4.00", "5.0%"],
        [
            "min_snr@flow", "flow", "velocity", tuned, "2 of 2", "1.73 ± 0", "10.0 ± 1.41",
            "4.00 ± 0", "6.0%",
        ],
        [
            "uniform", "linear", "epsilon", tuned, "2 of 2", "2.63 ± 0", "9.00 ± 0", "4.00 ± 0",
            "5.0%",
        ],
        ["clts", "linear", "epsilon", tuned, "0 of 2", "–", "–", "–", "–"],
        ["Gaussian per class, no training", "–", "–", "–", "–", "3.50", "–", "–", "1.0%"],
        ["training images, no training", "–", "–", "–", "–", "0.250", "–", "–", "–"],
    ]  # fmt: skip


def test_everything_else_that_was_measured_at_the_end_is_a_table_of_its_own():
    results = failing(comparison({"uniform": 1.0, "p2": 4.0}, 2), ("p2", 1))
    assert summary.other_metrics_table(results) is None
    ends = (
        {"fid": 2.0, "validation_loss": 0.25},
        {"fid": 4.0, "validation_loss": 0.25},
        {"fid": 1.5},
    )
    for curve, values in zip(results.curves[:3], ends, strict=True):
        curve.points[0].values["kid"] = 1.0  # at the beginning alone
        curve.points[-1].values.update(values)
    references = {GAUSSIAN: {"held_out_fid": 3.5, "fid": 3.25}, REAL: {"held_out_fid": 0.25}}
    table = summary.other_metrics_table(dataclasses.replace(results, references=references))
    assert table is not None
    assert table.header == [
        "method",
        "FID (digits classifier features), lower is better",
        "validation loss, lower is better",
    ]
    assert table.rows == [
        ["uniform", "3.00 ± 1.41", "0.250 ± 0"],
        ["p2", "1.50", "–"],
        ["Gaussian per class, no training", "3.25", "–"],
    ]


def test_speed_ups_are_listed_from_the_largest_median_on_with_what_is_known_of_each():
    found = verdicts.against(comparison(SPEEDS, 3), "uniform")
    assert found.undecided == {} and summary.speedup_table({}, ()) is None
    table = summary.speedup_table(found.by_images, {"min_snr"})
    assert table is not None
    assert table.header == [
        "method", "verdict", "median over levels", "95 %", "worst", "best", "at final quality",
        "95 %", "seeds",
    ]  # fmt: skip
    assert table.rows == [
        [
            "p2", "faster", "2.50×", "2.50 to 2.50", "2.00 to 2.50×", "≥ 2.50×", "2.50×",
            "2.50 to 2.50", "3",
        ],
        [
            "min_snr", "undecided", "1.50×", "1.50 to 1.50", "1.50×", "1.50×", "1.50×",
            "1.50 to 1.50", "3",
        ],
        [
            "clts", "slower", "0.72×", "0.72 to 0.72", "< 0.72×", "0.72 to 1.00×", "< 1.00×",
            "0 to 1.00", "3",
        ],
    ]  # fmt: skip


def test_beyond_the_gaussian_there_are_two_columns_more():
    references = {GAUSSIAN: {"held_out_fid": 1.5 * 1000 * BUDGET**-0.6}}  # from half of the run on
    results = dataclasses.replace(comparison(SPEEDS, 3), references=references)
    table = summary.speedup_table(verdicts.against(results, "uniform").by_images, ())
    assert table is not None
    assert table.header[3:7] == ["95 %", "beyond the Gaussian", "95 %", "worst"]
    assert {row[0]: row[4:6] for row in table.rows} == {
        "p2": ["2.50×", "2.50 to 2.50"],
        "min_snr": ["1.50×", "1.50 to 1.50"],
        "clts": ["< 0.77×", "0 to 0.77"],  # of ten levels it reaches four
    }


def test_a_comparison_from_python_has_its_table_and_its_verdicts(tmp_path):
    results = comparison({"uniform": 1.0, "p2": 2.5}, 3)
    results = dataclasses.replace(results, baselines=("uniform", "p2"))
    write_results(results, tmp_path / "results.json")
    compared = Compared(tmp_path)
    best, second = compared.table
    assert best == {
        "method": "p2",
        "process": "linear",
        "target": "epsilon",
        "learning rate": "0.001 ⚠ of 0.0005, 0.001",
        "seeds": "3 of 3",
        FID: "1.52 ± 0",
        "8 steps": "9.00 ± 0",
        "50 steps": "4.00 ± 0",
        "copied share": "5.0%",
    }
    assert (second["method"], second[FID]) == ("uniform", "2.63 ± 0")
    over_uniform, over_p2 = compared.verdicts
    assert over_uniform == (
        "Against uniform, p2 has a speed-up of 2.50× in images to its final quality (95 % interval "
        "2.50 to 2.50). It is faster."
    )
    assert over_p2.startswith("Against p2, uniform never got to its final quality: < 1.00×")
