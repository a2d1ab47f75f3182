"""Pictures of a comparison: small panels, a few contestants each, the baselines in all of them.

Every panel is a file of its own, so that a page can put as many side by side as it is wide.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from speed_engine.arena.bootstrap import Array
from speed_engine.arena.results import GAUSSIAN, Contestant, Results
from speed_engine.arena.speedup import SpeedUp, Unit, complete_runs, stacked
from speed_engine.runtime.checks import UserError

PER_PANEL = 4  # contestants beside the baselines; more lines cannot be told apart
LEGEND_COLUMN = 34  # characters of a name that fit half of a panel's width
LEGEND_LINE = 54  # that fit the whole of it
SAMPLE_ROWS = 3  # of a grid of samples: enough to judge, small enough to compare
USUAL_ROWS = 3  # of a legend
_SIZE, _ROW, _DPI = (4.4, 3.7), 0.15, 140  # inches, of a picture and of a row of its legend
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")  # Okabe and Ito: for the colour-blind, too
_BASELINE_STYLES = (("0.15", "-"), ("0.45", "--"), ("0.6", ":"))
_BEHIND_TEXT = {"facecolor": "white", "alpha": 0.7, "linewidth": 0, "pad": 0.5}
_HIGHEST, _LOWEST = 32.0, 1 / 8  # speed-ups outside are cut off

Draw = Callable[[object, str, str, str], None]  # axes, contestant, colour, line style


@dataclass(frozen=True)
class Panel:
    """One picture: its file and what it shows."""

    path: Path
    title: str


def draw_quality(results: Results, unit: Unit, folder: Path) -> list[Panel]:
    """Metric against images or seconds: geometric mean of the seeds, band of one deviation."""

    def line(axes, name: str, colour: str, style: str) -> None:
        runs = complete_runs(results, name)
        if not runs:
            return
        try:
            images, seconds, quality = stacked(runs, tuple(sorted(runs)), results.metric)
        except UserError:  # the tables say that its seeds cannot be compared
            return
        x = images if unit == "images" else np.exp(seconds.mean(0))
        _line_with_band(axes, x, quality, name, colour, style)

    def references(axes) -> None:
        for (name, values), style in zip(results.references.items(), ("-.", ":"), strict=False):
            if results.metric in values:
                axes.axhline(values[results.metric], color="0.6", linestyle=style, linewidth=1)
                axes.annotate(
                    name, (0.01, values[results.metric]), xycoords=("axes fraction", "data"),
                    va="bottom", fontsize=7, color="0.4", bbox=_BEHIND_TEXT,
                )  # fmt: skip

    label = {"images": "images trained on", "seconds": "seconds of training"}[unit]
    return _panels(
        results, folder, f"quality-{unit}", line, label, results.title, log_y=True, also=references
    )


def draw_denoising(results: Results, folder: Path) -> list[Panel]:
    """Error of the clean image by log-SNR, over that of the first baseline."""
    errors = {c.name: _denoising(results, c.name) for c in results.contestants}
    reference = errors[results.baselines[0]] if results.baselines else {}
    if not reference:
        return []

    def line(axes, name: str, colour: str, style: str) -> None:
        common = sorted(errors[name].keys() & reference.keys(), key=float)
        if not common:
            return
        ratio = [errors[name][key] / reference[key] for key in common]
        axes.plot([float(key) for key in common], ratio, style, color=colour, label=name)

    label = f"error / that of {results.baselines[0]}"
    return _panels(results, folder, "denoising", line, "log-SNR (right: cleaner)", label)


def draw_speedups(
    results: Results, baseline: str, speedups: dict[str, SpeedUp], folder: Path
) -> list[Panel]:
    """Speed-up over the baseline's levels of quality, the better ones to the right."""

    if not speedups:
        return []

    def floor(axes) -> None:
        worst, best = sorted(axes.get_xlim(), reverse=True)
        if results.floor is not None and best < results.floor < worst:  # else it squeezes the lines
            axes.axvline(results.floor, color="0.6", linestyle="-.", linewidth=1)
            axes.annotate(
                GAUSSIAN, (results.floor, 0.01), xycoords=("data", "axes fraction"), rotation=90,
                ha="right", va="bottom", fontsize=7, color="0.4", bbox=_BEHIND_TEXT,
            )  # fmt: skip

    def line(axes, name: str, colour: str, style: str) -> None:
        if name == baseline:
            axes.axhline(1, color="0.15", linewidth=1)
        elif name in speedups:
            _draw_speedup(axes, speedups[name], colour, style)

    number = results.baselines.index(baseline) + 1
    label = f"{results.title} (right: better)"
    return _panels(
        results, folder, f"speedup-{number}", line, label, f"× over {baseline}", True, floor
    )


