"""One step of the loop of diffusers' training scripts, on a model of diffusers of equal size.

``torch.randint``, ``DDPMScheduler.add_noise``, ``F.mse_loss``, clipping, ``AdamW``, ``EMAModel``,
and the loss read for the progress bar, as in ``train_unconditional.py``; without accelerate, which
for one process in float32 adds nothing.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speed_engine.build import build_model
from speed_engine.config import TrainConfig
from speed_engine.data.batch import Batch
from speed_engine.models.config import DiTConfig
from speed_engine.models.dit import DiT

GRAD_CLIP = 1.0  # of the script, where the run's own is infinite


class DiffusersStep:
    """Call it with a batch: one optimizer step.

    Args:
        config: what is trained here, without a learned variance.
        device: to train on.
    """

    def __init__(self, config: TrainConfig, device: torch.device) -> None:
        from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
        from diffusers.training_utils import EMAModel

        self.model = build(config).to(device).train()
        settings = config.optimizer
        self.scheduler = DDPMScheduler(config.num_timesteps)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=settings.learning_rate,
            betas=(settings.beta1, settings.beta2),
            weight_decay=settings.weight_decay,
        )
        self.average = EMAModel(
            self.model.parameters(), decay=settings.ema_decay, use_ema_warmup=True
        )
        self.grad_clip = min(settings.grad_clip, GRAD_CLIP)
        self.num_timesteps = config.num_timesteps
        self.shown = 0.0

    def __call__(self, batch: Batch) -> None:
        clean = batch.images
        noise = torch.randn_like(clean)
        timesteps = torch.randint(0, self.num_timesteps, (len(clean),), device=clean.device).long()
        noisy = self.scheduler.add_noise(clean, noise, timesteps)  # pyright: ignore[reportArgumentType]
        answer = self.model(noisy, timesteps, class_labels=batch.conditions["labels"]).sample
        loss = F.mse_loss(answer.float(), noise.float())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.average.step(self.model.parameters())
        self.shown = loss.detach().item()


def build(config: TrainConfig) -> nn.Module:
    """diffusers' network of the configured size: for a U-Net the nearest that it has."""
    return _dit(config) if isinstance(config.model, DiTConfig) else _unet(config)


def inputs(config: TrainConfig) -> dict[str, Tensor]:
    """Of its forward pass, for one image."""
    first = "hidden_states" if isinstance(config.model, DiTConfig) else "sample"
    image = torch.zeros(1, *config.data.image_shape)
    zero = torch.zeros(1, dtype=torch.int64)
    return {first: image, "timestep": zero, "class_labels": zero}


def _dit(config: TrainConfig) -> nn.Module:
    from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel

    with torch.device("meta"):
        ours = build_model(config)
    assert isinstance(ours, DiT)
    channels, height, _ = config.data.image_shape
    return DiTTransformer2DModel(
        num_attention_heads=ours.num_heads,
        attention_head_dim=ours.x_embedder.proj.out_channels // ours.num_heads,
        in_channels=channels,
        num_layers=len(ours.blocks),
        sample_size=height,
        patch_size=ours.patch_size,
        num_embeds_ada_norm=config.data.num_classes,
    )


def _unet(config: TrainConfig) -> nn.Module:
    """Widths, blocks and the level with attention as of the U-Net "speed"."""
    from diffusers.models.unets.unet_2d import UNet2DModel

    channels, height, _ = config.data.image_shape
    whole = config.model.size is not None
    return UNet2DModel(
        sample_size=height,
        in_channels=channels,
        out_channels=channels,
        layers_per_block=3 if whole else 1,
        block_out_channels=(128, 256, 256, 128) if whole else (32, 64),
        down_block_types=_levels("DownBlock2D", 4 if whole else 2),
        up_block_types=_levels("UpBlock2D", 4 if whole else 2)[::-1],
        attention_head_dim=128 if whole else 32,
        num_class_embeds=config.data.num_classes + 1,
    )


def _levels(kind: str, count: int) -> tuple[str, ...]:
    """Attention at the second level."""
    return tuple(f"Attn{kind}" if level == 1 else kind for level in range(count))


def step_on(config: TrainConfig, device: torch.device, batch: Batch) -> Callable[[], object]:
    """The loop's step on one batch again and again."""
    step = DiffusersStep(config, device)
    return lambda: step(batch)
