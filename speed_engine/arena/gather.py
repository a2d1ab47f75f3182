"""What runs recorded, as the curves of a comparison."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from speed_engine.arena.planned import FINAL_FILE
from speed_engine.arena.results import Curve, Point
from speed_engine.evaluation.metrics import is_figure
from speed_engine.runtime import strict
from speed_engine.runtime.checks import UserError
from speed_engine.runtime.records import read_records


def evaluations(run: Path) -> list[dict[str, Any]]:
    """Records of a run's evaluations in training, oldest first."""
    return [r for r in read_records(run) if "extractor" in r and not r.get("evaluated")]


def final_value(run: Path, metric: str) -> float:
    """The metric that a run ended with; infinite where it was not measured."""
    value = records[-1][metric] if (records := evaluations(run)) else None
    return math.inf if value is None else value


@dataclass(frozen=True, kw_only=True)
class _Final:
    """What ``final.measure_final`` wrote."""

    by_solver_steps: dict[str, float] = field(default_factory=dict)
    denoising: dict[str, float] = field(default_factory=dict)


def curve_of(contestant: str, seed: int, run: Path, out: Path, failure: str | None) -> Curve:
    """The record of a run, complete or not."""
    final = run / FINAL_FILE
    remedy = "Delete it and run the same comparison again, which measures the model anew."
    measured = strict.read_file(_Final, final, remedy) if final.exists() else _Final()
    points = tuple(
        Point(
            images=record["images"],
            seconds=record["seconds"],
            values={k: v for k, v in record.items() if is_figure(k) and v is not None},
        )
        for record in evaluations(run)
    )
    return Curve(
        contestant=contestant,
        seed=seed,
        run=str(run.relative_to(out)),
        failure=failure,
        points=points,
        by_solver_steps=measured.by_solver_steps,
        denoising=measured.denoising,
        copied_share=points[-1].values.get("copied_share") if points else None,
    )


def extractor_of(runs: Sequence[Path]) -> str:
    """Name of the features that all runs were measured in; empty if none was measured.

    Raises:
        UserError: there are several, whose metrics cannot be compared.
    """
    names = {record["extractor"] for run in runs for record in evaluations(run)}
    if len(names) > 1:
        raise UserError(
            "the runs were measured in different features, whose metrics cannot be compared: "
            f"{', '.join(sorted(names))}."
        )
    return next(iter(names), "")
