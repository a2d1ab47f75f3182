"""A comparison of methods at equal budget: its plan, its runs, and what came of them.

OUT/compare.json                   the conditions
OUT/references.json                what the metrics say of images that no network made
OUT/paces/CONTESTANT               short runs, see rehearsal.py
OUT/tuning/CONTESTANT/lr-X/seed-S  a run per learning rate, with a seed that does not count
OUT/runs/CONTESTANT/lr-X/seed-S    the runs that count; each folder is one of ``speed-engine train``
OUT/results.json                   see results.py

Contestants are paired by seed: runs of one seed have the same initial weights, order of data, noise
and generated images. Called again, a comparison goes on where it stopped; contestants and seeds may
be added to it. One that is interrupted reports what is complete.
"""

import json
import math
import os
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import torch
from rich.console import Console

from speed_engine.arena.contestants import BASELINES, expand, identity, options, resolve
from speed_engine.arena.final import measure_final
from speed_engine.arena.floor import measure_references
from speed_engine.arena.gather import curve_of, extractor_of, final_value
from speed_engine.arena.planned import FINAL_FILE, Run, failure, is_complete
from speed_engine.arena.recipes import read_contestant
from speed_engine.arena.rehearsal import (
    compiled_as_chosen,
    in_time,
    rehearsal,
    seconds_per_step,
)
from speed_engine.arena.report import PAGE, REPORT, check_libraries, write_report
from speed_engine.arena.request import CompareCommand, within_budget
from speed_engine.arena.results import BUDGET, Contestant, Results, write_results
from speed_engine.arena.runs import execute
from speed_engine.arena.tuning import best, contenders
from speed_engine.config import TrainConfig, from_json, to_json
from speed_engine.runtime import strict
from speed_engine.runtime.checks import UserError
from speed_engine.runtime.environment import describe
from speed_engine.runtime.files import write_durably
from speed_engine.runtime.locks import held

TUNING_SEED = 1000  # added to the first seed: far from those that are reported
PLAN_FILE = "compare.json"
REFERENCES_FILE = "references.json"
RESULTS_FILE = "results.json"
PACES, TUNING, RUNS = "paces", "tuning", "runs"
WRITTEN = (PACES, TUNING, RUNS, REFERENCES_FILE, RESULTS_FILE, *REPORT)


def compare(command: CompareCommand, console: Console, called: str) -> Path:
    """Run what is missing of a comparison, write its report, and return its folder.

    Args:
        command: what is compared.
        console: for one line per run.
        called: the command or call that does this again, for the report.

    Raises:
        UserError: what does not fit, or a library of the extra ``plots`` is missing.
        KeyboardInterrupt: after the runs under way have written a checkpoint, and the report of
            those that are complete is written.
    """
    check_libraries()
    plan = Plan(
        config=within_budget(command),
        contestants=command.contestants,
        seeds=command.seeds,
        learning_rates=command.learning_rates,
        solver_steps=command.final_solver_steps,
        budget_seconds=command.budget_seconds,
        called=called,
    )
    out = command.out or Path("comparisons") / command.preset
    slots, threads = _slots(command)
    comparison = Comparison(plan, out, slots, threads, console)
    with held(out, "filled"):
        try:
            comparison.run()
        except KeyboardInterrupt:
            if (out / RESULTS_FILE).exists():
                _report(out, console)
            raise
        _report(out, console)
    return out


