"""Configuration of evaluation."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from speed_engine.runtime.checks import check, check_counts

SolverName = Literal["ddim", "euler", "heun", "dpmpp_2m", "ddpm", "ddpm_large"]


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Images drawn from the averaged model, and how far they are from the data."""

    every: int = 500
    """Optimizer steps between evaluations; one more follows the last step."""
    num_images: int = 2000
    """Images drawn each time, classes in turn."""
    solver: SolverName = "ddim"
    """How images are drawn; euler is ddim; ddpm takes the variance a model learned, if it did."""
    solver_steps: int = 25
    """Model evaluations per image, at most the number of timesteps."""
    guidance: float = 1.0
    """Classifier-free guidance scale; 1 is none."""
    guidance_interval: tuple[float, float] | None = None
    """Noise levels sigma / alpha between which guidance acts; by default at all."""
    features: Literal["classifier", "inception", "none"] = "classifier"
    """What FID compares: a classifier trained on these data, the standard Inception network, or
    nothing: images are drawn only."""
    inception_weights: Path | None = None
    """Its weights file; by default torch hub's cache is searched."""
    metrics: tuple[str, ...] = ("fid", "kid")
    """Any of fid, kid, isc, prc (precision and recall), copies (nearest training images; needs
    data.held_out), clip (pictures against their texts)."""
    clip_model: str | None = None
    """Of clip: a CLIPModel with its processor, a folder or a name on the hub."""

    def __post_init__(self) -> None:
        known = ("fid", "kid", "isc", "prc", "copies", "clip")
        named = " ".join(self.metrics)
        sound = bool(self.metrics) and set(self.metrics) <= set(known)
        check("evaluation.metrics", named, sound, f"name one or more of {', '.join(known)}")
        has_model = "clip" not in self.metrics or self.clip_model is not None
        check("evaluation.metrics", named, has_model, "clip needs evaluation.clip_model")
        check_counts("evaluation.", self, "every", "num_images", "solver_steps")
        guides = 0 <= self.guidance < math.inf
        check("evaluation.guidance", self.guidance, guides, "must be 0 or more, and finite")
        low, high = self.guidance_interval or (0.0, math.inf)
        rises = "needs two noise levels sigma / alpha, 0 or more, the lower one first"
        check("evaluation.guidance_interval", self.guidance_interval, 0 <= low < high, rises)
