"""Which learning rate of a grid each contestant takes.

Runs of one rate differ by chance as much as neighbouring rates do. A contestant whose rate was
chosen by a few runs of their own can be unlucky, and then looks slower than it is. So a single run
only rules rates out, and those that are left run with every seed that counts.
"""

import math
from collections.abc import Mapping, Sequence
from statistics import geometric_mean

NEARLY_AS_GOOD = 1.5  # times the best: chance alone hardly makes two runs differ by more


def contenders(reached: Mapping[float, float]) -> list[float]:
    """The rates that may be the best.

    Args:
        reached: what one run with each rate reached, lower is better; infinite if it failed. Where
            all did, the first is left.
    """
    limit = NEARLY_AS_GOOD * min(reached.values())
    if math.isinf(limit):
        return [next(iter(reached))]
    return [rate for rate, value in reached.items() if value <= limit]


def best(reached: Mapping[float, Sequence[float]]) -> float:
    """The rate with the lowest geometric mean.

    Args:
        reached: what the runs of all seeds reached with each rate; a failure rules a rate out while
            there are others.
    """
    return min(reached, key=lambda rate: geometric_mean(reached[rate]))
