"""Feature extractors: the space in which generated and real images are compared.

    classifier   a small CNN trained on the real images themselves, see classifier.py
    inception    the standard Inception-v3 of published FID numbers, 2048 features
    dinov2       DINOv2's ViT-L/14, 1024 features of FD-DINOv2, see dinov2.py

A fidelity number means something only together with its extractor, so an extractor is named by
the SHA-256 of its weights: other weights are another name, and nothing cached can be stale.
"""

import hashlib
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from types import ModuleType

import torch

from speed_engine.runtime.checks import UserError

INCEPTION = "inception-v3-compat"  # the extractor of published FID, KID and IS
INCEPTION_URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
    "weights-inception-2015-12-05-6726825d.pth"
)
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"


@dataclass(frozen=True, kw_only=True)
class Extractor:
    """A feature extractor by its name in torch-fidelity's registry."""

    name: str
    weights_sha256: str  # 64 hexadecimal digits
    feature_dim: int
    channels: int  # of the images it sees; 3 also takes grey images, repeated
    weights_path: Path | None = None  # only where torch-fidelity loads the weights itself
    on_gpu: bool = field(default=False, compare=False)  # where it computes, the current one

    def register(self) -> None:
        """Make torch-fidelity know ``name``; those it ships with it knows already."""

    def doubt(self) -> str | None:
        """Why figures in these features say little, for a person; None if nothing speaks so."""
        return None

    def describe(self) -> str:
        """For a person."""
        return f"{self.name}, {self.feature_dim} features"


def inception_features(weights_path: Path | str | None = None) -> Extractor:
    """Inception-v3 as published FID numbers use it; never downloads.

    Args:
        weights_path: the weights file; default: where torch.hub would keep it.

    Raises:
        UserError: if the file is missing, or is not bit for bit the published one. torch-fidelity
            unpickles it, which would run whatever code another file holds.
    """
    kept_at = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_URL.rpartition("/")[2]
    path = Path(weights_path or kept_at)
    if not path.is_file():
        raise UserError(
            f"the Inception weights are not at {path}; fetch {INCEPTION_URL} "
            f"and put it at {kept_at}, or name it: --inception-weights PATH, in training "
            "--evaluation.inception-weights PATH."
        )
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != INCEPTION_SHA256:
        raise UserError(
            f"{path} has SHA-256 {digest}, the published Inception weights have "
            f"{INCEPTION_SHA256}; it was not opened. Delete it and fetch {INCEPTION_URL}."
        )
    return Extractor(
        name=INCEPTION,
        weights_sha256=digest,
        feature_dim=2048,
        channels=3,
        weights_path=path,
    )


def import_torch_fidelity() -> ModuleType:
    """Import torch-fidelity, and with it torchvision, only where images are to be compared.

    Raises:
        UserError: naming the versions, if either cannot be imported.
    """
    try:
        import torch_fidelity
    except (ImportError, RuntimeError, AttributeError) as error:
        cuda = torch.version.cuda
        build = "cpu" if cuda is None else "cu" + cuda.replace(".", "")
        raise UserError(
            f"torch-fidelity cannot be imported: {error}. Installed: torch {torch.__version__}, "
            f"torchvision {_version('torchvision')}, torch-fidelity {_version('torch-fidelity')}; "
            "torchvision must be the build for this torch: pip install --force-reinstall --no-deps "
            f"torchvision --index-url https://download.pytorch.org/whl/{build}"
        ) from error
    return torch_fidelity


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "none"
