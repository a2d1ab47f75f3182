"""States of runs, for tests of checkpoints."""

from speed_engine.runtime.records import Sums
from speed_engine.training.checkpoint import State


def at(step: int) -> State:
    """Of a run that has made so many steps, all in an interval that has just begun."""
    sums = Sums((0.0, 0.0, 0.0), 0.0)
    return State(step, sums, bad_samples=0, skipped=(0.0, 0.0, 0.0), seconds=0.0, data="")
