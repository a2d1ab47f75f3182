"""Tables of comparisons, of tuning runs and of what was tried beside the recipe."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from candidates import CANDIDATES, CASES
from speed_engine.arena.results import BUDGET, SEED_OFFSET, Results, read_results
from speed_engine.arena.speedup import LOSS, complete_runs
from speed_engine.arena.summary import written, written_interval
from speed_engine.arena.verdicts import against, against_in_loss
from table_rows import missing, result, rows

COMPARISONS = Path(__file__).parent.parent / "docs" / "results"


def ladder(name: str) -> str:
    """The recipes of a comparison, one change a rung."""
    path = COMPARISONS / name / "results.json"
    if not path.exists():
        return "Not measured yet."
    results = read_results(path)
    rungs = _rungs(results)
    lowest = next(iter(rungs.values()))
    body, below = [], None
    for rung, contestant in rungs.items():
        ends = [run.points[-1].values for run in complete_runs(results, contestant).values()]
        schedule = {c.name: c.schedule for c in results.contestants}
        same = below is not None and schedule[below] == schedule[contestant]
        body.append([
            rung,
            f"`{contestant}`",
            spread([end[results.metric] for end in ends]),
            spread([end[LOSS] for end in ends]) if schedule[contestant] == "flow" else "–",
            times(results, contestant, lowest, "final"),
            times(results, contestant, below, "median"),
            times(results, contestant, below if same else None, "median", by_loss=True),
        ])  # fmt: skip
        below = contestant
    head = ["", "written", results.title, "validation loss", "against the first row"]
    head += ["against the row above", "the same by validation loss"]
    return rows(head, body)


def gains(name: str) -> str:
    """How many times fewer images, and seconds, than a flow with AdamW, by both measures."""
    path = COMPARISONS / name / "results.json"
    if not path.exists():
        return "Not measured yet."
    results = read_results(path)
    rungs, schedule = _rungs(results), {c.name: c.schedule for c in results.contestants}
    body = []
    for rung, contestant in rungs.items():
        ends = [run.points[-1].values for run in complete_runs(results, contestant).values()]
        cells = [spread([end[metric] for end in ends]) for metric in (results.metric, LOSS)]
        for axis in ("images", "seconds"):
            for by_loss in (False, True):
                cells.append(times(results, contestant, rungs[FLOW], "median", axis, by_loss))
        if schedule[contestant] != "flow":
            cells[1] = "–"  # the loss of another target
        body.append([rung, *cells])
    head = ["", results.title, "validation loss", "images, by FID", "images, by loss"]
    return rows([*head, "seconds, by FID", "seconds, by loss"], body)


# Data of the headline: the comparison, and the data in words.
PROOFS = {"cifar16-decay": "CIFAR-10", "digits-decay": "digits"}
FLOW = "the flow with logit-normal times"  # the rung that ratios are given against


def proofs() -> str:
    """Recipes on all data: quality, and how many times fewer images than a flow with AdamW."""
    columns: list[dict[str, list[str]]] = []
    head = [""]
    for name, data in PROOFS.items():
        path = COMPARISONS / name / "results.json"
        if not path.exists():
            continue
        results, cells = read_results(path), {}
        rungs = _rungs(results)
        for rung, contestant in rungs.items():
            runs = complete_runs(results, contestant).values()
            cells[rung] = [
                spread([run.points[-1].values[results.metric] for run in runs]),
                *(
                    times(results, contestant, rungs[FLOW], "median", by_loss=by_loss)
                    if contestant != rungs[FLOW]
                    else "1"
                    for by_loss in (False, True)
                ),
            ]
        columns.append(cells)
        head += [f"{data}: FID", "times as fast", "by validation loss"]
    body = [
        [rung, *(cell for of in columns for cell in of.get(rung, [""] * 3))]
        for rung in RUNGS
        if any(rung in of for of in columns)
    ]
    return rows(head, body)


def cifar_tuning() -> str:
    """Single runs by which learning rates and a target were chosen."""
    found = result("cifar16_tuning")
    if found is None:
        return "Not measured yet."
    body = [
        [name]
        + [f"{of['held_out_fid']:.3g}" for of in run["evaluations"]]
        + [f"{run['evaluations'][-1]['validation_loss']:.3f}"]
        for name, run in found["runs"].items()
    ]
    gaussian = found["gaussian_per_class"]["held_out_fid"]
    body.append(["a Gaussian per class, no training", "", f"{gaussian:.3g}", ""])
    halves = [f"FID at {of['images']:,} images" for of in found["runs"][body[0][0]]["evaluations"]]
    return rows(["optimizer, learning rate", *halves, "validation loss at the end"], body)


def cifar_ddpm_tuning() -> str:
    """Single runs on DDPM by which its learning rate was chosen."""
    found = result("cifar16_tuning")
    if found is None:
        return "Not measured yet."
    body = [
        [name, f"{run['evaluations'][-1]['held_out_fid']:.3g}"]
        for name, run in found["ddpm"]["runs"].items()
    ]
    return rows(["method, target, learning rate of AdamW", "FID at 102,400 images"], body)


def candidates() -> str:
    """What was tried in place of the recipe: figures, and how far off the recipe's own they are."""
    found = result("candidates")
    if found is None:
        return missing("candidates.py")
    names = {"digits": "digits", "cifar16": "CIFAR-10"}
    cases = [case for case in CASES if case in found["runs"]]
    head = ["in place of the recipe"]
    for case in cases:
        head += [f"{names[case]}: FID", "validation loss", "a step"]
    body = [
        [candidate.what, *(cell for case in cases for cell in _candidate(found, case, name))]
        for name, candidate in CANDIDATES.items()
    ]
    return rows(head, [line for line in body if any(cell != "–" for cell in line[1:])])


