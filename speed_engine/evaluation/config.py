"""Configuration of evaluation."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from speed_engine.evaluation.metrics import HELP as METRICS_HELP
from speed_engine.evaluation.metrics import METRICS
from speed_engine.runtime.checks import check, check_counts


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """How the EMA generates images during training, and how they are measured against the data."""

    every: int = 500
    """Number of optimizer steps between two evaluations; one more follows the last step."""
    num_images: int = 2000
    """Number of images that an evaluation generates, from all classes in turn."""
    batch_size: int = 500
    """Number of images that a process generates at a time; fewer need less memory."""
    solver: str = "ddim"
    """Solver that generates the images, SOLVER[+OPTION=VALUE ...]: ddim (option eta), its other
    name euler, heun (churn, churn_min, churn_max, churn_noise), dpmpp_2m, ddpm, which uses the
    learned variance of a model that has one, or ddpm_large. All start from unit noise; with
    start=process they start from sigma times noise."""
    solver_steps: int = 25
    """Number of model evaluations per image, at most the number of timesteps."""
    guidance: float = 1.0
    """Scale of classifier-free guidance; 1 is without guidance."""
    guidance_interval: tuple[float, float] | None = None
    """Lower and upper noise level sigma / alpha between which guidance acts. By default it acts at
    all levels."""
    guidance_channels: int | None = None
    """Number of channels, the first ones, that guidance acts on; DiT's published samples have 3. By
    default it acts on all channels."""
    features: Literal["classifier", "inception", "dinov2", "none"] = "classifier"
    """Features that FID and other metrics compare: those of a classifier trained on these data,
    those of the standard Inception network, those of DINOv2 (ViT-L/14), or none; then images are
    generated, and only metrics that need no features are measured."""
    inception_weights: Path | None = None
    """Weights file of the Inception network. By default it is searched in the cache of torch
    hub."""
    dinov2_weights: Path | None = None
    """Folder of the DINOv2 network, as transformers has it. By default facebook/dinov2-large is
    searched in the cache of the Hugging Face hub, and never fetched."""
    reference: str | None = None
    """Real pictures to compare with in place of those of the data set: shards of pictures as a path
    or URL, a folder of pictures, or an .npz as ADM's evaluator reads it (arr_0 pictures, arr_1
    classes; mu and sigma, statistics in Inception's features, alone suffice for FID). Latents need
    it."""
    metrics: Annotated[tuple[str, ...], tyro.conf.arg(help=METRICS_HELP)] = ("fid", "kid", "loss")
    clip_model: str | None = None
    """Model that the metric clip uses: a CLIPModel with its processor, as a folder or a name on the
    Hugging Face hub."""

    def __post_init__(self) -> None:
        named = " ".join(self.metrics)
        sound = bool(self.metrics) and METRICS.keys() >= set(self.metrics)
        check("evaluation.metrics", named, sound, f"name one or more of {', '.join(METRICS)}")
        for metric in self.metrics:
            has_model = "clip" not in METRICS[metric].needs or self.clip_model is not None
            check("evaluation.metrics", named, has_model, f"{metric} needs evaluation.clip_model")
            has_classes = "logits" not in METRICS[metric].needs or self.features != "dinov2"
            none = f"{metric} needs classes, and evaluation.features=dinov2 has none; leave it out"
            check("evaluation.metrics", named, has_classes, none)
        compared = self.reference is None or self.features != "none"
        need = "is compared in features; set evaluation.features to inception, dinov2 or classifier"
        check("evaluation.reference", self.reference, compared, need)
        check_counts("evaluation.", self, "every", "num_images", "batch_size", "solver_steps")
        channels = self.guidance_channels
        some = channels is None or channels >= 1
        check("evaluation.guidance_channels", channels, some, "must be at least 1")
        guides = 0 <= self.guidance < math.inf
        check("evaluation.guidance", self.guidance, guides, "must be 0 or more, and finite")
        low, high = self.guidance_interval or (0.0, math.inf)
        rises = "needs two noise levels sigma / alpha, 0 or more, the lower one first"
        check("evaluation.guidance_interval", self.guidance_interval, 0 <= low < high, rises)
