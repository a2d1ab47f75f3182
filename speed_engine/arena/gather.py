"""What finished runs recorded, as the curves of a comparison."""

import json
from collections.abc import Sequence
from pathlib import Path

from speed_engine.arena.final import FINAL_FILE
from speed_engine.arena.results import Curve, Point
from speed_engine.arena.runs import Run


def evaluations(run: Path) -> list[dict]:
    """Records of a run's evaluations in training, oldest first."""
    path = run / "metrics.jsonl"
    if not path.exists():
        return []
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [r for r in records if "extractor" in r and not r.get("evaluated")]


def best(run: Path, metric: str) -> float:
    """The metric that a run ended with."""
    return evaluations(run)[-1][metric]


def curve_of(contestant: str, seed: int, run: Run, out: Path, failure: str | None) -> Curve:
    """The record of a run, complete or not."""
    final = run.folder / FINAL_FILE
    measured = json.loads(final.read_text()) if final.exists() else {}
    points = [
        Point(
            images=record["images"],
            seconds=record["seconds"],
            values={k: v for k, v in record.items() if k.endswith(("fid", "kid", "copied_share"))},
        )
        for record in evaluations(run.folder)
    ]
    return Curve(
        contestant=contestant,
        seed=seed,
        run=str(run.folder.relative_to(out)),
        failure=failure,
        points=tuple(points),
        by_solver_steps=measured.get("by_solver_steps", {}),
        denoising=measured.get("denoising", {}),
        copied_share=points[-1].values.get("copied_share") if points else None,
    )


def extractor_of(runs: Sequence[Path]) -> str:
    """Name of the features that all runs were measured in; empty if none was measured.

    Raises:
        ValueError: there are several, whose figures cannot be compared.
    """
    names = {record["extractor"] for run in runs for record in evaluations(run)}
    if len(names) > 1:
        raise ValueError(
            "the runs were measured in different features, whose figures cannot be compared: "
            f"{', '.join(sorted(names))}."
        )
    return next(iter(names), "")
