"""The false-alarm test of a comparison: a method against itself with other seeds.

Such a contestant (``+seed_offset=N``) must be neither faster nor slower than its twin, by images
and by the validation loss, in the median over levels and at the final quality. Where it is, what is
said there of others is no surer: seeds differ by more than the interval allows for, or, in seconds,
the machine was busy while some of the runs trained.
"""

import dataclasses
from typing import get_args

from speed_engine.arena.results import SEED_OFFSET, Contestant, Results
from speed_engine.arena.speedup import LOSS, Unit, complete_runs, speed_up
from speed_engine.arena.summary import interval_in_words, written


def false_alarm_tests(results: Results) -> list[str]:
    """A sentence for every such contestant, measure and unit; none if none took part."""
    by_loss = dataclasses.replace(results, metric=LOSS)
    return [
        _sentence(measured, placebo.name, twin, unit)
        for placebo in results.contestants
        if (twin := _twin(results, placebo)) is not None
        for measured in (results, by_loss)
        if measured is results or all(complete_runs(by_loss, of) for of in (placebo.name, twin))
        for unit in get_args(Unit)
    ]


def _twin(results: Results, placebo: Contestant) -> str | None:
    """Name of the contestant that differs in its seeds alone; None for others."""
    if SEED_OFFSET not in placebo.options:
        return None
    options = {name: value for name, value in placebo.options.items() if name != SEED_OFFSET}
    unlike = {"name": "", "learning_rate": 0.0, "tuning": {}}
    wanted = dataclasses.replace(placebo, options=options, **unlike)
    found = (c.name for c in results.contestants if dataclasses.replace(c, **unlike) == wanted)
    return next(found, None)


def _sentence(results: Results, placebo: str, twin: str, unit: Unit) -> str:
    by = ", by validation loss" * (results.metric == LOSS)
    title = f"False-alarm test in {unit}{by}: {placebo} against {twin}"
    try:
        found = speed_up(results, placebo, twin, unit)
    except ValueError as obstacle:
        return f"{title} could not be made: {obstacle}"
    said = {"in the median over levels": found.median, "to the final quality": found.final}
    parts = [f"{written(one)} {where}{interval_in_words(one)}" for where, one in said.items()]
    sentence = f"{title}: {', '.join(parts)}."
    if found.median.interval is None:
        return sentence
    wrong = [where for where, one in said.items() if one.faster or one.slower]
    if wrong:
        return (
            f"{sentence} FAILED {' and '.join(wrong)}: they are the same, so believe no speed-up "
            f"in {unit} there."
        )
    return f"{sentence} Passed."
