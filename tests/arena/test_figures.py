"""What is drawn is what was measured."""

import dataclasses
import math

import numpy as np
import pytest
from arena_curves import comparison
from matplotlib.axes import Axes

from speed_engine.arena import verdicts
from speed_engine.arena.figures import draw_denoising, draw_quality, draw_speedups
from speed_engine.arena.results import GAUSSIAN, Results


@pytest.fixture
def drawn(monkeypatch) -> dict[str, dict[str, np.ndarray]]:
    """Lines by their names in the legend, each with the band that follows it."""
    lines: dict[str, dict[str, np.ndarray]] = {}
    plot, fill_between = Axes.plot, Axes.fill_between

    def line(axes, x, y, *style, **options):
        if "label" in options:
            lines[options["label"]] = {"x": np.array(x), "y": np.array(y)}
        return plot(axes, x, y, *style, **options)

    def band(axes, x, low, high, **options):
        [*lines.values()][-1].update(low=np.array(low), high=np.array(high))
        return fill_between(axes, x, low, high, **options)

    monkeypatch.setattr(Axes, "plot", line)
    monkeypatch.setattr(Axes, "fill_between", band)
    return lines


def of_two_seeds() -> Results:
    """The second of which takes four times as long, and is four times as bad."""
    results = comparison({"uniform": 1.0, "p2": 2.0}, 2)
    curves = []
    for curve in results.curves:
        times = 4 if curve.seed else 1
        points = [
            dataclasses.replace(
                point,
                seconds=times * point.seconds,
                values={"held_out_fid": times * point.values["held_out_fid"]},
            )
            for point in curve.points
        ]
        curves.append(dataclasses.replace(curve, points=tuple(points)))
    return dataclasses.replace(results, curves=tuple(curves))


@pytest.mark.parametrize("unit", ["images", "seconds"])
def test_quality_is_the_geometric_mean_of_the_seeds_in_a_band_of_one_deviation(
    unit, drawn, tmp_path
):
    results = of_two_seeds()
    draw_quality(results, unit, tmp_path)
    assert [*drawn] == ["uniform", "p2"]
    spread = math.exp(math.log(4) / math.sqrt(2))
    for curve in results.curves[::2]:  # those of the first seed
        images = [point.images for point in curve.points]
        seconds = [2 * point.seconds for point in curve.points]
        quality = 2 * np.array([point.values["held_out_fid"] for point in curve.points])
        found = drawn[curve.contestant]
        np.testing.assert_allclose(found["x"], seconds if unit == "seconds" else images)
        np.testing.assert_allclose(found["y"], quality)
        np.testing.assert_allclose(found["low"], quality / spread)
        np.testing.assert_allclose(found["high"], quality * spread)


def test_a_speed_up_is_drawn_with_its_interval_where_it_could_be_measured(drawn, tmp_path):
    results = comparison({"uniform": 1.0, "p2": 2.5}, 3)
    found = verdicts.against(results, "uniform")
    draw_speedups(results, "uniform", found.by_images, tmp_path)
    assert [*drawn] == ["p2"]
    levels = [point.values["held_out_fid"] for point in results.curves[0].points[1:]]
    np.testing.assert_allclose(drawn["p2"]["x"], levels)
    for name in ("y", "low", "high"):
        expected = [math.nan] + [2.5] * 18  # the first quality is there when first seen
        np.testing.assert_allclose(drawn["p2"][name], expected)


def test_denoising_errors_are_drawn_over_those_of_the_baseline_where_both_are_known(
    drawn, tmp_path
):
    results = comparison({"uniform": 1.0, "p2": 2.0}, 2)
    errors = {
        ("uniform", 0): {"2": 0.1, "-4": 0.5, "-2": 0.3},
        ("uniform", 1): {"2": 0.1, "-4": 0.5, "-2": 0.3},
        ("p2", 0): {"2": 0.4, "-4": 0.5, "-2": 0.3, "4": 1.0},
        ("p2", 1): {"2": 0.4, "-4": 0.5, "-2": 1.2, "4": 1.0},
    }
    curves = [
        dataclasses.replace(curve, denoising=errors[curve.contestant, curve.seed])
        for curve in results.curves
    ]
    draw_denoising(dataclasses.replace(results, curves=tuple(curves)), tmp_path)
    for name, ratios in (("uniform", [1, 1, 1]), ("p2", [1, 2, 4])):
        np.testing.assert_allclose(drawn[name]["x"], [-4, -2, 2])
        np.testing.assert_allclose(drawn[name]["y"], ratios)


def test_the_gaussian_s_line_is_drawn_where_it_does_not_squeeze_the_levels(tmp_path, monkeypatch):
    results = comparison({"uniform": 1.0, "p2": 2.5}, 3)
    levels = [point.values["held_out_fid"] for point in results.curves[0].points[1:]]
    found = verdicts.against(results, "uniform").by_images
    lines: list[float] = []
    monkeypatch.setattr(Axes, "axvline", lambda axes, x, **how: lines.append(x))
    for floor in (levels[0] * 10, levels[3], levels[-1] / 10):
        references = {GAUSSIAN: {"held_out_fid": floor}}
        draw_speedups(
            dataclasses.replace(results, references=references), "uniform", found, tmp_path
        )
    assert lines == [levels[3]]
