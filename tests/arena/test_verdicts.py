"""What a comparison calls decided, and what the headline may be about."""

import dataclasses

import pytest
from arena_curves import BUDGET, comparison

from speed_engine.arena import summary, verdicts
from speed_engine.arena.placebo import false_alarm_tests
from speed_engine.arena.report import write_report
from speed_engine.arena.results import BUDGET as SHARE
from speed_engine.arena.results import GAUSSIAN, REAL, SEED_OFFSET, Results, write_results
from speed_engine.arena.speedup import speed_up

END = 1000 * BUDGET**-0.6  # of the contestant with speed 1


def with_options(results: Results, **options: dict) -> Results:
    contestants = [
        dataclasses.replace(c, options=options.get(c.name, c.options)) for c in results.contestants
    ]
    return dataclasses.replace(results, contestants=tuple(contestants))


def with_references(results: Results, gaussian: float, real: float) -> Results:
    of = {GAUSSIAN: gaussian, REAL: real}
    references = {name: {"held_out_fid": value} for name, value in of.items()}
    return dataclasses.replace(results, references=references)


def with_loss(results: Results) -> Results:
    for curve in results.curves:
        for point in curve.points:
            point.values["validation_loss"] = point.values["held_out_fid"] ** 0.5
    return results


def test_levels_that_real_images_do_not_reach_decide_nothing():
    results = comparison({"uniform": 1.0, "p2": 2.0}, 3)
    levels = speed_up(results, "p2", "uniform").levels
    for share, why in ((0.4, None), (0.6, "training images' own value")):
        real = levels[round((1 - share) * len(levels))] * 1.001
        found = verdicts.against(with_references(results, 1e6, real), "uniform")
        assert (why is None) == (found.undecided == {})
        assert why is None or why in found.undecided["p2"]


def test_beyond_the_gaussian_ends_where_real_images_are():
    results = comparison({"uniform": 1.0, "p2": 2.0}, 3)
    levels = speed_up(results, "p2", "uniform").levels
    within = speed_up(with_references(results, levels[5], levels[9]), "p2", "uniform")
    assert within.beyond is not None and within.beyond.low == pytest.approx(2)
    none = speed_up(with_references(results, levels[5], levels[5]), "p2", "uniform")
    assert none.beyond is None


def test_a_baseline_that_is_no_better_than_a_gaussian_decides_nothing_by_its_loss_either():
    results = with_loss(comparison({"uniform": 1.0, "p2": 2.0}, 3))
    for floor, undecided in ((2 * END, set()), (END / 2, {"p2"})):
        found = verdicts.against_in_loss(with_references(results, floor, 0.0), "uniform")
        assert found is not None and set(found.undecided) == undecided


def test_runs_of_different_shares_are_compared_at_their_ends_only():
    results = comparison({"uniform": 1.0, "short": 3.0, "p2": 2.0}, 3)
    results = with_options(results, short={SHARE: 0.5})
    found = verdicts.against(results, "uniform")
    assert set(found.undecided) == {"short"} and "different shares" in found.undecided["short"]
    assert ", p2 has a speed-up of 2.00×" in summary.headline(results, found)
    same = with_options(results, short={SHARE: 0.5}, uniform={SHARE: 0.5}, p2={SHARE: 0.5})
    assert verdicts.against(same, "uniform").undecided == {}


def test_a_headline_is_of_no_twin_and_of_nothing_undecided_where_there_is_another():
    results = comparison({"uniform": 1.0, "p2": 2.0, "twin": 4.0}, 3)
    twin = {SEED_OFFSET: 9}
    found = verdicts.against(results, "uniform")
    assert ", twin has" in summary.headline(results, found)
    assert ", p2 has" in summary.headline(with_options(results, twin=twin), found)
    only = comparison({"uniform": 1.0, "twin": 4.0}, 3)
    found = verdicts.against(only, "uniform")
    assert ", twin has" in summary.headline(with_options(only, twin=twin), found)


