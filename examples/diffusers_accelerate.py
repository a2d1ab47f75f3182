"""diffusers' train_unconditional with accelerate, on one process or several.

    accelerate launch examples/diffusers_accelerate.py --out runs/unconditional

Two lines are SpeeD's; every process draws other timesteps, and a resumed run those of a whole one.
"""

import argparse
from itertools import chain, islice, repeat
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader

import speed_engine as se


def main() -> None:
    """Train, save, and generate a few images."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=1000, help="optimizer steps of the whole run")
    parser.add_argument("--batch-size", type=int, default=32, help="images per process and draw")
    parser.add_argument("--accumulate", type=int, default=1, help="draws per optimizer step")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--resume", action="store_true", help="from the checkpoint in --out")
    options = parser.parse_args()

    # Without sync_with_dataloader=False, the end of an epoch is the end of a step, too.
    accelerator = Accelerator(
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=options.accumulate, sync_with_dataloader=False
        )
    )
    torch.manual_seed(0)
    model = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(32, 64),
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    noise_scheduler = DDPMScheduler()
    method = se.build_method("speed_paper", noise_scheduler)  # SpeeD 1
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    images = torch.tensor(load_digits().images[:, None] / 8 - 1, dtype=torch.float32)
    loader = DataLoader(images, options.batch_size, shuffle=True, drop_last=True)  # pyright: ignore
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    accelerator.register_for_checkpointing(method)
    checkpoint, step = options.out / "checkpoint", 0
    if options.resume:
        accelerator.load_state(str(checkpoint))
        step = int((checkpoint / "step").read_text())

    draws = (options.steps - step) * options.accumulate
    for clean in islice(chain.from_iterable(repeat(loader)), draws):
        with accelerator.accumulate(model):
            noise = torch.randn_like(clean)
            timesteps, weights = method.draw(len(clean), step, clean.device)  # SpeeD 2
            noisy = noise_scheduler.add_noise(clean, noise, timesteps)
            error = F.mse_loss(model(noisy, timesteps).sample, noise, reduction="none")
            loss = (weights * error.flatten(1).mean(1)).mean()
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            step += 1
            if accelerator.is_main_process and step % 50 == 0:
                print(f"step {step}  loss {loss.item():.4f}")

    accelerator.save_state(str(checkpoint))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (checkpoint / "step").write_text(str(step))
        pipeline = DDPMPipeline(accelerator.unwrap_model(model).eval(), noise_scheduler)
        pipeline.set_progress_bar_config(disable=True)
        pipeline.save_pretrained(options.out / "pipeline")
        pipeline(batch_size=1, num_inference_steps=5).images[0].save(options.out / "image.png")
    accelerator.end_training()


if __name__ == "__main__":
    main()
