"""A comparison of methods at equal budget: its plan, its runs, and what came of them.

OUT/compare.json            the plan
OUT/tuning/CONTESTANT/lr-X  a run per learning rate, with a seed that is not reported
OUT/runs/CONTESTANT/seed-S  the runs that count; each folder is one of ``speed-engine train``
OUT/results.json            see results.py
OUT/report.md, report.html, figures/

Contestants are paired by seed: runs of one seed have the same initial weights, order of data, noise
and images drawn. Called again, a comparison goes on where it stopped; contestants and seeds may be
added to it.
"""

import json
import math
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from rich.console import Console

from speed_engine import environment
from speed_engine.arena.contestants import BASELINES, expand, options, resolve
from speed_engine.arena.final import FINAL_FILE, measure_final
from speed_engine.arena.gather import best, curve_of, extractor_of
from speed_engine.arena.results import Contestant, Results, write_results
from speed_engine.arena.runs import Run, execute, failure, is_complete
from speed_engine.config import TrainConfig, to_json
from speed_engine.durable import write_durably

TUNING_SEED = 1000  # above the run's; seeds that are reported lie below
PLAN_FILE = "compare.json"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is compared.

    Attributes:
        config: what all runs share.
        contestants: their names, see contestants.py; the sets ``all`` and ``ablation`` are allowed.
        seeds: how many, from the configuration's on.
        learning_rates: grid that every contestant's is chosen from; empty keeps the configured one.
        solver_steps: also measured with so many, once, of the final models.
    """

    config: TrainConfig
    contestants: tuple[str, ...]
    seeds: int
    learning_rates: tuple[float, ...]
    solver_steps: tuple[int, ...]

    @property
    def metric(self) -> str:
        """The one that decides."""
        return "held_out_fid" if self.config.data.held_out else "fid"


def compare(plan: Plan, out: Path, slots: int, threads: int, console: Console) -> Results:
    """Run what is missing of a comparison and write its report.

    Args:
        plan: what is compared.
        out: folder of the comparison.
        slots: runs at a time.
        threads: of each on the CPU.
        console: for one line per run.

    Raises:
        ValueError: a contestant is not known, or the folder holds another comparison.
    """
    names = expand(plan.contestants, plan.config)
    _keep_plan(plan, out)
    tell = _Teller(console, plan.metric)
    tuned = _tune(plan, names, out, partial(execute, slots=slots, threads=threads), tell)
    runs = {
        (contestant.name, seed): Run(
            config=_seeded(_config(plan, contestant), seed),
            folder=out / "runs" / _folder(contestant.name) / f"seed-{seed}",
            finish=partial(measure_final, solver_steps=plan.solver_steps, metric=plan.metric),
            outcome=FINAL_FILE,
        )
        # Seed by seed, so that an interrupted comparison has whole seeds.
        for seed in _seeds(plan)
        for contestant in tuned
    }
    tell.begin("runs", len(runs))
    execute(list(runs.values()), slots, threads, tell)
    results = Results(
        metric=plan.metric,
        extractor=extractor_of([run.folder for run in runs.values() if is_complete(run)]),
        budget_images=plan.config.steps * plan.config.batch_size,
        contestants=tuple(tuned),
        seeds=_seeds(plan),
        curves=tuple(
            curve_of(name, seed, run, out, None if is_complete(run) else failure(run))
            for (name, seed), run in runs.items()
        ),
        baselines=tuple(dict.fromkeys(_known_as(name, tuned, plan) for name in BASELINES)),
        config=json.loads(to_json(plan.config)),
        environment=environment.describe([]) | {"slots": slots, "threads": threads},
        command=shlex.join(["speed-engine", *sys.argv[1:]]),
    )
    write_results(results, out / "results.json")
    return results


def _tune(
    plan: Plan,
    names: Sequence[str],
    out: Path,
    execute: Callable[..., None],
    tell: "_Teller",
) -> list[Contestant]:
    """The contestants with their learning rates: of the grid, the best one for a single run."""
    runs = {
        (name, rate): Run(
            config=_tuning_config(plan, name, rate),
            folder=out / "tuning" / _folder(name) / f"lr-{rate:g}",
        )
        for name in names
        for rate in plan.learning_rates
        if "optimizer.learning_rate" not in options(name)
    }
    if runs:
        tell.begin("runs to choose learning rates", len(runs))
        execute(list(runs.values()), done=tell)
    tuned = []
    for name in names:
        config = resolve(name, plan.config)
        tried = {
            rate: best(run.folder, plan.metric) if is_complete(run) else math.inf
            for (of, rate), run in runs.items()
            if of == name
        }
        rate = min(tried, key=tried.__getitem__) if tried else config.optimizer.learning_rate
        tuned.append(
            Contestant(
                name=name,
                method=config.method,
                schedule=config.schedule,
                prediction=str(config.prediction),
                options=options(name),
                learning_rate=rate,
                tuning={f"{rate:g}": value for rate, value in tried.items()},
            )
        )
    return tuned


def _tuning_config(plan: Plan, name: str, rate: float) -> TrainConfig:
    """One evaluation, at the end."""
    config = _seeded(resolve(name, plan.config), plan.config.seed + TUNING_SEED)
    return replace(
        config,
        optimizer=replace(config.optimizer, learning_rate=rate),
        evaluation=replace(config.evaluation, every=config.steps),
    )


def _config(plan: Plan, contestant: Contestant) -> TrainConfig:
    config = resolve(contestant.name, plan.config)
    return replace(
        config, optimizer=replace(config.optimizer, learning_rate=contestant.learning_rate)
    )


def _seeded(config: TrainConfig, seed: int) -> TrainConfig:
    return replace(config, seed=seed)


def _seeds(plan: Plan) -> tuple[int, ...]:
    return tuple(range(plan.config.seed, plan.config.seed + plan.seeds))


def _known_as(baseline: str, contestants: Sequence[Contestant], plan: Plan) -> str:
    """The name under which a baseline takes part."""
    wanted = resolve(baseline, plan.config)
    return next(c.name for c in contestants if resolve(c.name, plan.config) == wanted)


def _folder(name: str) -> str:
    """A contestant's name as one of a folder, without what shells and URLs give a meaning."""
    return name.replace("@", "-on-").replace(":", "-").replace("+", "-")


