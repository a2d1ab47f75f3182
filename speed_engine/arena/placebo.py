"""The false-alarm test of a comparison: a method against itself with other seeds.

Such a contestant (``+seed_offset=N``) must be neither faster nor slower than its twin. If it is,
the unit in which it is, images or seconds, was not measured fairly: a machine that was busy while
some of the runs trained shows in seconds.
"""

import dataclasses
from typing import get_args

from speed_engine.arena.results import SEED_OFFSET, Contestant, Results
from speed_engine.arena.speedup import Unit, speed_up
from speed_engine.arena.summary import interval_in_words, written


def false_alarm_tests(results: Results) -> list[str]:
    """A sentence for every such contestant and unit; none if none took part."""
    return [
        _sentence(results, placebo.name, twin, unit)
        for placebo in results.contestants
        if (twin := _twin(results, placebo)) is not None
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
    title = f"False-alarm test in {unit}: {placebo} against {twin}"
    try:
        ratio = speed_up(results, placebo, twin, unit).median
    except ValueError as obstacle:
        return f"{title} could not be made: {obstacle}"
    said = f"{title}: {written(ratio)} in the median over levels{interval_in_words(ratio)}."
    if ratio.interval is None:
        return said
    if ratio.faster or ratio.slower:
        return f"{said} FAILED: they are the same, so believe no speed-up in {unit} here."
    return f"{said} Passed."
