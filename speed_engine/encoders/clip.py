"""CLIP score: whether pictures show what the texts say that they were generated from.

    mean over pictures of 100 max(cos(E_image, E_text), 0)    (Hessel et al. 2021, there times 2.5)

Letters: N pictures, C channels, H height, W width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from speed_engine.encoders.hub import load_model, load_pretrained, weights_hash
from speed_engine.runtime.checks import UserError
from speed_engine.runtime.precision import exact_float32

BATCH_SIZE = 64  # pictures at a time


class ClipScore:
    """A CLIP model that compares pictures with texts.

    Args:
        name: folder of a CLIPModel with its processor, or their name on the hub.
        device: where it runs.

    Attributes:
        weights_sha256: of the model.

    Raises:
        UserError: transformers is missing, or cannot load them.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        self._processor = load_pretrained("transformers", "CLIPProcessor", name)
        self._model = load_model("transformers", "CLIPModel", name, device)
        self._device = device
        self.weights_sha256 = weights_hash(self._model)

    @torch.inference_mode()
    def __call__(self, images: Tensor, texts: Sequence[str]) -> float:
        """(N, C, H, W) uint8, grey or RGB, and N texts -> in [0, 100].

        Raises:
            UserError: the images are no pictures, or not as many as the texts.
        """
        if images.dtype != torch.uint8 or images.shape[1] not in (1, 3):
            raise UserError(
                f"images are {tuple(images.shape)} {images.dtype}; a CLIP score needs pictures, "
                "grey or RGB, uint8. Latents need data.vae to decode them."
            )
        if len(texts) != len(images):
            raise UserError(f"{len(images)} images and {len(texts)} texts; needed: one for each.")
        scores = [
            self._cosines(images[i : i + BATCH_SIZE], list(texts[i : i + BATCH_SIZE]))
            for i in range(0, len(images), BATCH_SIZE)
        ]
        return 100 * torch.cat(scores).clamp(min=0).mean().item()

    def _cosines(self, images: Tensor, texts: list[str]) -> Tensor:
        """(N,) float64."""
        inputs = self._processor(
            text=texts,
            images=list(images.expand(-1, 3, -1, -1)),
            return_tensors="pt",
            padding=True,
            truncation=True,
            max_length=self._model.config.text_config.max_position_embeddings,
        )
        with exact_float32():
            answer = self._model(**inputs.to(self._device))
        pairs = answer.image_embeds.double(), answer.text_embeds.double()
        return torch.nn.functional.cosine_similarity(*pairs).cpu()
