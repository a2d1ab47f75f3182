"""Methods and processes at a glance: which go together, what they sample and how they weigh.

    table     process x method: it works, or why not
    arrays    P and w of every method on one process, for other programs
    figures   methods-PROCESS.png: P, w and P w of every method, by timestep
              increments-PROCESS.png: the increment's mean, variance and rate, SpeeD's three areas

Letters: T timesteps (cells, in continuous time).
"""

import math
from pathlib import Path
from typing import Any

import torch

from speed_engine.diffusion.fitted import Method
from speed_engine.diffusion.increments import Increments, increments
from speed_engine.diffusion.method import build_method
from speed_engine.diffusion.methods import METHODS
from speed_engine.diffusion.processes import SCHEDULES, build_schedule
from speed_engine.diffusion.schedule import NoiseSchedule
from speed_engine.runtime.checks import check_installed

BANDS = 10  # equal parts of the timesteps for which P w is added up
AREAS = ("acceleration", "deceleration", "convergence")
SUPPRESSION = 138.6  # r at which the convergence area begins, SpeeD's default
_LATE_STEP = 10**9  # when distributions that follow the step have arrived
_TALLEST = 5.0  # what is higher is cut off, and its maximum written in the panel
_INK, _DISTRIBUTION, _WEIGHT, _SHARE = "0.25", "#1f77b4", "#d95f02", "0.8"


def compatibility(num_timesteps: int) -> dict[str, dict[str, str | None]]:
    """Process -> method -> None if they go together, else the reason why not."""
    return {
        process: {method: _refusal(method, process, num_timesteps) for method in METHODS}
        for process in SCHEDULES
    }


def arrays(process: str, num_timesteps: int) -> dict[str, dict[str, Any]]:
    """P and w of every method on one process, as JSON holds them.

    ``P`` is the distribution at the first step and ``w`` the weight of the MSE of ``prediction``,
    both by timestep from clean to noisy; ``changes_in_training`` says that they do not stay so. A
    method that the process does not allow has ``why_not`` instead.
    """
    schedule = build_schedule(process, num_timesteps)
    return {name: _arrays(name, schedule) for name in METHODS}


def _arrays(name: str, schedule: NoiseSchedule) -> dict[str, Any]:
    try:
        method = build_method(name, schedule)
    except ValueError as refusal:
        return {"why_not": str(refusal)}
    return {
        "P": method.probabilities.tolist(),
        "w": method.weight.tolist(),
        "prediction": method.prediction,
        "changes_in_training": not method.is_fixed,
    }


def check_libraries() -> None:
    """Refuse to draw where the library for it is not installed.

    Raises:
        UserError: it is missing; the error names the extra that has it.
    """
    check_installed("a figure of the methods", "plots", "matplotlib")


def draw_figures(process: str, num_timesteps: int, folder: Path) -> list[Path]:
    """Write both figures of a process; returns their paths.

    Raises:
        UserError: matplotlib, of the extra ``plots``, is missing.
    """
    check_libraries()
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"methods-{process}.png", folder / f"increments-{process}.png"]
    for path, draw in zip(paths, (_draw_methods, _draw_increments), strict=True):
        draw(process, num_timesteps).savefig(path, dpi=110)
    return paths


def _refusal(method: str, process: str, num_timesteps: int) -> str | None:
    try:
        build_method(method, build_schedule(process, num_timesteps))
    except ValueError as refusal:
        return str(refusal)
    return None