def crop_samples(results: Results, root: Path, folder: Path) -> list[Panel]:
    """First rows of the last grid of samples, one complete seed for each contestant that has it."""
    from PIL import Image

    panels = []
    for number, contestant in enumerate(results.contestants):
        runs = complete_runs(results, contestant.name)
        grids = sorted((root / runs[min(runs)].run / "samples").glob("step-*.png")) if runs else []
        if grids:
            path = folder / f"samples-{number:02d}.png"
            with Image.open(grids[-1]) as grid:
                height = min(grid.height, max(grid.width // 10 * SAMPLE_ROWS, 96))
                grid.crop((0, 0, grid.width, height)).save(path)
            panels.append(Panel(path, f"{contestant.name}, seed {min(runs)}"))
    return panels


def _line_with_band(axes, x: Array, logs: Array, name: str, colour: str, style: str) -> None:
    mean = logs.mean(0)
    axes.plot(x, np.exp(mean), style, color=colour, label=name)
    if len(logs) > 1:
        deviation = logs.std(0, ddof=1)
        low, high = np.exp(mean - deviation), np.exp(mean + deviation)
        axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)


def _draw_speedup(axes, speedup: SpeedUp, colour: str, style: str) -> None:
    """A line where it is measured; a triangle where only a bound is known."""
    x = np.array(speedup.levels)
    low, high = (np.array([getattr(r, end) for r in speedup.curve]) for end in ("low", "high"))
    known = low == high
    axes.plot(x, np.where(known, low, np.nan), style, color=colour, label=speedup.method)
    axes.plot(x[high == math.inf], low[high == math.inf], "^", color=colour, markersize=4)
    axes.plot(x[low == 0], high[low == 0], "v", color=colour, markersize=4)
    unknown = (math.nan, math.nan)  # a bound alone is a triangle: its shade would hide the lines
    intervals = [r.interval if r.low == r.high and r.interval else unknown for r in speedup.curve]
    limits = np.clip(np.array(intervals), _LOWEST / 2, _HIGHEST * 2)
    axes.fill_between(x, *limits.T, color=colour, alpha=0.15, linewidth=0)


def _denoising(results: Results, name: str) -> dict[str, float]:
    """Log-SNR -> geometric mean over complete runs."""
    runs = [c.denoising for c in complete_runs(results, name).values() if c.denoising]
    keys = set.intersection(*map(set, runs)) if runs else set()
    return {key: float(np.exp(np.mean([math.log(run[key]) for run in runs]))) for key in keys}


def _panels(
    results: Results,
    folder: Path,
    stem: str,
    line: Draw,
    x: str,
    y: str,
    log_y: bool = False,
    also: Callable[[Any], None] = lambda axes: None,
) -> list[Panel]:
    """One picture per group, all with the same limits; ``also`` draws on each."""
    from matplotlib.figure import Figure

    drawn = []
    for number, (title, group) in enumerate(_groups(results), start=1):
        figure = Figure(figsize=_SIZE, layout="constrained")
        axes = figure.subplots()
        axes.set_yscale("log" if log_y else "linear")
        for name, (colour, style) in zip(results.baselines, _BASELINE_STYLES, strict=False):
            line(axes, name, colour, style)
        for contestant, colour in zip(group, _COLOURS, strict=False):
            line(axes, contestant.name, colour, "-")
        also(axes)
        axes.set_xlabel(x, fontsize=9, parse_math=False)
        axes.set_ylabel(y, fontsize=9, parse_math=False)
        drawn.append((Panel(folder / f"{stem}-{number}.png", title), figure, axes))
    _finish([axes for _, _, axes in drawn], stem, log_y)
    for panel, figure, _ in drawn:
        figure.savefig(panel.path, dpi=_DPI)
    return [panel for panel, _, _ in drawn]


def _finish(panels: list, stem: str, log_y: bool) -> None:
    limits = [axes.get_ylim() for axes in panels]
    low, high = min(low for low, _ in limits), max(high for _, high in limits)
    for axes in panels:
        if log_y:
            _number_plainly(axes.yaxis)
        if stem.startswith("speedup"):
            axes.set_xscale("log")
            axes.invert_xaxis()
            _number_plainly(axes.xaxis)
            low, high = max(low, _LOWEST), min(high, _HIGHEST)
            ticks = [2.0**k for k in range(-3, 6)]
            axes.set_yticks(ticks, [f"{tick:g}×" for tick in ticks])
        axes.set_ylim(low, high)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        handles, names = axes.get_legend_handles_labels()
        if handles:
            columns = 2 if max(map(len, names)) <= LEGEND_COLUMN else 1
            texts = [in_lines(name) for name in names]
            rows = sum(text.count("\n") + 1 for text in texts) / columns
            width, height = _SIZE  # a long legend takes no room from the axes
            axes.figure.set_size_inches(width, height + _ROW * max(0, rows - USUAL_ROWS))
            axes.figure.legend(
                handles, texts, loc="outside upper left", ncols=columns, frameon=False, fontsize=7.5
            )


def in_lines(name: str) -> str:
    """A contestant's name, broken before options where it is wider than the picture."""
    lines = [""]
    for part in re.split(r"(?=\+)", name):
        if lines[-1].strip() and len(lines[-1]) + len(part) > LEGEND_LINE:
            lines.append("    ")
        lines[-1] += part
    return "\n".join(lines)


def _number_plainly(axis) -> None:
    """1, 2, 5, 10 on a log scale, where a formatter's default writes powers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _groups(results: Results) -> list[tuple[str, list[Contestant]]]:
    """Title and contestants of each panel: by process and target, baselines left out."""
    by_process: dict[str, list[Contestant]] = {}
    for contestant in results.contestants:
        if contestant.name not in results.baselines:
            key = f"{contestant.schedule}, {contestant.prediction}"
            by_process.setdefault(key, []).append(contestant)
    groups = []
    for key, members in by_process.items():
        parts = [members[i : i + PER_PANEL] for i in range(0, len(members), PER_PANEL)]
        for number, part in enumerate(parts, start=1):
            groups.append((key if len(parts) == 1 else f"{key} ({number} of {len(parts)})", part))
    return groups or [("baselines", [])]
