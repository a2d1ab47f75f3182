"""Speed-ups of contestants over a baseline, and whether they decide anything."""

import math
import statistics
from collections.abc import Container
from dataclasses import dataclass, replace

from speed_engine.arena.results import BUDGET, REAL, Contestant, Curve, Results
from speed_engine.arena.speedup import LOSS, SpeedUp, complete_runs, speed_up

# A final value that is so many times that with more solver steps is one of the solver.
OF_SOLVER = 1.1


@dataclass(frozen=True)
class Against:
    """Everything against one baseline."""

    baseline: str
    metric: str  # its title
    by_images: dict[str, SpeedUp]  # by contestant
    by_seconds: dict[str, SpeedUp]
    missing: dict[str, str]  # contestant: why it has no speed-up
    undecided: dict[str, str]  # contestant: why its speed-up decides nothing


def against(results: Results, baseline: str) -> Against:
    """Speed-ups of every other contestant over a baseline."""
    return _compare(results, baseline, {c.name: baseline for c in results.contestants})


def against_in_loss(results: Results, baseline: str) -> Against | None:
    """The same by the validation loss, of contestants on the baseline's process; None if unknown.

    Losses of different processes cannot be compared. What is said of images where they are no
    better than a Gaussian's holds here, too: such a network has learned no more by its loss.
    """
    by_loss = replace(results, metric=LOSS)
    schedule = {c.name: c.schedule for c in results.contestants}
    rivals: dict[str, str | None] = {
        name: baseline
        for name in schedule
        if schedule[name] == schedule[baseline] and complete_runs(by_loss, name)
    }
    return _compare(by_loss, baseline, rivals, images=results) if len(rivals) > 1 else None


def against_own_uniform(results: Results) -> Against:
    """Speed-ups over uniform timesteps on the same process and target."""
    plain = {(c.schedule, c.prediction): c.name for c in results.contestants if _is_plain(c)}
    rivals = {c.name: plain.get((c.schedule, c.prediction)) for c in results.contestants}
    return _compare(results, "uniform on the same process and target", rivals)


def _compare(
    results: Results, label: str, rivals: dict[str, str | None], images: Results | None = None
) -> Against:
    """With ``images`` the same comparison by its images, where ``results`` is that by its loss."""
    found = Against(label, results.title, {}, {}, {}, {})
    limited = limited_by_solver(results)
    for name, rival in rivals.items():
        if name == rival:
            continue
        if rival is None:
            found.missing[name] = "uniform has not run on its process and target."
            continue
        try:
            found.by_images[name] = speed_up(results, name, rival)
            found.by_seconds[name] = speed_up(results, name, rival, "seconds")
        except ValueError as obstacle:
            found.missing[name] = str(obstacle)
        why = _why_undecided(images or results, limited, name, rival)
        if why is None and name in found.by_images and _mostly_noise(results, found, name):
            why = (
                f"most levels of {rival} are better than the training images' own value, where the "
                "metric no longer tells generated images from real ones."
            )
        if why is not None:
            found.undecided[name] = why
    return found


def _why_undecided(results: Results, limited: Container[str], name: str, rival: str) -> str | None:
    """Why a speed-up over the rival decides nothing, whatever it is.

    Args:
        results: by their images.
        limited: contestants whose images had too few solver steps.
        name: the contestant.
        rival: what it is compared with.
    """
    if not beats_gaussian(results, rival):
        return f"{rival} is no better than a Gaussian."
    of_solver = [one for one in (rival, name) if one in limited]
    if of_solver:
        few = "generated with too few solver steps"
        return f"the images of {' and '.join(of_solver)} are {few}."
    share = {c.name: c.options.get(BUDGET) for c in results.contestants}
    if share[name] != share[rival]:
        return (
            f"{name} and {rival} train on different shares of the images, so that one has ended "
            "where the other has not: only their ends can be compared."
        )
    return None


def _mostly_noise(results: Results, found: Against, name: str) -> bool:
    """Whether more than half of the levels are beyond what real images reach."""
    real = results.references.get(REAL, {}).get(results.metric, 0.0)
    levels = found.by_images[name].levels
    return 2 * sum(level < real for level in levels) > len(levels)


def limited_by_solver(results: Results) -> dict[str, tuple[float, str, float]]:
    """Contestants whose last evaluation is much worse than the same models are with more solver
    steps: both means, and how many steps.

    A validation loss generates nothing.
    """
    few, found = results.solver_steps, {}
    if few is None or results.metric == LOSS:
        return {}
    for contestant in results.contestants:
        runs = complete_runs(results, contestant.name).values()
        for steps in {k for run in runs for k in run.by_solver_steps if int(k) > few}:
            both = [
                (last_value(run, results.metric), run.by_solver_steps[steps])
                for run in runs
                if steps in run.by_solver_steps
            ]
            last, more = (statistics.fmean(values) for values in zip(*both, strict=True))
            if last > OF_SOLVER * more and more < found.get(contestant.name, (0, "", math.inf))[2]:
                found[contestant.name] = last, steps, more
    return found


def beats_gaussian(results: Results, name: str) -> bool:
    """Whether every run of a contestant ends beyond it; True where it isn't known."""
    runs = complete_runs(results, name).values()
    return results.floor is None or all(
        last_value(run, results.metric) < results.floor for run in runs
    )


def _is_plain(contestant: Contestant) -> bool:
    return contestant.method == "uniform" and not contestant.options


def last_value(run: Curve, metric: str) -> float:
    """Where a run ends."""
    return run.points[-1].values[metric]
