"""What a comparison says in words and tables, each number with what is known of its error."""

import math
import statistics
from collections.abc import Container
from dataclasses import dataclass

from speed_engine.arena.bootstrap import LEAST_SEEDS
from speed_engine.arena.results import BUDGET, REAL, SEED_OFFSET, Contestant, Results
from speed_engine.arena.speedup import Ratio, SpeedUp, complete_runs, why_unusable
from speed_engine.arena.verdicts import Against, beats_gaussian, last_value, limited_by_solver
from speed_engine.evaluation.metrics import FIGURES, HELD_OUT, is_figure, title

# Where the headline measures against a baseline (method, process); against others at its final
# quality. A flow is soon near its end, where a small gain takes many images: its levels say more.
MEASURED_AT = {("logit_normal", "flow"): "median"}
WHERE = {"final": "to its final quality", "median": "in the median over levels of quality"}
GOT = {"final": "to its final quality", "median": "to half of its levels of quality"}


@dataclass(frozen=True)
class Table:
    """Header and rows of text; the first column names the row."""

    header: list[str]
    rows: list[list[str]]


def solver_in_words(results: Results) -> list[str]:
    """Of each contestant, whether the evaluations had too few solver steps for its images."""
    return [
        f"{name} ends at {_number(last)} with the {results.solver_steps} solver steps of the "
        f"evaluations, and at {_number(more)} with {steps}: its curve is that of the solver, and "
        "what is measured with it is undecided. Compare with another --evaluation.solver, or more "
        "--evaluation.solver-steps."
        for name, (last, steps, more) in limited_by_solver(results).items()
    ]


def headline(results: Results, found: Against, method: str | None = None) -> str:
    """One sentence on the fastest contestant against a baseline.

    Args:
        results: of the comparison.
        found: against the baseline.
        method: the contestants of this method only, where one of them was measured.
    """
    baseline = next(c for c in results.contestants if c.name == found.baseline)
    where = MEASURED_AT.get((baseline.method, baseline.schedule), "final")
    if not found.by_images:
        reasons = sorted(set(found.missing.values()))
        return f"Against {found.baseline} nothing could be measured. {' '.join(reasons)}".rstrip()
    of_method = [c.name for c in results.contestants if c.method == method]
    pool = [name for name in of_method if name in found.by_images] or [*found.by_images]
    aside = {c.name for c in results.contestants if c.options.keys() & {SEED_OFFSET, BUDGET}}
    for unfit in (aside, found.undecided):
        pool = [name for name in pool if name not in unfit] or pool
    best = max(pool, key=lambda name: _certain(_at(found.by_images[name], where)))
    ratio = _at(found.by_images[best], where)
    chosen, verdict = _caution(len(pool), ratio), _verdict(ratio)
    if best in found.undecided:
        chosen, verdict = "", f"That decides nothing: {found.undecided[best]}"
    verdict += _of_schedule(results, best, found.baseline)
    if ratio.low == 0:
        return (
            f"Against {found.baseline}, {best} never got {GOT[where]}: {written(ratio)}"
            f"{interval_in_words(ratio)}. {verdict}{chosen}"
        )
    return (
        f"Against {found.baseline}, {best} has a speed-up of {written(ratio)} in images "
        f"{WHERE[where]}{interval_in_words(ratio)}. {verdict}{chosen}"
    )


def _of_schedule(results: Results, name: str, baseline: str) -> str:
    """What a difference between the schedules of learning rates means; nothing if there is none."""
    common = results.config.get("optimizer", {}).get("schedule", "constant")
    rates = {c.name: c.options.get("optimizer.schedule", common) for c in results.contestants}
    if rates[name] == rates[baseline]:
        return ""
    return (
        f" The schedule of its learning rate is {rates[name]}, that of {baseline} "
        f"{rates[baseline]}: a part of the difference may be of that."
    )


def floor_in_words(results: Results) -> list[str]:
    """Of each baseline, whether it has learned more than mean and covariance, and whether the
    metric still tells its images from real ones; none if unknown.
    """
    if results.floor is None:
        return []
    sentences = []
    for name in results.baselines:
        runs = complete_runs(results, name).values()
        if not runs:
            continue
        ends = [last_value(run, results.metric) for run in runs]
        verdict = (
            "so it has learned more than first and second moments."
            if beats_gaussian(results, name)
            else "so speed-ups over it are undecided: they may be of learning two moments only."
        )
        sentences.append(
            f"{name} ends at {_mean_and_deviation(ends)}; a Gaussian per class, without a network, "
            f"has {_number(results.floor)}, {verdict}"
        )
        real = results.references.get(REAL, {}).get(results.metric, 0)
        if statistics.fmean(ends) <= real:
            sentences[-1] += (
                f" As many of the training images have {_number(real)}: where it ends, the metric "
                "no longer tells generated images from real ones, and differences there are noise."
            )
    return sentences


