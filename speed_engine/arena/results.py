"""What a comparison measured: the one file that statistics and report read.

A contestant is a method with its process, target and options. Each contestant has one run per seed;
the runs of one seed share initial weights, order of data and noise, so that contestants are paired
by seed.

The headline metric is a lower-is-better distance to real images, a key of ``Point.values``.
"""

import dataclasses
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from speed_engine.evaluation import metrics
from speed_engine.runtime import strict
from speed_engine.runtime.files import write_durably

# Options of a contestant: its share of the images, and what is added to its seeds.
BUDGET = "budget"
SEED_OFFSET = "seed_offset"
GAUSSIAN = "Gaussian per class"  # among the references
REAL = "training images"


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """One competitor, as resolved."""

    name: str  # as it was asked for, such as logit_normal@flow; unique
    method: str
    schedule: str
    prediction: str
    options: dict[str, Any]  # what else differs from the comparison's configuration
    learning_rate: float
    tuning: dict[str, float] = field(default_factory=dict)  # learning rate: metric reached


@dataclass(frozen=True, kw_only=True)
class Point:
    """One evaluation in training."""

    images: int  # trained on so far
    seconds: float  # of training so far, evaluations left out
    values: dict[str, float]  # metric: value, as in metrics.jsonl


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One run: a contestant with a seed."""

    contestant: str  # its name
    seed: int
    run: str  # folder, relative to the comparison's
    failure: str | None = None  # why it is incomplete; None if it is complete
    points: tuple[Point, ...] = ()  # by ascending images
    # From the final model, empty where the run failed:
    by_solver_steps: dict[str, float] = field(default_factory=dict)  # "8": metric
    denoising: dict[str, float] = field(default_factory=dict)  # log-SNR: MSE of the clean image
    copied_share: float | None = None  # of generated images nearer to the training set than 95 % of
    # held-out images are; 0.05 is no copying


@dataclass(frozen=True, kw_only=True)
class Results:
    """A whole comparison."""

    metric: str  # that decides, such as held_out_fid
    extractor: str  # of every metric in the file
    budget_images: int  # of every run
    budget_seconds: float | None = field(default=None, kw_only=True)  # where this was the budget:
    # runs then train on as many images as they are expected to in that time
    contestants: tuple[Contestant, ...]  # in the order asked for
    seeds: tuple[int, ...]
    curves: tuple[Curve, ...]
    baselines: tuple[str, ...]  # contestants that speed-ups are given against
    config: dict[str, Any]  # what all runs share
    environment: dict[str, Any]  # versions, hardware
    command: str
    learning_rates: tuple[float, ...] = field(default=(), kw_only=True)  # the grid; empty: none
    # What needs no training -> metric: value; see floor.py.
    references: dict[str, dict[str, float]] = field(default_factory=dict, kw_only=True)

    @property
    def floor(self) -> float | None:
        """The metric of the Gaussian, beyond which there is more to learn than two moments; None
        where it isn't known.
        """
        return self.references.get(GAUSSIAN, {}).get(self.metric)

    @property
    def title(self) -> str:
        """Of the metric that decides, such as ``held-out FID (classifier features)``."""
        return metrics.title(self.metric, self.extractor)

    @property
    def data(self) -> str:
        """Name of the data set, such as ``digits``; of a folder of shards its own name."""
        source = str(self.config.get("data", {}).get("source", "unknown data"))
        return Path(source.rstrip("/")).name or source

    @property
    def solver_steps(self) -> int | None:
        """Of the evaluations' images; None if unknown."""
        return self.config.get("evaluation", {}).get("solver_steps")

    @property
    def shortened(self) -> bool:
        """Whether some contestants have a part of the budget only."""
        return any(BUDGET in contestant.options for contestant in self.contestants)

    @property
    def budget(self) -> str:
        """Of every run, in words."""
        if self.budget_seconds is not None:
            return f"{self.budget_seconds:,g} seconds each"
        return f"{'up to ' * self.shortened}{self.budget_images:,} images each"

    @property
    def tuned(self) -> bool:
        """Whether contestants chose their learning rates from a grid."""
        return bool(self.learning_rates) or any(
            len(contestant.tuning) > 1 for contestant in self.contestants
        )

    def at_grid_edge(self, contestant: Contestant) -> bool:
        """The best learning rate was the smallest or largest tried: a better one may lie beyond."""
        tried = self.learning_rates or [float(rate) for rate in contestant.tuning]
        ends = (min(tried), max(tried)) if len(tried) > 1 else ()
        return bool(contestant.tuning) and contestant.learning_rate in ends


def write_results(results: Results, path: Path) -> None:
    """As JSON; bytes of names that are no Unicode are written as their numbers."""
    text = json.dumps(dataclasses.asdict(results), indent=1, ensure_ascii=False) + "\n"
    text = re.sub("[\ud800-\udfff]", lambda found: f"\\\\u{ord(found[0]):x}", text)
    write_durably(path, text.encode())


def read_results(path: Path) -> Results:
    """Inverse of ``write_results``.

    Raises:
        OSError: it cannot be read.
        UserError: not such a file; names it and the field.
    """
    return strict.read_file(
        Results, path, "It holds no results of a comparison; run the same comparison again."
    )
