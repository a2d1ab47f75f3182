"""Images from a trained model, and the grid that shows them.

Image i is a function of (model, seed, i, label): the same in any batch.

Letters: N images, B images per batch, K classes.
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from speed_engine.diffusion.schedule import NoiseSchedule
from speed_engine.diffusion.solvers import ddim
from speed_engine.diffusion.table import TimestepTable
from speed_engine.ops import Stream, normal

GRID_COLUMNS = 10
GRID_IMAGE_PIXELS = 48  # smallest side of one image in a grid, by enlarging whole pixels


@torch.no_grad()  # sharded models cannot gather their parameters in inference mode
def generate(
    model: nn.Module,
    schedule: NoiseSchedule,
    table: TimestepTable,
    labels: Tensor,
    *,
    ids: Tensor | None = None,
    image_shape: tuple[int, int, int],
    null_label: int,
    seed: int,
    num_steps: int,
    guidance: float = 1.0,
    batch_size: int = 500,
) -> Tensor:
    """Draw one image per label.

    Args:
        model: ``model(x_in, t, labels)``, in evaluation mode.
        schedule: the process the model was trained on.
        table: its linear form.
        labels: (N,) int64.
        ids: (N,) int64, which images these are; by default 0, 1, ..
        image_shape: (C, H, W).
        null_label: the label that means "no label".
        seed: root of the noise.
        num_steps: model evaluations per image; twice as many with guidance.
        guidance: answers are extrapolated from unlabelled to labelled by this factor; 1 is none.
        batch_size: B, images at a time; changes nothing but memory.

    Returns:
        (N, C, H, W) uint8 on the CPU.
    """
    device = next(model.parameters()).device
    root = torch.tensor(seed, device=device)

    def predict(x: Tensor, t: float) -> Tensor:
        time = schedule.model_time(torch.tensor(t, dtype=schedule.timesteps.dtype))
        times = time.to(device).expand(len(x))
        answer = _answer(model, x, times, batch_labels)
        if guidance == 1:
            return answer
        unlabelled = _answer(model, x, times, torch.full_like(batch_labels, null_label))
        return unlabelled + guidance * (answer - unlabelled)

    images = []
    ids = torch.arange(len(labels)) if ids is None else ids
    for start in range(0, len(labels), batch_size):
        batch_labels = labels[start : start + batch_size].to(device)
        batch_ids = ids[start : start + batch_size].to(device)
        noise = normal(root, batch_ids, int(np.prod(image_shape)), Stream.GENERATION)
        x = ddim(predict, schedule, table, noise.view(-1, *image_shape), num_steps)
        images.append(((x + 1) * 127.5).round().to(torch.uint8).cpu())
    return torch.cat(images)


def _answer(model: nn.Module, x: Tensor, times: Tensor, labels: Tensor) -> Tensor:
    """(B, C, H, W): the target's channels, without those of a learned variance."""
    return model(x, times, labels)[:, : x.shape[1]]


def class_cycle(num_images: int, num_classes: int) -> Tensor:
    """(N,) int64 labels 0, 1, .. K-1, 0, 1, ..: every class equally often."""
    return torch.arange(num_images) % num_classes


def save_grid(images: Tensor, labels: Tensor, path: Path, num_classes: int) -> None:
    """Write a PNG: one row per class, its first images side by side.

    Args:
        images: (N, C, H, W) uint8; C is 1 or 3.
        labels: (N,) int64.
        path: of the picture.
        num_classes: K, rows.
    """
    _, channels, height, width = images.shape
    scale = max(1, -(-GRID_IMAGE_PIXELS // min(height, width)))
    gap = max(2, scale // 2)
    rows = num_classes * (height * scale + gap) + gap
    columns = GRID_COLUMNS * (width * scale + gap) + gap
    canvas = np.full((rows, columns, channels), 96, dtype=np.uint8)
    for label in range(num_classes):
        for column, image in enumerate(images[labels == label][:GRID_COLUMNS]):
            enlarged = image.permute(1, 2, 0).numpy().repeat(scale, 0).repeat(scale, 1)
            top = gap + label * (height * scale + gap)
            left = gap + column * (width * scale + gap)
            canvas[top : top + height * scale, left : left + width * scale] = enlarged
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(canvas.squeeze(-1) if channels == 1 else canvas).save(path)