def _candidate(found: dict[str, Any], case: str, name: str) -> list[str]:
    """FID, validation loss and time of a step, against the recipe with the same seeds."""
    runs = found["runs"].get(case, {})
    own, recipe = (runs.get(of, {}) for of in (name, "recipe"))
    seeds = [seed for seed in own if seed in recipe]
    cells = [
        _against([own[seed][key] for seed in seeds], [recipe[seed][key] for seed in seeds])
        for key in ("held_out_fid", "validation_loss")
    ]
    times = {of: timing["median"] for of, timing in found["step_ms"].get(case, {}).items()}
    cells.append(
        f"{times[name] / times['recipe']:.2f}×" if {name, "recipe"} <= times.keys() else "–"
    )
    return cells


def _against(own: list[float], recipe: list[float]) -> str:
    """The mean, and by how many per cent it is above that of the recipe."""
    if not own:
        return "–"
    above = 100 * (fmean(own) / fmean(recipe) - 1)
    return f"{fmean(own):.4g}" if own == recipe else f"{fmean(own):.4g} ({above:+.1f} %)"


# What is changed: the method, the process, the optimizer and its weight decay, and the block of the
# contestant.
RUNGS = {
    "DDPM, uniform timesteps": ("uniform", "linear", "adamw", 0, "original"),
    "DDPM, SpeeD": ("speed_paper", "linear", "adamw", 0, "original"),
    "a rectified flow, uniform times": ("uniform", "flow", "adamw", 0, "original"),
    "the flow with logit-normal times": ("logit_normal", "flow", "adamw", 0, "original"),
    "that, weight decay 0.1": ("logit_normal", "flow", "adamw", 0.1, "original"),
    "that with Muon": ("logit_normal", "flow", "muon", 0, "original"),
    "that with Muon, weight decay 0.1": ("logit_normal", "flow", "muon", 0.1, "original"),
    "the last with the modern block": ("logit_normal", "flow", "muon", 0.1, "modern"),
}


def _rungs(results: Results) -> dict[str, str]:
    """Rung -> contestant, of those that a comparison has."""
    found = {rung: _on_rung(results, *of) for rung, of in RUNGS.items()}
    return {rung: name for rung, name in found.items() if name is not None}


def _on_rung(results: Results, *rung: str | float) -> str | None:
    """The contestant, with the whole budget and the seeds of all."""
    for contestant in results.contestants:
        options = contestant.options
        if options.keys() & {BUDGET, SEED_OFFSET}:
            continue
        by = options.get("optimizer.name", "adamw"), options.get("optimizer.weight_decay", 0)
        block = options.get("model.variant", "original")
        if (contestant.method, contestant.schedule, *by, block) == rung:
            return contestant.name
    return None


def spread(values: list[float]) -> str:
    return f"{fmean(values):.3g} ± {stdev(values):.2g}"


def times(
    results: Results,
    contestant: str,
    baseline: str | None,
    where: str,
    axis: str = "images",
    by_loss: bool = False,
) -> str:
    """The speed-up to the other's final quality, or its median, with its interval."""
    if baseline is None or baseline == contestant:
        return "–"
    found = (against_in_loss if by_loss else against)(results, baseline)
    if found is None or contestant not in found.by_images.keys() | found.missing.keys():
        return "–"
    if contestant in found.missing:
        return "undecided"
    ratio = getattr(getattr(found, f"by_{axis}")[contestant], where)
    said = f"{written(ratio)} ({written_interval(ratio)})"
    return f"undecided: {said}" if contestant in found.undecided else said


TABLES: dict[str, Callable[[], str]] = {
    "cifar_tuning": cifar_tuning,
    "cifar_ddpm_tuning": cifar_ddpm_tuning,
    "candidates": candidates,
    "ladder_cifar": partial(ladder, "cifar16"),
    "gains_digits": partial(gains, "digits-decay"),
    "gains_cifar": partial(gains, "cifar16-decay"),
    "ladder_digits": partial(ladder, "recipe-digits"),
    "proofs": proofs,
}
