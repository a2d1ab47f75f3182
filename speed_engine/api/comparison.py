"""Comparisons from Python: those of ``speed-engine compare``."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from speed_engine.arena import summary, verdicts
from speed_engine.arena.compare import compare as run_comparison
from speed_engine.arena.request import FAIR_PRESETS, CompareCommand, refuse_what_has_no_effect
from speed_engine.arena.results import Results, read_results
from speed_engine.commands.config_file import origin
from speed_engine.config import TrainConfig
from speed_engine.runtime import strict
from speed_engine.runtime.checks import check


@dataclass(frozen=True)
class Compared:
    """What came of a comparison.

    Attributes:
        folder: of the comparison, with all its runs.
    """

    folder: Path

    @property
    def report(self) -> Path:
        """The report, one HTML file."""
        return self.folder / "report.html"

    @property
    def results(self) -> Results:
        """Every curve and figure that was measured."""
        return read_results(self.folder / "results.json")

    @property
    def table(self) -> list[dict[str, str]]:
        """The methods, the best first: one dict per method, as a row of a table."""
        table = summary.contestants_table(self.results)
        return [dict(zip(table.header, row, strict=True)) for row in table.rows]

    @property
    def verdicts(self) -> list[str]:
        """One sentence against each baseline, with the uncertainty of what it says."""
        results = self.results
        return [
            summary.headline(results, verdicts.against(results, baseline))
            for baseline in results.baselines
        ]


def compare(
    config: str | Path | TrainConfig,
    methods: Sequence[str] | None = None,
    folder: str | Path | None = None,
    *,
    seeds: int = 5,
    budget_seconds: float | None = None,
    evaluations: int = 10,
    learning_rates: Sequence[float] = (),
    final_solver_steps: Sequence[int] = (8, 50),
    slots: int | None = None,
    console: Console | None = None,
    **changes: Any,
) -> Compared:
    """Train methods at equal budget, as ``speed-engine compare`` does, and write a report.

    Called again with the same folder, it continues where it stopped. In a script it stands below
    ``if __name__ == "__main__":``, since runs are processes of their own.

    Args:
        config: a preset, of which 30 % of the images are held out, or a configuration or its file,
            which says itself what is held out.
        methods: ``METHOD[@PROCESS][:PREDICTION][+OPTION=VALUE ...]`` each. By default uniform and
            the method of ``config``. The baselines that speed-ups refer to are added.
        folder: of the comparison. By default comparisons/NAME.
        seeds: number of runs of each method.
        budget_seconds: of training, in place of ``steps``: short runs measure each method's speed
            first, and every run trains on as many images as its method is expected to reach in
            that time.
        evaluations: of each run, at equal distances.
        learning_rates: of which each method uses its best. By default that of ``config``.
        final_solver_steps: numbers of model evaluations with which the final models are measured.
        slots: runs at a time. By default one per GPU, or per CPU core.
        console: where the progress is shown. By default standard output, or the notebook.
        changes: fields of the configuration, as ``speed_engine.train`` takes them.

    Raises:
        UserError: a method or a field that does not exist, a folder with another comparison, or
            the extra ``plots`` is not installed.

    Examples:
        >>> budget = {"steps": 20, "seeds": 2, "evaluations": 2, "final_solver_steps": [4]}
        >>> quick = {"num_images": 500, "solver_steps": 4}
        >>> found = se.compare(
        ...     "digits", ["uniform", "min_snr"], **budget, model={"depth": 1}, evaluation=quick
        ... )  # doctest: +ELLIPSIS
        8 runs
        ...
        >>> "min_snr" in [row["method"] for row in found.table]
        True
    """
    lists = {
        "methods": [methods] if isinstance(methods, str) else () if methods is None else methods,
        "learning_rates": learning_rates,
        "final_solver_steps": final_solver_steps,
    }
    for name, values in lists.items():
        check(name, values, isinstance(values, Iterable), "must be a list")
    names = strict.read(tuple[str, ...], [*lists["methods"]], "methods")
    rates = [float(rate) for rate in learning_rates]
    start = origin(config, FAIR_PRESETS)
    changed = start.config(changes)
    refuse_what_has_no_effect(changed, start.config())
    command = CompareCommand(
        preset=start.name,
        config=changed,
        methods=None if methods is None else ",".join(names),
        seeds=seeds,
        budget_seconds=None if budget_seconds is None else float(budget_seconds),
        evaluations=evaluations,
        learning_rates=tuple(rates),
        final_solver_steps=tuple(final_solver_steps),
        slots=slots,
        out=None if folder is None else Path(folder).expanduser(),
    )
    settings = {
        "seeds": seeds,
        **({} if budget_seconds is None else {"budget_seconds": budget_seconds}),
        "evaluations": evaluations,
        "learning_rates": rates,
        "final_solver_steps": [*final_solver_steps],
        **changes,
    }
    of = "config" if isinstance(config, TrainConfig) else repr(str(config))
    values = ", ".join(f"{name}={value!r}" for name, value in settings.items())
    called = f"speed_engine.compare({of}, {None if methods is None else list(names)}, {values})"
    return Compared(run_comparison(command, console or Console(), called))
