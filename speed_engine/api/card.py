"""What is known of a trained model, and the model card that says it, as the hub shows it."""

import json
import re
import shlex
from dataclasses import dataclass, field
from typing import Any

from speed_engine.config import TrainConfig, flat
from speed_engine.data.opening import condition_names
from speed_engine.evaluation.metrics import FIGURES, HELD_OUT, title, written
from speed_engine.presets import PRESETS
from speed_engine.runtime.checks import printable

TASKS = {"tokens": "text-to-image", "low_resolution": "image-to-image"}


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What is known of a model beside its configuration, as JSON holds it.

    Attributes:
        step: optimizer steps that it was trained for.
        data: SHA-256 of the data set.
        classes: that have samples, in ascending order; empty without classes.
        metadata: of the data set: ``latent_scale`` and ``latent_shift``, and ``classes``, the names
            of the classes, where they are recorded.
        figures: the newest record of quality of this EMA, as in ``metrics.jsonl``; the step in it
            may be an earlier one.
        command: that started the run.
    """

    step: int
    data: str
    classes: tuple[int, ...] = ()
    metadata: dict[str, Any] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)
    command: tuple[str, ...] = ()


def model_card(name: str, config: TrainConfig, facts: Facts, parameters: int) -> str:
    """Markdown with the front matter that the hub reads.

    Args:
        name: of the model, as ``speed_engine.load`` takes it.
        config: of its run.
        facts: what else is known of it.
        parameters: their number.
    """
    conditions = condition_names(config.data)
    tasks = [TASKS[name] for name in conditions if name in TASKS]
    images = facts.step * config.batch_size
    prediction = config.prediction or "the baseline's"
    rows = {
        "preset": nearest_preset(config),
        "method": f"{_code(config.method)} on the process `{config.schedule}`, "
        f"prediction {prediction}",
        "network": f"{config.model.family}, {parameters:,} parameters",
        "conditioned on": ", ".join(conditions) or "nothing",
        "trained": f"{facts.step:,} steps of {config.batch_size:,} images, {images:,} images",
        "data": f"{_code(config.data.source)}, images of shape {config.data.image_shape}, SHA-256 "
        f"`{facts.data}`",
    }
    figures = facts.figures
    for name_of, value in figures.items():
        if name_of.removeprefix(HELD_OUT) in FIGURES:
            rows[title(name_of, figures.get("extractor"))] = written(name_of, value)
    if "num_generated" in figures:
        rows["measured on"] = (
            f"{figures['num_generated']:,} images by {figures['solver']}, "
            f"{figures['solver_steps']} steps, guidance {figures['guidance']:g}"
        )
        if (step := figures.get("step", facts.step)) != facts.step:
            rows["measured on"] += f", by the model of step {step:,}"
    table = "\n".join(f"| {head} | {text} |" for head, text in rows.items())
    command = shlex.join(facts.command)
    started = f"\nIt was started by {_code(command)}.\n" if command else ""
    return f"""\
---
library_name: speed-engine
pipeline_tag: {(tasks or ["unconditional-image-generation"])[0]}
tags:
- diffusion
---

# {re.sub(_MARKUP, _escaped, printable(name))}

A diffusion model, trained by speed_engine.

```python
import speed_engine as se

images = se.load({json.dumps(name)}).generate(16)
```

| | |
|---|---|
{table}

`speed-engine train config.json` trains it again, on the same data, from the file beside this one.
{started}"""


_MARKUP = r"[\\`*_{}\[\]<>#|]"  # characters that mean something in Markdown


def _escaped(found: re.Match[str]) -> str:
    return "\\" + found[0]


def _code(text: str) -> str:
    """A text as code in a cell of a table: in one line, between more backticks than it holds."""
    text = printable(text).replace("|", "\\|")
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence} {text} {fence}" if "`" in text else f"`{text}`"


def nearest_preset(config: TrainConfig) -> str:
    """The preset that a configuration differs least from, and the values that differ."""
    own, differing = flat(config), {}
    for name, (_, preset) in PRESETS.items():
        known = flat(preset)
        differing[name] = {
            field: value
            for field, value in own.items()
            if known.get(field, "auto") not in (value, "auto")  # a machine settles what is auto
        }
    name = min(differing, key=lambda name: len(differing[name]))
    changes = ", ".join(f"{field} = {json.dumps(v)}" for field, v in differing[name].items())
    return f"`{name}`" + (f" with {changes}" if changes else "")
