"""The loss of a run's models at each timestep, over SpeeD's three areas (figure 1 of its paper).

The second picture checks theorem 1 on the run's own images: increments between noised images of
neighbouring timesteps, with their bounds.

Letters: B images, L timesteps.
"""

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from speed_engine.data.batch import Batch
from speed_engine.diffusion.fitted import Method
from speed_engine.diffusion.increments import increments
from speed_engine.diffusion.prediction import Rows
from speed_engine.evaluation.method_report import AREAS, SUPPRESSION, shade_areas
from speed_engine.evaluation.validation import Validation
from speed_engine.ops import Stream, normal

TIMESTEPS = 50  # of the figure, evenly over the process


def cells(num_timesteps: int) -> Tensor:
    """(L,) timesteps of the figure, counted from 0."""
    parts = torch.arange(TIMESTEPS, dtype=torch.float64) + 0.5
    return (parts / TIMESTEPS * num_timesteps).long().unique()


def losses(validation: Validation, process: Method, model: nn.Module) -> Tensor:
    """(L,) float64 mean squared error of the process's own target at the figure's timesteps."""
    schedule = process.schedule
    times = schedule.timesteps[cells(schedule.num_timesteps)]
    return validation.errors(model, times, schedule.prediction)


def by_area(process: Method, errors: Tensor) -> dict[str, float]:
    """Name of an area -> mean of the (L,) errors there; only areas that have timesteps."""
    schedule = process.schedule
    areas = increments(schedule)
    t = cells(schedule.num_timesteps) + 1  # as the paper counts
    tau = areas.tau(SUPPRESSION)
    place = (t > min(areas.t_ad, tau)).long() + (t > tau).long()
    return {
        name: float(errors[place == number].mean())
        for number, name in enumerate(AREAS)
        if bool((place == number).any())
    }


def measured_increments(process: Method, batch: Batch, seed: int) -> tuple[Tensor, Tensor]:
    """((L,) squared mean factor, (L,) variance) of increments of noised images, as measured.

    The mean factor is that of the clean image in the mean increment, by least squares; the variance
    is that of what is left. The mean is over each noise and its negative: it is a thousandth of the
    noise, whose own mean over as many images would hide it. States of processes that let the
    variance grow or shrink are scaled to keep it, as the theorem has them.
    """
    table, x = process.table, batch.images.double()
    root = torch.tensor(seed, device=x.device)
    first, second = (
        normal(root + k, batch.ids, batch.images[0].numel(), Stream.NOISE).view_as(x).double()
        for k in range(2)
    )
    factors, variances = [], []
    timesteps = process.schedule.timesteps
    for cell in cells(process.schedule.num_timesteps).clamp(max=len(timesteps) - 2):
        here, there = (_kept(table.rows_at(float(timesteps[cell + k]))) for k in range(2))
        noise = there[1] * second - here[1] * first
        drawn = (there[0] - here[0]) * x + torch.stack([noise, -noise])
        factor = (drawn.mean(0) * x).sum() / x.square().sum()
        factors.append(factor.square())
        variances.append((drawn - factor * x).var())
    return torch.stack(factors).cpu(), torch.stack(variances).cpu()


def _kept(rows: Rows) -> tuple[float, float]:
    """Factors of image and noise in a state, scaled so that their squares add up to 1."""
    scale = math.hypot(float(rows.a_x), float(rows.a_e))
    return float(rows.a_x) / scale, float(rows.a_e) / scale


def draw(
    path: Path,
    process: Method,
    curves: Mapping[str, Tensor],
    measured: tuple[Tensor, Tensor],
    title: str,
) -> None:
    """Write the picture.

    Args:
        path: of the PNG.
        process: of the run.
        curves: name of a model -> its (L,) losses.
        measured: what ``measured_increments`` returns.
        title: of the picture.
    """
    from matplotlib.figure import Figure

    schedule = process.schedule
    areas = increments(schedule)
    at = cells(schedule.num_timesteps)
    t = at + 1
    figure = Figure(figsize=(13, 3.6), layout="constrained")
    loss, variance, mean = figure.subplots(1, 3)
    for number, (name, errors) in enumerate(curves.items(), 1):
        loss.plot(t, errors, color="0.2", alpha=number / len(curves), label=name)
    loss.set_title(f"mean squared error of {schedule.prediction}", loc="left", fontsize=10)
    squares, variances = measured
    variance.plot(t, variances, ".", color="0.2", label="measured")
    variance.plot(t, areas.variance_bound[at], color="#d95f02", label="bound from below")
    variance.set_title("variance of the increment", loc="left", fontsize=10)
    mean.plot(t, squares, ".", color="0.2", label="measured")
    mean.plot(t, areas.mean_bound[at], color="#d95f02", label="bound from above")
    mean.set_title("square of its mean, as a factor of the image", loc="left", fontsize=10)
    mean.set_yscale("log")
    for panel in (loss, variance, mean):
        shades = shade_areas(panel, areas, schedule.num_timesteps)
        panel.legend(frameon=False, fontsize=8)
        panel.set_xlabel("t, counted from 1")
        panel.set_xlim(1, schedule.num_timesteps)
        panel.spines[["top", "right"]].set_visible(False)
    names = [shade.get_label().lstrip("_") for shade in shades]
    figure.legend(shades, names, loc="outside upper right", ncols=3)
    figure.suptitle(title, x=0.01, ha="left")
    figure.savefig(path, dpi=110)
