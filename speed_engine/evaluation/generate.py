"""Images from a trained model, and the grid that shows them.

Image i is a function of (model, seed, i, its conditions): the same in any batch, but for rounding.

Letters: N images, B images per batch.
"""

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from speed_engine.diffusion.conditions import Conditions, hidden
from speed_engine.diffusion.solvers import Denoising, check_solver, solver_named
from speed_engine.diffusion.table import TimestepTable
from speed_engine.ops import Stream, normal
from speed_engine.runtime.checks import MOST, UserError, check_seed, check_whole
from speed_engine.runtime.files import replacing
from speed_engine.runtime.precision import autocast
from speed_engine.runtime.sharding import computing_device

log = logging.getLogger(__name__)

GRID_COLUMNS, GRID_ROWS = 10, 10
GRID_IMAGE_PIXELS = 48  # smallest side of one image in a grid, by enlarging whole pixels


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """How images are generated.

    Attributes:
        solver: a key of ``SOLVERS``, with its options, see ``solver_named``.
        steps: model evaluations per image; twice as many with guidance.
        guidance: scale of classifier-free guidance; answers are extrapolated from unconditional to
            conditional ones by this factor, so that 1 is none. A learned variance is taken from
            the conditional answer.
        interval: guide where sigma / alpha is above the first and at most the second
            (Kynkaanniemi et al. 2024), and ask the model once elsewhere; None guides everywhere.
        channels: guide so many of the first channels, as DiT's published code does with 3 of 4;
            None guides all.

    Raises:
        UserError: an unknown solver, or an option that it does not have or that is out of range.
    """

    solver: str = "ddim"
    steps: int = 25
    guidance: float = 1.0
    interval: tuple[float, float] | None = None
    channels: int | None = None

    def __post_init__(self) -> None:
        check_solver(self.solver)

    def record(self) -> dict[str, Any]:
        """As records and unfinished images hold them; None is an end at infinity, not in JSON."""
        ends = [end if math.isfinite(end) else None for end in self.interval or ()]
        return {
            "solver": self.solver,
            "solver_steps": self.steps,
            "guidance": self.guidance,
            "guidance_interval": ends or None,
            "guidance_channels": self.channels,
        }


@torch.no_grad()  # sharded models cannot gather their parameters in inference mode
def generate(
    model: nn.Module,
    table: TimestepTable,
    conditions: Conditions,
    ids: Tensor,
    settings: GenerationSettings,
    *,
    image_shape: tuple[int, int, int],
    null: Mapping[str, Tensor],
    seed: int,
    latents: bool = False,
    batch_size: int = 500,
    advance: Callable[[float], object] = lambda images: None,
    on_broken: Callable[[str], object] = log.warning,
) -> Tensor:
    """Generate images, computing in the precision that the model is trained in on its device.

    Args:
        model: ``model(x_in, t, **conditions)``, in evaluation mode.
        table: the linear form of the process that the model was trained on.
        conditions: (N, ...) each, by the name of the model's argument.
        ids: (N,) int64, which images these are.
        settings: how.
        image_shape: (C, H, W).
        null: value of one row of the conditions that guidance hides.
        seed: root of the noise.
        latents: images are not bounded by [-1, 1] and are returned as they are.
        batch_size: B, images at a time; changes nothing but memory and rounding. Where they take
            more memory than the device has, a half, a quarter and so on of them; not on several
            processes, which compute together.
        advance: called with how many images were generated since, of which a step of a solver
            makes a part; less than 0 where they are generated again.
        on_broken: called with a sentence where images are not finite, which are no pictures.

    Returns:
        (N, C, H, W) on the CPU: uint8 pixels, or float32 latents.

    Raises:
        UserError: an unknown solver, too many steps, guidance on what cannot be hidden, or a seed
            or a batch size that is none.
    """
    check_seed(seed)
    check_whole("batch_size", batch_size, 1, MOST)
    device, schedule = computing_device(model), table.schedule
    root, ids = torch.full((), seed, device=device), ids.to(device)
    null = {name: value.to(device) for name, value in null.items()}
    solve = solver_named(settings.solver)
    check_guidance(settings.guidance, conditions, null)
    low, high = settings.interval or (0.0, math.inf)

    def ask(x: Tensor, times: Tensor, conditions: Conditions) -> Tensor:
        with autocast(device.type):
            return model(x, times, **conditions).float()  # solvers sum in float32 or more

    def predict(x: Tensor, t: float) -> Tensor:
        nonlocal advanced
        # The schedule is asked on the CPU, and its numbers travel in kernels' arguments: no step
        # waits for the device.
        advanced += len(x) / settings.steps
        advance(len(x) / settings.steps)
        time = torch.tensor(t, dtype=schedule.timesteps.dtype)
        at = schedule.model_time(time)
        times = torch.full((len(x),), at.item(), dtype=at.dtype, device=device)
        answer = ask(x, times, given)
        if settings.guidance == 1 or not low < schedule.sigma(time) / schedule.alpha(time) <= high:
            return answer
        channels = min(x.shape[1], settings.channels or x.shape[1])
        unconditional = ask(x, times, hidden(given, null))[:, :channels]
        guided = unconditional + settings.guidance * (answer[:, :channels] - unconditional)
        return torch.cat([guided, answer[:, channels:]], dim=1)

    images: list[Tensor] = []
    start, size = 0, batch_size
    while start < len(ids):
        part, advanced = slice(start, start + size), 0.0
        given = {name: value[part].to(device) for name, value in conditions.items()}
        noise = partial(_noise, root, ids[part], image_shape)
        problem = Denoising(
            predict, table, lambda step, noise=noise: noise(Stream.SOLVER, step), clip=not latents
        )
        try:
            images.append(solve(problem, noise(Stream.GENERATION), settings.steps).cpu())
        except torch.OutOfMemoryError:
            count = len(ids[part])
            if count == 1 or not _is_alone():
                raise
            _say_too_many(batch_size)
            advance(-advanced)
            size = (count + 1) // 2
        else:
            start += size
    found = torch.cat(images)
    if broken := int((~found.isfinite().flatten(1).all(dim=1)).sum()):
        on_broken(_broken(broken, len(found), settings))
    return found if latents else ((found + 1) * 127.5).round().to(torch.uint8)


