"""A loop in the style of k-diffusion: noise levels sigma, EDM's preconditioning.

    python examples/sigma_loop.py --out runs/sigma

Two lines are SpeeD's: in place of a log-normal draw of sigma and its weight.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import EDMEulerScheduler, UNet2DModel
from sklearn.datasets import load_digits
from torch import Tensor

import speed_engine as se

SIGMA_DATA = 0.5


def scalings(sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(c_skip, c_out, c_in) of Karras et al. 2022."""
    total = sigma.square() + SIGMA_DATA**2
    return SIGMA_DATA**2 / total, sigma * SIGMA_DATA / total.sqrt(), total.rsqrt()


def main() -> None:
    """Train, and generate a few images by Euler steps."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()

    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    images = torch.tensor(load_digits().images[:, None] / 8 - 1, dtype=torch.float32).to(device)
    model = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1,
        block_out_channels=(32, 64), norm_num_groups=8, time_embedding_type="fourier",
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ).to(device)  # fmt: skip
    method = se.build_method("speed_paper", EDMEulerScheduler(sigma_data=SIGMA_DATA))  # SpeeD 1
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(options.steps):
        clean = images[torch.randint(len(images), (options.batch_size,))]
        c_noise, weights = method.draw(len(clean), step, device)  # SpeeD 2
        sigma = (4 * c_noise).exp()[:, None, None, None]
        c_skip, c_out, c_in = scalings(sigma)
        noisy = clean + sigma * torch.randn_like(clean)
        target = (clean - c_skip * noisy) / c_out
        answer = model(c_in * noisy, sigma.flatten()).sample
        error = F.mse_loss(answer, target, reduction="none").flatten(1).mean(1)
        loss = (weights * error).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % 50 == 0:
            print(f"step {step + 1}  loss {loss.item():.4f}")

    sigmas = torch.logspace(1.9, -2.7, 20, device=device).tolist() + [0.0]
    x = torch.randn(16, 1, 8, 8, device=device) * sigmas[0]
    with torch.no_grad():
        for now, after in zip(sigmas, sigmas[1:], strict=False):
            sigma = torch.full((len(x), 1, 1, 1), now, device=device)
            c_skip, c_out, c_in = scalings(sigma)
            denoised = c_skip * x + c_out * model(c_in * x, sigma.flatten()).sample
            x = x + (x - denoised) / now * (after - now)
    options.out.mkdir(parents=True, exist_ok=True)
    torch.save({"model": model.state_dict(), "images": x}, options.out / "trained.pt")


if __name__ == "__main__":
    main()
