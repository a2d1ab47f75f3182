"""What runs recorded, as the curves of a comparison."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from speed_engine.arena.final import FINAL_FILE
from speed_engine.arena.results import Curve, Point
from speed_engine.runtime.checks import UserError

KEPT = ("fid", "kid", "isc", "precision", "recall", "copied_share")  # with or without held_out_


def evaluations(run: Path) -> list[dict[str, Any]]:
    """Records of a run's evaluations in training, oldest first; half a line at the end is none."""
    path = run / "metrics.jsonl"
    if not path.exists():
        return []
    lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    records = [json.loads(line) for line in lines]
    return [r for r in records if "extractor" in r and not r.get("evaluated")]


def final_value(run: Path, metric: str) -> float:
    """The metric that a run ended with; infinite where it was not measured."""
    records = evaluations(run)
    return records[-1][metric] if records else math.inf


def curve_of(contestant: str, seed: int, run: Path, out: Path, failure: str | None) -> Curve:
    """The record of a run, complete or not."""
    final = run / FINAL_FILE
    measured = json.loads(final.read_text()) if final.exists() else {}
    points = tuple(
        Point(
            images=record["images"],
            seconds=record["seconds"],
            values={k: v for k, v in record.items() if k.removeprefix("held_out_") in KEPT},
        )
        for record in evaluations(run)
    )
    return Curve(
        contestant=contestant,
        seed=seed,
        run=str(run.relative_to(out)),
        failure=failure,
        points=points,
        by_solver_steps=measured.get("by_solver_steps", {}),
        denoising=measured.get("denoising", {}),
        copied_share=points[-1].values.get("copied_share") if points else None,
    )


def extractor_of(runs: Sequence[Path]) -> str:
    """Name of the features that all runs were measured in; empty if none was measured.

    Raises:
        UserError: there are several, whose figures cannot be compared.
    """
    names = {record["extractor"] for run in runs for record in evaluations(run)}
    if len(names) > 1:
        raise UserError(
            "the runs were measured in different features, whose figures cannot be compared: "
            f"{', '.join(sorted(names))}."
        )
    return next(iter(names), "")