def conditions_in_words(results: Results) -> str:
    """What runs have in common, and what they don't."""
    named = {option for contestant in results.contestants for option in contestant.options}
    if results.budget_seconds is not None:
        trained = "Every method trains on as many images as it was expected to in the same time."
    elif results.shortened:
        trained = "Every method trains on the same number of images, or the share that it names."
    else:
        trained = "Every method trains on the same number of images."
    if any(option.startswith("model.") for option in named):
        paired = "order of data and noise, and initial weights where their networks are the same."
    else:
        paired = "initial weights, order of data and noise."
    if SEED_OFFSET in named:
        paired = f"{paired[:-1]}, unless a name sets other seeds."
    rates = "the best of a grid" if results.tuned else "that of the configuration"
    own = ", unless its name sets one" * ("optimizer.learning_rate" in named)
    return f"{trained} Runs of one seed share {paired} The learning rate of each is {rates}{own}."


def spelled_in_words(results: Results) -> list[str]:
    """Of each contestant that is named by a recipe, what that is."""
    return [
        f"{c.name} is {c.method}@{c.schedule}:{c.prediction}"
        + "".join(f"+{name}={value}" for name, value in c.options.items())
        for c in results.contestants
        if not c.name.startswith(c.method)
    ]


def written(ratio: Ratio) -> str:
    """Such as ``1.52×``, ``≥ 4×`` where it was there when first seen, ``< 0.9×`` if never."""
    low, high = _times(ratio.low), _times(ratio.high)
    if low == high:
        return f"{low}×"
    if ratio.low == 0:
        return "?" if ratio.high == math.inf else f"< {high}×"
    return f"≥ {low}×" if ratio.high == math.inf else f"{low} to {high}×"


def interval_in_words(ratio: Ratio) -> str:
    """In brackets; says so where there is none."""
    if ratio.interval is None:
        return " (too few seeds for an interval)"
    return f" (95 % interval {written_interval(ratio)})"


def written_interval(ratio: Ratio) -> str:
    """``1.2 to 1.9``; an end that is not known is 0 or ∞."""
    if ratio.interval is None:
        return "none: too few seeds"
    return " to ".join(_times(end) for end in ratio.interval)


def contestants_table(results: Results) -> Table:
    """Who took part, and where it ended; the best first."""
    solver_steps = sorted({k for c in results.curves for k in c.by_solver_steps}, key=int)
    header = ["method", "process", "target", "learning rate", "seeds", results.title]
    header += [f"{steps} steps" for steps in solver_steps] + ["copied share"]
    rows = []
    for contestant in sorted(results.contestants, key=lambda c: _final(results, c)):
        runs = list(complete_runs(results, contestant.name).values())
        of_steps = [
            _mean_and_deviation([r.by_solver_steps[k] for r in runs if k in r.by_solver_steps])
            for k in solver_steps
        ]
        final = _mean_and_deviation([last_value(run, results.metric) for run in runs])
        copied = [r.copied_share for r in runs if r.copied_share is not None]
        share = f"{statistics.fmean(copied):.1%}" if copied else "–"
        rows.append(
            [contestant.name, contestant.schedule, contestant.prediction]
            + [_learning_rate(results, contestant), f"{len(runs)} of {len(results.seeds)}", final]
            + [*of_steps, share]
        )
    for name, values in results.references.items():
        if results.metric in values:
            copied = values.get("copied_share")
            share = "–" if copied is None else f"{copied:.1%}"
            blanks = ["–"] * len(solver_steps)
            value = _number(values[results.metric])
            rows.append([f"{name}, no training", "–", "–", "–", "–", value, *blanks, share])
    return Table(header, rows)


def other_metrics_table(results: Results) -> Table | None:
    """Everything else that was measured at the end."""
    names = sorted(
        {k for c in results.curves for p in c.points[-1:] for k in p.values} - {results.metric}
    )
    rows = []
    for contestant in results.contestants:
        ends = [run.points[-1].values for run in complete_runs(results, contestant.name).values()]
        cells = [_mean_and_deviation([end[k] for end in ends if k in end]) for k in names]
        rows.append([contestant.name, *cells])
    for reference, values in results.references.items():
        cells = [_number(values[name]) if name in values else "–" for name in names]
        if any(name in values for name in names):
            rows.append([f"{reference}, no training", *cells])
    heads = [_head(name, results.extractor) for name in names]
    return Table(["method", *heads], rows) if names else None


