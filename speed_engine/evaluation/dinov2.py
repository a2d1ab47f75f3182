"""The features of DINOv2, by which FD-DINOv2 compares images (Stein et al. 2023).

They are the class token after the last norm (Oquab et al. 2023), 1024 features of the ViT-L/14, of
pictures resized to 224 x 224 by bicubic interpolation with antialiasing, as EDM2's evaluation does.

Letters: N images, C channels (3), H x W pixels, D features.
"""

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speed_engine.encoders.hub import load_model, sha256_of
from speed_engine.evaluation.features import Extractor, import_torch_fidelity
from speed_engine.runtime.checks import UserError

MODEL = "facebook/dinov2-large"  # on the Hugging Face hub
SIDE = 224  # pixels
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, in [0, 1]


@dataclass(frozen=True, kw_only=True)
class Dinov2Features(Extractor):
    """The features of a DINOv2 network."""

    network: Any = field(repr=False, compare=False)  # transformers' Dinov2Model

    def register(self) -> None:
        """Make torch-fidelity know ``name``; a second call does nothing."""
        import_torch_fidelity()
        from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY, register_feature_extractor

        if self.name not in FEATURE_EXTRACTORS_REGISTRY:
            register_feature_extractor(self.name, _adapter_class(self.network))


def dinov2_features(folder: Path | None = None) -> Dinov2Features:
    """DINOv2 from a folder; never downloads.

    Args:
        folder: of the network, as transformers saves it, safetensors; by default where the Hugging
            Face hub keeps ``facebook/dinov2-large``.

    Raises:
        UserError: transformers is missing, or the folder does not hold a DINOv2.
    """
    name = MODEL if folder is None else str(folder)
    remedy = (
        f"`hf download {MODEL}` fetches it into the cache of the hub; another folder is named by "
        "--dinov2-weights PATH, in training --evaluation.dinov2-weights PATH."
    )
    if folder is not None and not folder.is_dir():
        raise UserError(f"the folder {folder} of DINOv2 does not exist; {remedy}")
    cpu = torch.device("cpu")
    try:
        network = load_model("transformers", "AutoModel", name, cpu, local_files_only=True)
    except UserError as error:
        raise UserError(f"DINOv2: {error} {remedy}") from error
    if type(network).__name__ != "Dinov2Model":
        raise UserError(f"{name} holds a {type(network).__name__} and no Dinov2Model; {remedy}")
    digest = sha256_of(network.state_dict())
    _fit_positions(network)
    return Dinov2Features(
        name=f"dinov2-{digest[:16]}",
        weights_sha256=digest,
        feature_dim=network.config.hidden_size,
        channels=3,
        network=network,
    )


def _fit_positions(network: Any) -> None:
    """Resize the embeddings of positions as facebookresearch/dinov2 does.

    It adds 0.1 to the number of patches before it computes the scale, which transformers does not.
    """
    positions, side = network.embeddings.position_embeddings, SIDE // network.config.patch_size
    of_class, of_patches = positions[:, :1], positions[:, 1:]
    before = round(of_patches.shape[1] ** 0.5)
    if before == side:
        return
    grid = of_patches.unflatten(1, (before, before)).permute(0, 3, 1, 2)
    scale = (side + 0.1) / before
    grid = F.interpolate(grid, scale_factor=(scale, scale), mode="bicubic")
    resized = torch.cat([of_class, grid.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)
    network.embeddings.position_embeddings = nn.Parameter(resized, requires_grad=False)


def _adapter_class(network: Any) -> type:
    """A torch-fidelity extractor class around ``network``; see classifier.py."""
    from torch_fidelity.feature_extractor_base import FeatureExtractorBase

    class Dinov2Adapter(FeatureExtractorBase):
        """(N, 3, H, W) uint8 -> (N, D) float64."""

        def __init__(self, name: str, features_list: list[str], **_settings: object) -> None:
            super().__init__(name, features_list)
            self.network = copy.deepcopy(network)  # torch-fidelity moves it to its own device

        def forward(self, images: Tensor) -> tuple[Tensor, ...]:
            pixels = F.interpolate(images.float(), (SIDE, SIDE), mode="bicubic", antialias=True)
            mean, std = (pixels.new_tensor(of).view(3, 1, 1) for of in (MEAN, STD))
            answer = self.network(pixel_values=(pixels / 255 - mean) / std)
            return (answer.pooler_output.double(),)  # torch-fidelity averages in this dtype

        @staticmethod
        def get_provided_features_list() -> tuple[str, ...]:
            return ("features",)

        @staticmethod
        def get_default_feature_layer_for_metric(metric: str) -> str:
            return "features"

        @staticmethod
        def can_be_compiled() -> bool:
            return False

    return Dinov2Adapter