def _is_alone() -> bool:
    """Whether no other process would wait for this one to compute what it does."""
    group = torch.distributed
    return not (group.is_available() and group.is_initialized() and group.get_world_size() > 1)


@cache
def _say_too_many(images: int) -> None:
    """Once in a process, however often as many are tried."""
    log.warning(
        "%d images at a time take more memory than the device has: a half, a quarter and so on of "
        "them are generated at a time. A smaller --batch-size, in training "
        "--evaluation.batch-size, tries no more than fit.",
        images,
    )


def _broken(count: int, total: int, settings: GenerationSettings) -> str:
    return (
        f"{count} of {total} generated images are not finite, so that they are no pictures: the "
        f"model's weights are not finite or far too large, or guidance={settings.guidance:g} is "
        f"too much for solver={settings.solver} with {settings.steps} steps."
    )


def check_guidance(guidance: float, conditions: Conditions, null: Mapping[str, Tensor]) -> None:
    """Whether guidance has something to hide, to be known before anything is generated.

    Raises:
        UserError: it has not.
    """
    if guidance != 1 and not conditions.keys() & null.keys():
        given = ", ".join(conditions) or "nothing"
        raise UserError(
            f"guidance={guidance:g} compares a model conditioned on a class or a text with itself "
            f"without it; this one is conditioned on {given}: set the guidance to 1."
        )


def _noise(
    root: Tensor, ids: Tensor, image_shape: tuple[int, int, int], stream: Stream, step: int = 0
) -> Tensor:
    """(B, C, H, W) standard normal, of a step of a solver: ids stay below 2**40."""
    return normal(root, ids + (step << 40), math.prod(image_shape), stream).view(-1, *image_shape)


def grid_rows(num_images: int, conditions: Conditions) -> Tensor:
    """(N,) int64 row of each image in a grid: a row per class, or else as many in each as fit.

    More classes than a grid has rows are shown one after the other, as images without classes are.
    """
    labels = conditions.get("labels")
    if labels is not None:
        classes, row = labels.unique(return_inverse=True)
        if len(classes) <= GRID_ROWS:
            return row
    return torch.arange(num_images) // GRID_COLUMNS


def save_images(images: Tensor, rows: Tensor, path: Path) -> Path:
    """Write what was generated, a grid of pixels or an array of latents, and return where.

    Args:
        images: (N, C, H, W) as ``generate`` returns them.
        rows: (N,) int64, of each image in the grid.
        path: of the picture; latents go beside it as npy.
    """
    if images.dtype == torch.uint8:
        save_grid(images, rows, path)
        return path
    path = path.with_suffix(".npy")
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.save(file, images.numpy(), allow_pickle=False)
    return path


def save_grid(images: Tensor, rows: Tensor, path: Path) -> None:
    """Write a PNG of the first rows, the first images of each side by side.

    Args:
        images: (N, C, H, W) uint8; C is 1 or 3.
        rows: (N,) int64, of each image, from 0 on.
        path: of the picture.
    """
    _, channels, height, width = images.shape
    scale = max(1, -(-GRID_IMAGE_PIXELS // min(height, width)))
    gap = max(2, scale // 2)
    num_rows = min(GRID_ROWS, int(rows.max()) + 1)
    num_columns = min(GRID_COLUMNS, int(rows.bincount().max()))
    lines = num_rows * (height * scale + gap) + gap
    columns = num_columns * (width * scale + gap) + gap
    canvas = np.full((lines, columns, channels), 96, dtype=np.uint8)
    for row in range(num_rows):
        for column, image in enumerate(images[rows == row][:GRID_COLUMNS]):
            enlarged = image.permute(1, 2, 0).numpy().repeat(scale, 0).repeat(scale, 1)
            top = gap + row * (height * scale + gap)
            left = gap + column * (width * scale + gap)
            canvas[top : top + height * scale, left : left + width * scale] = enlarged
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(canvas.squeeze(-1) if channels == 1 else canvas)
    with replacing(path) as temporary:
        picture.save(temporary, "PNG")