def _head(field: str, extractor: str) -> str:
    """A figure's title and which way is better."""
    better = FIGURES[field.removeprefix(HELD_OUT)].better if is_figure(field) else ""
    return f"{title(field, extractor)}{f', {better} is better' * bool(better)}"


def speedup_table(speedups: dict[str, SpeedUp], undecided: Container[str]) -> Table | None:
    """The largest median first; None without speed-ups."""
    if not speedups:
        return None
    reaches = any(speedup.beyond is not None for speedup in speedups.values())
    header = ["method", "verdict", "median over levels", "95 %"]
    header += ["beyond the Gaussian", "95 %"] * reaches
    header += ["worst", "best", "at final quality", "95 %", "seeds"]
    rows = [
        [name, "undecided" if name in undecided else _short_verdict(s.median)]
        + [written(s.median), written_interval(s.median)]
        + _beyond(s) * reaches
        + [written(s.worst), written(s.best), written(s.final), written_interval(s.final)]
        + [str(len(s.seeds))]
        for name, s in speedups.items()
    ]
    order = {name: _certain(speedups[name].median) for name in speedups}
    return Table(header, sorted(rows, key=lambda row: order[row[0]], reverse=True))


def reasons(missing: dict[str, str]) -> dict[str, list[str]]:
    """Why there is no speed-up: the contestants, each reason once."""
    found: dict[str, list[str]] = {}
    for name, why in missing.items():
        found.setdefault(why, []).append(name)
    return found


def _beyond(speedup: SpeedUp) -> list[str]:
    ratio = speedup.beyond
    return ["–", "–"] if ratio is None else [written(ratio), written_interval(ratio)]


def failed_runs_table(results: Results) -> Table | None:
    """Runs that no statistic uses, and asked-for runs that are absent."""
    present = {(curve.contestant, curve.seed) for curve in results.curves}
    rows = [
        [curve.contestant, str(curve.seed), reason]
        for curve in results.curves
        if (reason := why_unusable(curve, results.metric)) is not None
    ]
    rows += [
        [contestant.name, str(seed), "it has not run"]
        for contestant in results.contestants
        for seed in results.seeds
        if (contestant.name, seed) not in present
    ]
    return Table(["method", "seed", "why"], rows) if rows else None


def _at(speedup: SpeedUp, where: str) -> Ratio:
    return speedup.final if where == "final" else speedup.median


def _certain(ratio: Ratio) -> tuple[float, float]:
    """Order of merit: what it is at least, then at most."""
    return ratio.low, ratio.high


def _verdict(ratio: Ratio) -> str:
    if ratio.faster:
        return "It is faster."
    if ratio.slower:
        return "It is slower."
    if ratio.interval is None:
        return f"There are too few seeds to say: {LEAST_SEEDS} or more are needed."
    return "That is not shown to be different from 1."


def _short_verdict(ratio: Ratio) -> str:
    if ratio.interval is None:
        return "too few seeds"
    return "faster" if ratio.faster else "slower" if ratio.slower else "not shown"


def _caution(number: int, ratio: Ratio) -> str:
    if number == 1 or ratio.interval is None:
        return ""
    return (
        f" It is the fastest of {number}, and the largest of many is partly luck: confirm it on "
        "seeds that did not choose it."
    )


def _learning_rate(results: Results, contestant: Contestant) -> str:
    mark = " ⚠" if results.at_grid_edge(contestant) else ""
    tried = ", ".join(contestant.tuning)
    return f"{contestant.learning_rate:g}{mark}" + (f" of {tried}" if tried else "")


def _final(results: Results, contestant: Contestant) -> float:
    runs = complete_runs(results, contestant.name).values()
    return statistics.fmean([last_value(r, results.metric) for r in runs]) if runs else math.inf


def _mean_and_deviation(values: list[float]) -> str:
    if not values:
        return "–"
    mean = _number(statistics.fmean(values))
    return mean if len(values) == 1 else f"{mean} ± {_number(statistics.stdev(values))}"


def _times(value: float) -> str:
    if value == 0 or math.isinf(value):
        return "0" if value == 0 else "∞"
    return f"{value:.2f}" if value < 10 else f"{value:.3g}"


def _number(value: float) -> str:
    """Three digits, without exponents."""
    if math.isinf(value):
        return "∞"
    if not 1e-4 <= abs(value) < 1e5:
        return f"{value:.3g}"
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"