def _report(out: Path, console: Console) -> None:
    for line in (*write_report(out), f"report    {out / PAGE}"):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is compared.

    Attributes:
        config: what all runs share.
        contestants: names, see contestants.py; the sets ``all`` and ``ablation`` are allowed.
        seeds: how many, from the configuration's on.
        learning_rates: grid that each contestant's is chosen from; empty keeps the configured one.
        solver_steps: the final models are also measured with so many.
        budget_seconds: of training, in place of the configured steps; the number of evaluations
            stays.
        called: the command or call that compares, for the report.
    """

    config: TrainConfig
    contestants: tuple[str, ...]
    seeds: int
    learning_rates: tuple[float, ...] = ()
    solver_steps: tuple[int, ...] = ()
    budget_seconds: float | None = None
    called: str = ""

    @property
    def metric(self) -> str:
        """The one that decides; lower is better."""
        parts = self.config.data.holds_out and self.config.evaluation.reference is None
        return "held_out_fid" if parts else "fid"

    @property
    def reported_seeds(self) -> tuple[int, ...]:
        """Those of the runs that count."""
        return tuple(range(self.config.seed, self.config.seed + self.seeds))


class Comparison:
    """A plan in a folder.

    Args:
        plan: what is compared.
        out: the folder.
        slots: runs at a time.
        threads: of each on the CPU.
        console: for one line per run.

    Raises:
        UserError: a contestant is not known, or the folder holds another comparison.
    """

    def __init__(self, plan: Plan, out: Path, slots: int, threads: int, console: Console) -> None:
        self.plan, self.out = plan, out
        self.slots, self.threads, self.console = slots, threads, console
        names = expand(plan.contestants, plan.config, bool(plan.learning_rates))
        self.configs = {name: resolve(name, plan.config) for name in names}
        self.spellings = {name: self._spellings(name) for name in names}
        shares = [name for name in names if BUDGET in options(name)]
        if shares and plan.budget_seconds is not None:
            raise UserError(
                f"methods={', '.join(shares)}: a share of the budget is one of images; leave "
                f"{BUDGET} or --budget-seconds out."
            )
        self._keep_plan()

    def run(self) -> Results:
        """Run what is missing, and record what came of all, even if it is interrupted."""
        references = self._references()
        self._rehearse()
        screened = self._screened()
        runs = self._counting_runs({name: contenders(of) for name, of in screened.items()})
        try:
            self._execute("runs", list(runs.values()), self._metric)
        finally:
            contestants = [self._contestant(name, screened[name], runs) for name in self.configs]
            results = self._results(contestants, runs, references)
            write_results(results, self.out / RESULTS_FILE)
        return results

    def _references(self) -> dict[str, dict[str, float]]:
        """Measured once: the conditions that they depend on are those of the folder."""
        path = self.out / REFERENCES_FILE
        if not path.exists():
            measured = measure_references(self.plan.config)
            write_durably(path, (json.dumps(measured, indent=1) + "\n").encode())
        remedy = "Delete it and run the same comparison again, which measures them anew."
        return strict.read_file(dict[str, dict[str, float]], path, remedy)

    def _rehearse(self) -> None:
        """Where runs compile, or where they are to last as long as each other."""
        chosen = {name: compiled_as_chosen(config) for name, config in self.configs.items()}
        seconds = self.plan.budget_seconds
        if seconds is None and all(config.compile == "off" for config in chosen.values()):
            return
        rehearsals = {
            name: rehearsal(config, self._folder(PACES, name)) for name, config in chosen.items()
        }
        what = "short runs, which compile what the others use"
        self._execute(what, list(rehearsals.values()), _pace)
        if seconds is not None:
            self.configs = in_time(chosen, rehearsals, seconds)

    def _screened(self) -> dict[str, dict[float, float]]:
        """By contestant, what one run with each of its learning rates reaches; where there is only
        one, nothing is run.
        """
        seed = self.plan.config.seed + TUNING_SEED
        runs = {
            (name, rate): Run(
                config=self._tuning_config(name, rate),
                folder=self._run_folder(TUNING, name, rate, seed),
            )
            for name in self.configs
            for rate in self._rates(name)
            if len(self._rates(name)) > 1
        }
        if runs:
            self._execute("runs to rule learning rates out", list(runs.values()), self._metric)
        return {
            name: {
                rate: self._reached(runs[name, rate]) if (name, rate) in runs else math.inf
                for rate in self._rates(name)
            }
            for name in self.configs
        }

    def _rates(self, name: str) -> tuple[float, ...]:
        """The grid, unless the contestant's name has its own."""
        if self.plan.learning_rates and "optimizer.learning_rate" not in options(name):
            return self.plan.learning_rates
        return (self.configs[name].optimizer.learning_rate,)

    def _counting_runs(self, rates: dict[str, list[float]]) -> dict[tuple[str, float, int], Run]:
        """By name, rate and seed; seed by seed, so that one cut short has whole seeds."""
        plan = self.plan
        finish = partial(measure_final, solver_steps=plan.solver_steps, metric=plan.metric)
        return {
            (name, rate, seed): Run(
                config=_with_rate(self.configs[name], rate, seed - plan.config.seed),
                folder=self._run_folder(RUNS, name, rate, seed),
                finish=finish,
                outcome=FINAL_FILE,
            )
            for seed in plan.reported_seeds
            for name in self.configs
            for rate in rates[name]
        }

    def _contestant(
        self, name: str, screened: dict[float, float], runs: dict[tuple[str, float, int], Run]
    ) -> Contestant:
        """With the best of its rates."""
        config = self.configs[name]
        reached: dict[float, list[float]] = {}
        for (of, rate, _), run in runs.items():
            if of == name:
                reached.setdefault(rate, []).append(self._reached(run))
        tuning = screened | {rate: geometric_mean(values) for rate, values in reached.items()}
        if len(tuning) == 1:
            tuning = {}
        return Contestant(
            name=name,
            method=read_contestant(name).method,
            schedule=config.schedule,
            prediction=str(config.prediction),
            options=options(name),
            learning_rate=best(reached),
            tuning={f"{rate:g}": value for rate, value in tuning.items() if math.isfinite(value)},
        )

    def _results(
        self,
        contestants: Sequence[Contestant],
        runs: dict[tuple[str, float, int], Run],
        references: dict[str, dict[str, float]],
    ) -> Results:
        plan = self.plan
        chosen = {contestant.name: contestant.learning_rate for contestant in contestants}
        where = {"slots": self.slots, "threads": self.threads}
        tuned = bool(plan.learning_rates)
        wanted = [identity(name, plan.config, tuned) for name in BASELINES]
        known = {identity(c.name, plan.config, tuned): c.name for c in contestants}
        return Results(
            metric=plan.metric,
            extractor=extractor_of([run.folder for run in runs.values()]),
            budget_images=plan.config.steps * plan.config.batch_size,
            budget_seconds=plan.budget_seconds,
            contestants=tuple(contestants),
            seeds=plan.reported_seeds,
            curves=tuple(
                curve_of(name, seed, run.folder, self.out, self._why_failed(run))
                for (name, rate, seed), run in runs.items()
                if rate == chosen[name]
            ),
            baselines=tuple(dict.fromkeys(known[config] for config in wanted)),
            config=json.loads(to_json(plan.config)),
            environment=describe([]) | where,
            command=plan.called,
            learning_rates=plan.learning_rates,
            references=references,
        )

    def _execute(self, what: str, runs: Sequence[Run], said: Callable[[Run], str]) -> None:
        self._say(f"{len(runs)} {what}")
        ended = 0

        def tell(run: Run, complete: bool) -> None:
            nonlocal ended
            ended += 1
            of = run.folder.relative_to(self.out)
            outcome = said(run) if complete else f"FAILED: {failure(run)}"
            self._say(f"{ended}/{len(runs)}  {of}  {outcome}")

        execute(runs, self.slots, self.threads, tell)

    def _metric(self, run: Run) -> str:
        return f"{self.plan.metric} {self._reached(run):.3f}"

    def _reached(self, run: Run) -> float:
        """The metric at the end of a run; infinite if it failed."""
        return final_value(run.folder, self.plan.metric) if is_complete(run) else math.inf

    def _why_failed(self, run: Run) -> str | None:
        return None if is_complete(run) else failure(run)

    def _tuning_config(self, name: str, rate: float) -> TrainConfig:
        """One evaluation, at the end."""
        config = _with_rate(self.configs[name], rate, TUNING_SEED)
        return replace(config, evaluation=replace(config.evaluation, every=config.steps))

    def _run_folder(self, kind: str, name: str, rate: float, seed: int) -> Path:
        """With the rate: if another is chosen later, its runs are others."""
        return self._folder(kind, name) / f"lr-{rate:g}" / f"seed-{seed}"

    def _folder(self, kind: str, name: str) -> Path:
        """Of a contestant, without characters that shells and URLs give a meaning; of one that was
        a baseline by another name before it was asked for, what is there.
        """
        folders = [
            self.out / kind / re.sub("[:+/]", "-", spelling.replace("@", "-on-"))
            for spelling in self.spellings[name]
        ]
        return next((folder for folder in folders if folder.exists()), folders[0])

    def _spellings(self, name: str) -> list[str]:
        """The name, and those that it has as a baseline."""
        base, tuned = self.plan.config, bool(self.plan.learning_rates)
        config = self.configs[name]
        others = [*BASELINES, f"uniform@{config.schedule}:{config.prediction}"]
        same = identity(name, base, tuned)
        return [name, *(of for of in others if identity(of, base, tuned) == same)]

    def _keep_plan(self) -> None:
        """Record the conditions; those of a comparison that is continued must be the same."""
        plan, path = self.plan, self.out / PLAN_FILE
        now = {
            "config": json.loads(to_json(plan.config)),
            "learning_rates": list(plan.learning_rates),
            "solver_steps": list(plan.solver_steps),
            "budget_seconds": plan.budget_seconds,
        }
        there = [name for name in WRITTEN if (self.out / name).exists()]
        if there and not path.exists():
            raise UserError(
                f"{self.out} holds {', '.join(there)} of something else than a comparison, which "
                "would be replaced; name another folder with --out."
            )
        if not any((self.out / name).exists() for name in (TUNING, RUNS, RESULTS_FILE)):
            self.out.mkdir(parents=True, exist_ok=True)
            text = (json.dumps(now, indent=2) + "\n").encode()
            if not path.exists() or path.read_bytes() != text:
                (self.out / REFERENCES_FILE).unlink(missing_ok=True)
                shutil.rmtree(self.out / PACES, ignore_errors=True)
                write_durably(path, text)
            return
        before = strict.read_file(dict[str, Any], path, "Name another folder with --out.")
        try:  # read and written again it is as this version writes it
            config = from_json(json.dumps(before.get("config")))
        except UserError as error:
            raise UserError(f"{path}: {error} Name another folder with --out.") from error
        before["config"] = json.loads(to_json(config))
        if differing := _differences(before, now):
            raise UserError(
                f"{self.out} holds a comparison under other conditions: {'; '.join(differing)}. "
                "Only methods and seeds can be added to it; name another folder with --out."
            )

    def _say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)


def _pace(rehearsed: Run) -> str:
    return f"{1e3 * seconds_per_step(rehearsed.folder):.3g} ms a step"


def _with_rate(config: TrainConfig, rate: float, later: int) -> TrainConfig:
    """With a learning rate, and a seed so much later than the contestant's first."""
    optimizer = replace(config.optimizer, learning_rate=rate)
    return replace(config, seed=config.seed + later, optimizer=optimizer)


def _differences(before: object, now: object, where: str = "") -> list[str]:
    """Values that are not the same, by their path."""
    if isinstance(before, dict) and isinstance(now, dict):
        return [
            text
            for key in sorted({*before, *now})
            for text in _differences(before.get(key), now.get(key), f"{where}.{key}".strip("."))
        ]
    return [] if before == now else [f"{where} was {before}, is {now}"]


def _slots(command: CompareCommand) -> tuple[int, int]:
    """(runs at a time, CPU threads of each)."""
    cores = len(os.sched_getaffinity(0))
    gpus = torch.cuda.device_count() if command.config.device != "cpu" else 0
    slots = command.slots or gpus or cores
    return slots, max(1, cores // slots)