def _keep_plan(plan: Plan, out: Path) -> None:
    """Record the plan; only contestants and seeds may differ from one recorded before."""
    path = out / PLAN_FILE
    fixed = {
        "config": json.loads(to_json(plan.config)),
        "learning_rates": list(plan.learning_rates),
        "solver_steps": list(plan.solver_steps),
    }
    if path.exists():
        before = json.loads(path.read_text())
        differing = _differences(before, fixed)
        if differing:
            raise ValueError(
                f"{out} holds a comparison under other conditions ({'; '.join(differing)}); "
                "only contestants and seeds can be added to it. Name another folder with --out."
            )
        return
    out.mkdir(parents=True, exist_ok=True)
    write_durably(path, (json.dumps(fixed, indent=2) + "\n").encode())


def _differences(before: object, now: object, where: str = "") -> list[str]:
    """Values that are not the same, by their path."""
    if isinstance(before, dict) and isinstance(now, dict):
        return [
            text
            for key in sorted({*before, *now})
            for text in _differences(before.get(key), now.get(key), f"{where}.{key}".strip("."))
        ]
    return [] if before == now else [f"{where} was {before}, is {now}"]


class _Teller:
    """Prints one line per run that ended."""

    def __init__(self, console: Console, metric: str) -> None:
        self._console, self._metric = console, metric

    def begin(self, what: str, total: int) -> None:
        self._done, self._total = 0, total
        self._say(f"{total} {what}")

    def __call__(self, run: Run, complete: bool) -> None:
        self._done += 1
        name = f"{run.folder.parent.name} {run.folder.name}"
        outcome = (
            f"{self._metric} {best(run.folder, self._metric):.3f}"
            if complete
            else f"FAILED: {failure(run)}"
        )
        self._say(f"{self._done}/{self._total}  {name}  {outcome}")

    def _say(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)