def test_a_headline_prefers_what_is_decided():
    results = comparison({"uniform": 1.0, "limited": 4.0, "p2": 2.0}, 3)
    curves = [
        dataclasses.replace(c, by_solver_steps={"50": 0.4 * c.points[-1].values["held_out_fid"]})
        if c.contestant == "limited"
        else dataclasses.replace(c, by_solver_steps={})
        for c in results.curves
    ]
    results = dataclasses.replace(results, curves=tuple(curves))
    found = verdicts.against(results, "uniform")
    assert set(found.undecided) == {"limited"}
    assert ", p2 has" in summary.headline(results, found)


def test_a_report_begins_with_the_validation_loss_too(tmp_path):
    results = comparison({"uniform@flow": 1.0, "p2@flow": 2.0}, 3)
    write_results(results, tmp_path / "results.json")
    assert not any("By validation loss" in line for line in write_report(tmp_path))
    write_results(with_loss(results), tmp_path / "results.json")
    (said,) = [line for line in write_report(tmp_path) if line.startswith("By validation loss: ")]
    assert "Against uniform@flow, p2@flow has a speed-up of 2.00×" in said


def test_a_headline_says_where_learning_rates_follow_other_schedules():
    results = comparison({"uniform": 1.0, "p2": 2.0}, 3)
    found = verdicts.against(results, "uniform")
    falls = {"optimizer.schedule": "linear"}
    assert "learning rate" not in summary.headline(results, found)
    said = summary.headline(with_options(results, p2=falls), found)
    assert "The schedule of its learning rate is linear, that of uniform constant" in said
    both = with_options(results, p2=falls, uniform=falls)
    assert "learning rate" not in summary.headline(both, found)


def test_what_a_recipe_is_is_spelled_out():
    results = comparison({"uniform": 1.0, "flow_muon": 2.0, "p2@flow": 1.0}, 3)
    contestants = [
        dataclasses.replace(
            c, method="logit_normal", schedule="flow", prediction="velocity",
            options={"optimizer.name": "muon"},
        )
        if c.name == "flow_muon"
        else c
        for c in results.contestants
    ]  # fmt: skip
    results = dataclasses.replace(results, contestants=tuple(contestants))
    assert summary.spelled_in_words(results) == [
        "flow_muon is logit_normal@flow:velocity+optimizer.name=muon"
    ]


def twins(speed: float, noise: float = 0.01) -> Results:
    results = comparison({"uniform": 1.0, "twin": speed}, 5, noise)
    contestants = [
        dataclasses.replace(c, method="uniform", options={SEED_OFFSET: 9})
        if c.name == "twin"
        else c
        for c in results.contestants
    ]
    return dataclasses.replace(results, contestants=tuple(contestants))


def test_twins_are_compared_by_images_and_by_loss_in_the_median_and_at_the_end():
    assert len(false_alarm_tests(twins(1.0))) == 2
    said = false_alarm_tests(with_loss(twins(2.0)))
    assert len(said) == 4 and all("FAILED in the median over levels and to" in one for one in said)
    assert ["by validation loss" in one for one in said] == [False, False, True, True]


def test_twins_that_differ_at_their_ends_alone_fail_there():
    results = twins(1.0, noise=0.0)
    for curve in results.curves:
        if curve.contestant == "twin":
            curve.points[-1].values["held_out_fid"] *= 0.8
    for sentence in false_alarm_tests(results):
        assert "FAILED to the final quality: " in sentence


def test_a_baseline_whose_seeds_all_learn_from_far_apart_has_levels():
    results = comparison({"uniform": 1.0, "p2": 2.0}, 3)
    for curve in results.curves:
        end = curve.points[-1].values["held_out_fid"]
        curve.points[0].values["held_out_fid"] = end * (1.2, 1.4, 9.0)[curve.seed]
    assert speed_up(results, "p2", "uniform").seeds == (0, 1, 2)
    for curve in results.curves:
        if curve.seed == 0:  # and now one of them does not
            for point in curve.points[1:]:
                point.values["held_out_fid"] = curve.points[0].values["held_out_fid"]
    with pytest.raises(ValueError, match="did not measurably improve"):
        speed_up(results, "p2", "uniform")
