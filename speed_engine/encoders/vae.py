"""A variational autoencoder (VAE): its decoder makes pictures of latents.

Letters: B pictures, C channels and H, W of a latent.
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from speed_engine.encoders.hub import load_model, sha256_of


def load_vae(name: str, device: torch.device) -> Any:
    """A diffusers ``AutoencoderKL`` for inference, from a folder or the hub.

    Raises:
        UserError: diffusers is missing, or cannot load it.
    """
    # The default needs the library accelerate and says so at every call.
    return load_model("diffusers", "AutoencoderKL", name, device, low_cpu_mem_usage=False)


@torch.inference_mode()
def decode_latents(
    vae: Any, latents: Tensor, scale: float, shift: float = 0.0, batch_size: int = 16
) -> Tensor:
    """Latents as a model has them, scaled, to pictures.

    Args:
        vae: of ``load_vae``.
        latents: (B, C, H, W) floating point, on any device.
        scale: ``latent_scale`` of the data set.
        shift: ``latent_shift`` of it.
        batch_size: pictures at a time; changes nothing but memory.

    Returns:
        (B, 3, 8 H, 8 W) uint8 on the CPU.
    """
    pictures = []
    for part in latents.split(batch_size):
        images = vae.decode(part.to(vae.device, vae.dtype) / scale + shift).sample
        pictures.append(((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu())
    return torch.cat(pictures)


@dataclass(frozen=True)
class Decoder:
    """Makes pictures of a data set's latents: ``decoder(latents)``, see ``decode_latents``.

    Attributes:
        vae: of ``load_vae``.
        scale: ``latent_scale`` of the data set.
        shift: ``latent_shift`` of it.
    """

    vae: Any = field(repr=False)
    scale: float
    shift: float = 0.0

    def __call__(self, latents: Tensor) -> Tensor:
        """(B, C, H, W) floating point, on any device -> pictures, uint8 on the CPU."""
        return decode_latents(self.vae, latents, self.scale, self.shift)

    def picture_shape(self, latent_shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """Of the picture that a latent of this shape becomes; nothing is computed."""
        config, (_, height, width) = self.vae.config, latent_shape
        factor = 2 ** (len(config.block_out_channels) - 1)  # each block but the last doubles it
        return config.out_channels, factor * height, factor * width

    @cached_property
    def weights_sha256(self) -> str:
        """Of the VAE, 64 hexadecimal digits."""
        return sha256_of(self.vae.state_dict())