def _draw_methods(process: str, num_timesteps: int):
    """One panel per method: P, w and their product, each relative to its mean over timesteps."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    schedule = build_schedule(process, num_timesteps)
    possible = {
        name: build_method(name, schedule)
        for name in METHODS
        if _refusal(name, process, num_timesteps) is None
    }
    columns = 3
    rows = -(-len(possible) // columns)
    figure = Figure(figsize=(4.4 * columns, 2.5 * rows + 0.9), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, squeeze=False).flatten()
    for panel, (name, method) in zip(panels, possible.items(), strict=False):
        _draw_method(panel, name, method, num_timesteps)
    for panel in panels[len(possible) :]:
        panel.set_visible(False)
    for panel in panels[len(possible) - columns : len(possible)]:
        panel.tick_params(labelbottom=True)
    figure.supxlabel("timestep, from clean to noisy", fontsize=10)
    handles, labels = panels[0].get_legend_handles_labels()
    handles.append(Line2D([], [], color=_DISTRIBUTION, linestyle="--"))
    figure.legend(handles, [*labels, "P at the end"], loc="outside upper right", ncols=4)
    title = (
        f"{process}: what each method samples and how it weighs the MSE of {schedule.prediction}"
    )
    figure.suptitle(title, x=0.01, ha="left")
    return figure


def _draw_method(panel, name: str, method: Method, num_timesteps: int) -> None:
    t = torch.arange(num_timesteps)
    p = method.probabilities * num_timesteps
    weight = method.weight / (method.probabilities * method.weight).sum()
    bands = (t * BANDS // num_timesteps).clamp(max=BANDS - 1)
    share = torch.zeros(BANDS).double().index_add(0, bands, p * weight)
    share /= torch.bincount(bands, minlength=BANDS)
    width = num_timesteps / BANDS
    left = (torch.arange(BANDS) * width).numpy()
    panel.bar(left, share.numpy(), width, align="edge", color=_SHARE, label="P·w, by tenth")
    panel.plot(t, p, color=_DISTRIBUTION, linewidth=3.5, label="P, uniform = 1")
    panel.plot(t, weight, color=_WEIGHT, linewidth=1.5, label="w, mean under P = 1")
    last = method.timesteps.probabilities(_LATE_STEP) * num_timesteps
    if not torch.equal(last, p):
        panel.plot(t, last, "--", color=_DISTRIBUTION)
    suffix = "" if method.is_fixed else " (at the first step; changes)"
    panel.set_title(name + suffix, loc="left", fontsize=9)
    panel.set_xlim(0, num_timesteps)
    highest = {"P": float(p.max()), "w": float(weight.max()), "P·w": float(share.max())}
    panel.set_ylim(0, min(_TALLEST, 1.1 * max(*highest.values(), float(last.max()))))
    beyond = [f"{curve} up to {top:,.0f}" for curve, top in highest.items() if top > _TALLEST]
    panel.text(0.03, 0.97, "\n".join(beyond), transform=panel.transAxes, va="top", fontsize=8)
    panel.spines[["top", "right"]].set_visible(False)


def _draw_increments(process: str, num_timesteps: int):
    """Mean, variance and rate of the increment, over the three areas."""
    from matplotlib.figure import Figure

    areas = increments(build_schedule(process, num_timesteps))
    t = torch.arange(1, num_timesteps + 1)
    curves = {
        "variance": [
            ("Var, two noises", t[:-1], areas.variance),
            ("bound", t, areas.variance_bound),
        ],
        "mean, squared": [("mean²", t[:-1], areas.mean.square()), ("bound", t, areas.mean_bound)],
        "rate of the variance": [("rate", t, areas.rate)],
    }
    figure = Figure(figsize=(13, 3.4), layout="constrained")
    panels = figure.subplots(1, 3)
    for panel in panels:
        shades = shade_areas(panel, areas, num_timesteps)
    figure.legend(
        shades, [s.get_label().lstrip("_") for s in shades], loc="outside upper right", ncols=3
    )
    for panel, (title, lines) in zip(panels, curves.items(), strict=True):
        for (label, x, y), style in zip(lines, ("-", "--"), strict=False):
            panel.plot(x, y, style, color=_INK, label=label)
        panel.legend(frameon=False, fontsize=8)
        panel.set_title(title, loc="left", fontsize=10)
        panel.set_xlabel("t, counted from 1")
        panel.set_xlim(1, num_timesteps)
        panel.spines[["top", "right"]].set_visible(False)
        if title.startswith("mean"):
            panel.set_yscale("log")
    figure.suptitle(f"{process}: increments and areas{_borders(areas)}", x=0.01, ha="left")
    return figure


def shade_areas(panel, areas: Increments, num_timesteps: int) -> list:
    """The shaded areas that the process has."""
    tau = min(areas.tau(SUPPRESSION), num_timesteps)
    t_ad = min(areas.t_ad, tau)
    borders = (1, t_ad, tau, num_timesteps)
    colours = ("#cfe3f5", "#ececec", "#fbdcc4")
    return [
        panel.axvspan(left, right, color=colour, lw=0, label=f"_{name}")
        for name, left, right, colour in zip(AREAS, borders, borders[1:], colours, strict=False)
        if right > left
    ]


def _borders(areas: Increments) -> str:
    tau = areas.tau(SUPPRESSION)
    reached = f"tau({SUPPRESSION:g}) = {tau:.1f}" if math.isfinite(tau) else "no convergence area"
    return f" (t_ad = {areas.t_ad:.1f}, {reached})"
