"""A plain diffusers training loop that draws and weighs timesteps with a speed_engine method.

The loop is that of diffusers' unconditional example (examples/unconditional_image_generation):
UNet2DModel, noise scheduler, AdamW, a pipeline at the end. speed_engine has three lines, marked (1)
to (3), and an import: (1) is new, (2) takes the place of

    timesteps = torch.randint(0, noise_scheduler.config.num_train_timesteps, (batch_size,))

and (3), with the line before it, that of

    loss = F.mse_loss(prediction, target)

Of the method's own weights, if it learns any, the optimizer has a group.

The data are read by speed_engine as well; any other source of images would do.

    python scripts/train_with_diffusers.py --method speed_paper --scheduler ddpm
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
import tyro
from diffusers import (
    DDPMPipeline,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    UNet2DModel,
)
from diffusers.utils import make_image_grid
from torch import Tensor

from speed_engine.data.format.reader import ShardReader
from speed_engine.data.loading.clean import Cleaning
from speed_engine.data.loading.loader import Loader
from speed_engine.data.loading.order import Feed
from speed_engine.data.preparing.sources.digits import digits_folder
from speed_engine.diffusion.method import build_method

AVERAGED = 10  # steps at either end whose mean loss is printed
GRID_ROWS, GRID_COLUMNS = 4, 8


@dataclass(frozen=True, kw_only=True)
class Options:
    """Train a small UNet2DModel on handwritten digits with diffusers."""

    method: str = "speed_paper"
    """A method of `speed-engine methods`."""
    scheduler: Literal["ddpm", "flow"] = "ddpm"
    """DDPMScheduler with noise as target, or FlowMatchEulerDiscreteScheduler with velocity."""
    steps: int = 400
    """Optimizer steps."""
    batch_size: int = 64
    """Images per step."""
    learning_rate: float = 1e-3
    """Of AdamW."""
    sampling_steps: int = 50
    """Model evaluations per image drawn at the end."""
    seed: int = 0
    """Of parameters, data order, noise and timesteps."""
    out: Path = Path("runs/diffusers")
    """Folder for the pipeline and the picture samples.png."""


def unet() -> UNet2DModel:
    """0.5 million parameters for images of 8 x 8 pixels."""
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(32, 64),
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )


def noisy_and_target(
    noise_scheduler: Any, images: Tensor, noise: Tensor, timesteps: Tensor
) -> tuple[Tensor, Tensor]:
    """What the model sees and what it should answer, as diffusers' examples have them."""
    if isinstance(noise_scheduler, FlowMatchEulerDiscreteScheduler):
        return noise_scheduler.scale_noise(images, timesteps, noise), noise - images
    return noise_scheduler.add_noise(images, noise, timesteps), noise


def train(options: Options) -> None:
    torch.manual_seed(options.seed)
    model = unet()
    noise_scheduler = SCHEDULERS[options.scheduler]()
    reader = ShardReader(digits_folder())
    method = build_method(options.method, noise_scheduler)  # (1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate)
    if learned := method.parameters():
        rate = method.batch_loss.learning_rate or options.learning_rate
        optimizer.add_param_group({"params": learned, "lr": rate, "weight_decay": 0.0})

    losses = []
    clean = Cleaning(torch.tensor(options.seed))
    with Loader(reader, (1, 8, 8), Feed(options.batch_size, options.seed)) as loader:
        for step, stored in zip(range(options.steps), loader, strict=False):
            images = clean.batch(stored).images  # pixels in [-1, 1]
            noise = torch.randn_like(images)
            timesteps, _ = method.draw(len(images), step, images.device)  # (2)
            noisy, target = noisy_and_target(noise_scheduler, images, noise, timesteps)
            prediction = model(noisy, timesteps).sample
            error = F.mse_loss(prediction, target, reduction="none").mean((1, 2, 3))
            loss = method.loss(error)  # (3)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())

    first, last = losses[:AVERAGED], losses[-AVERAGED:]
    print(f"loss      {sum(first) / len(first):.4f} -> {sum(last) / len(last):.4f}")
    pipeline = DDPMPipeline(model.eval(), noise_scheduler)
    pipeline.save_pretrained(options.out)
    pipeline.set_progress_bar_config(disable=True)
    drawn = pipeline(
        batch_size=GRID_ROWS * GRID_COLUMNS, num_inference_steps=options.sampling_steps
    ).images
    picture = options.out / "samples.png"
    make_image_grid(drawn, GRID_ROWS, GRID_COLUMNS, resize=48).save(picture)
    print(f"samples   {picture}")


SCHEDULERS: dict[str, Callable[[], Any]] = {
    "ddpm": DDPMScheduler,
    "flow": FlowMatchEulerDiscreteScheduler,
}

if __name__ == "__main__":
    train(tyro.cli(Options))
