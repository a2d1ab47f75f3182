"""PyTorch Lightning, on one process or several.

    python examples/pytorch_lightning.py --devices 2 --out runs/lightning

Two lines are SpeeD's. Beside them the module hands the method's state to Lightning's checkpoints,
so that a resumed run draws the timesteps of a whole one.
"""

import argparse
from pathlib import Path
from typing import Any

import lightning
import torch
import torch.nn.functional as F
from diffusers import DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler
from lightning.pytorch.callbacks import ModelCheckpoint
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import speed_engine as se


class Flow(lightning.LightningModule):
    """A class-conditional DiT, trained as a rectified flow with shifted timesteps."""

    def __init__(self) -> None:
        super().__init__()
        self.model = DiTTransformer2DModel(
            num_attention_heads=4,
            attention_head_dim=16,
            in_channels=1,
            num_layers=2,
            sample_size=8,
            patch_size=2,
            norm_num_groups=1,
            num_embeds_ada_norm=1000,
        )
        self.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        self.method = se.build_method("speed_paper", self.scheduler)  # SpeeD 1

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The weighted error of the velocity."""
        clean, labels = batch
        noise, step = torch.randn_like(clean), self.global_step
        timesteps, weights = self.method.draw(len(clean), step, clean.device)  # SpeeD 2
        noisy = self.scheduler.scale_noise(clean, timesteps, noise)
        velocity = self.model(noisy, timestep=timesteps, class_labels=labels).sample
        error = F.mse_loss(velocity, noise - clean, reduction="none").flatten(1).mean(1)
        loss = (weights * error).mean()
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=1e-3)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """With the state of the method."""
        checkpoint["method"] = self.method.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Draw on where the checkpoint was written."""
        self.method.load_state_dict(checkpoint["method"])


def main() -> None:
    """Train."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=1000, help="optimizer steps of the whole run")
    parser.add_argument("--batch-size", type=int, default=32, help="images per process")
    parser.add_argument("--devices", type=int, default=1, help="processes")
    parser.add_argument("--accelerator", default="auto", help="cpu, gpu or auto")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--resume", action="store_true", help="from the checkpoint in --out")
    options = parser.parse_args()

    lightning.seed_everything(0, verbose=False)
    digits = load_digits()
    images = torch.tensor(digits.images[:, None] / 8 - 1, dtype=torch.float32)
    labels = torch.tensor(digits.target)
    loader = DataLoader(
        TensorDataset(images, labels), options.batch_size, shuffle=True, drop_last=True
    )
    trainer = lightning.Trainer(
        max_steps=options.steps,
        devices=options.devices,
        accelerator=options.accelerator,
        strategy="ddp" if options.devices > 1 else "auto",
        default_root_dir=options.out,
        callbacks=[ModelCheckpoint(options.out, save_last=True, save_top_k=0)],
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=50,
    )
    checkpoint = options.out / "last.ckpt"
    trainer.fit(Flow(), loader, ckpt_path=str(checkpoint) if options.resume else None)
    trainer.save_checkpoint(checkpoint)


if __name__ == "__main__":
    main()
