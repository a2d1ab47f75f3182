"""A training engine for diffusion models.

    import speed_engine as se

    run = se.train("digits", steps=500)                # what `speed-engine train` does
    run.metrics                                        # one dict per record; pandas takes them
    images = run.model().generate(16, labels=[3])      # (16, 1, 8, 8) uint8
    run.model().save_pretrained("digits-model")        # safetensors and a model card
    se.load("digits-model")                            # or a run, or a model on the hub
    se.compare("digits", ["uniform", "speed_paper"])   # at equal budget, several seeds
    se.build_method("speed_paper", scheduler)          # for a training loop of your own

What is named here is imported when it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from speed_engine.api.comparison import Compared, compare
    from speed_engine.api.loading import load
    from speed_engine.api.model import Model
    from speed_engine.api.training import Run, train
    from speed_engine.diffusion.discrete import from_diffusers
    from speed_engine.diffusion.method import build_method

__version__ = "0.1.0"
__all__ = [
    "Compared",
    "Model",
    "Run",
    "__version__",
    "build_method",
    "compare",
    "from_diffusers",
    "load",
    "train",
]

_MODULES = {
    "Compared": "speed_engine.api.comparison",
    "Model": "speed_engine.api.model",
    "Run": "speed_engine.api.training",
    "build_method": "speed_engine.diffusion.method",
    "compare": "speed_engine.api.comparison",
    "from_diffusers": "speed_engine.diffusion.discrete",
    "load": "speed_engine.api.loading",
    "train": "speed_engine.api.training",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'speed_engine' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
