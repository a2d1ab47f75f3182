"""Images from a trained model, and the grid that shows them.

Image i is a function of (model, seed, i, its conditions): the same in any batch.

Letters: N images, B images per batch.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from speed_engine.diffusion.conditions import Conditions, hidden
from speed_engine.diffusion.schedule import NoiseSchedule
from speed_engine.diffusion.solvers import ddim
from speed_engine.diffusion.table import TimestepTable
from speed_engine.ops import Stream, normal

GRID_COLUMNS, GRID_ROWS = 10, 10
GRID_IMAGE_PIXELS = 48  # smallest side of one image in a grid, by enlarging whole pixels


@torch.no_grad()  # sharded models cannot gather their parameters in inference mode
def generate(
    model: nn.Module,
    schedule: NoiseSchedule,
    table: TimestepTable,
    conditions: Conditions,
    ids: Tensor,
    *,
    image_shape: tuple[int, int, int],
    null: Mapping[str, Tensor],
    seed: int,
    num_steps: int,
    guidance: float = 1.0,
    latents: bool = False,
    batch_size: int = 500,
) -> Tensor:
    """Draw images.

    Args:
        model: ``model(x_in, t, **conditions)``, in evaluation mode.
        schedule: the process the model was trained on.
        table: its linear form.
        conditions: (N, ...) each, by the name of the model's argument.
        ids: (N,) int64, which images these are.
        image_shape: (C, H, W).
        null: value of one row of the conditions that guidance hides.
        seed: root of the noise.
        num_steps: model evaluations per image; twice as many with guidance.
        guidance: answers are extrapolated from not told to told by this factor; 1 is none.
        latents: images are not bounded by [-1, 1] and are returned as they are.
        batch_size: B, images at a time; changes nothing but memory.

    Returns:
        (N, C, H, W) on the CPU: uint8 pixels, or float32 latents.
    """
    device = next(model.parameters()).device
    root = torch.tensor(seed, device=device)

    def predict(x: Tensor, t: float) -> Tensor:
        time = schedule.model_time(torch.tensor(t, dtype=schedule.timesteps.dtype))
        times = time.to(device).expand(len(x))
        answer = _answer(model, x, times, told)
        if guidance == 1:
            return answer
        untold = _answer(model, x, times, hidden(told, null))
        return untold + guidance * (answer - untold)

    images = []
    for start in range(0, len(ids), batch_size):
        part = slice(start, start + batch_size)
        told = {name: value[part].to(device) for name, value in conditions.items()}
        noise = normal(root, ids[part].to(device), int(np.prod(image_shape)), Stream.GENERATION)
        noise = noise.view(-1, *image_shape)
        x = ddim(predict, schedule, table, noise, num_steps, clip=not latents)
        images.append(x.cpu() if latents else ((x + 1) * 127.5).round().to(torch.uint8).cpu())
    return torch.cat(images)


def _answer(model: nn.Module, x: Tensor, times: Tensor, told: Conditions) -> Tensor:
    """(B, C, H, W): the target's channels, without those of a learned variance."""
    return model(x, times, **told)[:, : x.shape[1]]


def grid_rows(num_images: int, conditions: Conditions) -> Tensor:
    """(N,) int64 row of each image in a grid: its class, or else as many in each as fit."""
    return conditions.get("labels", torch.arange(num_images) // GRID_COLUMNS)


def save_images(images: Tensor, rows: Tensor, path: Path) -> Path:
    """Write what was drawn, a grid of pixels or an array of latents, and return where.

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
    np.save(path, images.numpy(), allow_pickle=False)
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
    lines = num_rows * (height * scale + gap) + gap
    columns = GRID_COLUMNS * (width * scale + gap) + gap
    canvas = np.full((lines, columns, channels), 96, dtype=np.uint8)
    for row in range(num_rows):
        for column, image in enumerate(images[rows == row][:GRID_COLUMNS]):
            enlarged = image.permute(1, 2, 0).numpy().repeat(scale, 0).repeat(scale, 1)
            top = gap + row * (height * scale + gap)
            left = gap + column * (width * scale + gap)
            canvas[top : top + height * scale, left : left + width * scale] = enlarged
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(canvas.squeeze(-1) if channels == 1 else canvas).save(path)
