"""A plain PyTorch loop on a vision transformer of timm, which predicts v.

    python examples/timm_vit.py --out runs/timm

Two lines are SpeeD's, and the method's state is part of the checkpoint.
"""

import argparse
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from sklearn.datasets import load_digits
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import speed_engine as se


class Denoiser(nn.Module):
    """timm's transformer on patches of 2 x 2 pixels, with a token for the timestep."""

    def __init__(self, size: int = 8, patch: int = 2, dim: int = 64) -> None:
        super().__init__()
        self.size, self.patch = size, patch
        self.vit = VisionTransformer(
            img_size=size, patch_size=patch, in_chans=1, embed_dim=dim, depth=4, num_heads=4,
            num_classes=0, global_pool="",
        )  # fmt: skip
        self.time = nn.Linear(dim, dim)
        self.pixels = nn.Linear(dim, patch * patch)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """(B, 1, H, W), (B,) -> (B, 1, H, W)."""
        half = self.time.in_features // 2
        rates = torch.exp(-math.log(10_000) / half * torch.arange(half, device=x.device))
        angles = t[:, None] * rates
        time = self.time(torch.cat([angles.cos(), angles.sin()], 1))
        tokens = self.vit._pos_embed(self.vit.patch_embed(x)) + time[:, None]
        answer = self.pixels(self.vit.norm(self.vit.blocks(tokens)))[:, 1:]  # less the class token
        patches = answer.unflatten(1, (-1, self.size // self.patch))
        patches = patches.unflatten(3, (self.patch, self.patch))
        return patches.permute(0, 1, 3, 2, 4).reshape(x.shape)


def main() -> None:
    """Train and write a checkpoint."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=1000, help="optimizer steps of the whole run")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--resume", action="store_true", help="from the checkpoint in --out")
    options = parser.parse_args()

    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    images = torch.tensor(load_digits().images[:, None] / 8 - 1, dtype=torch.float32).to(device)
    noise_scheduler = DDPMScheduler(prediction_type="v_prediction")
    method = se.build_method("min_snr", noise_scheduler)  # SpeeD 1
    model = Denoiser().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    start, path = 0, options.out / "checkpoint.pt"
    if options.resume:
        saved = torch.load(path, map_location=device)
        start = saved["step"]
        for name, part in (("model", model), ("optimizer", optimizer), ("method", method)):
            part.load_state_dict(saved[name])

    for step in range(start, options.steps):
        clean = images[torch.randint(len(images), (options.batch_size,))]
        noise = torch.randn_like(clean)
        timesteps, weights = method.draw(len(clean), step, device)  # SpeeD 2
        noisy = noise_scheduler.add_noise(clean, noise, timesteps)
        target = noise_scheduler.get_velocity(clean, noise, timesteps)
        error = F.mse_loss(model(noisy, timesteps), target, reduction="none")
        loss = (weights * error.flatten(1).mean(1)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % 50 == 0:
            print(f"step {step + 1}  loss {loss.item():.4f}")

    options.out.mkdir(parents=True, exist_ok=True)
    parts = {"model": model, "optimizer": optimizer, "method": method}
    torch.save(
        {name: part.state_dict() for name, part in parts.items()} | {"step": options.steps}, path
    )


if __name__ == "__main__":
    main()
