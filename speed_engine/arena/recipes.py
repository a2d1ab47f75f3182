"""Recipes by name: a method with the process, the target and the optimizer that it is used with.

What a recipe leaves open (the network, the data, the learning rate, the length of the run) is that
of the preset or of the comparison. The target of each is its process's own, so that on another
process it is the own one of that.
"""

from typing import Any, Literal

from speed_engine.diffusion.grammar import Spelling, read_spelling

RecipeName = Literal["ddpm", "speed", "flow", "flow_muon", "flow_muon_decay"]

# name: (what it is, its spelling)
RECIPES: dict[RecipeName, tuple[str, str]] = {
    "ddpm": (
        "the usual DDPM: uniform timesteps, the noise as the target, AdamW, a constant rate",
        "uniform@linear:epsilon+optimizer.name=adamw+optimizer.schedule=constant",
    ),
    "speed": (
        "SpeeD as its paper has it: DDPM with asymmetric timesteps and change-aware weights",
        "speed_paper@linear:epsilon+optimizer.name=adamw+optimizer.schedule=constant",
    ),
    "flow": (
        "a rectified flow with logit-normal times, AdamW, a rate that falls to zero",
        "logit_normal@flow:velocity+optimizer.name=adamw+optimizer.schedule=linear",
    ),
    "flow_muon": (
        "the same flow, with Muon for the matrices in the blocks",
        "logit_normal@flow:velocity+optimizer.name=muon+optimizer.schedule=linear",
    ),
    "flow_muon_decay": (
        "the same with weight decay",
        "logit_normal@flow:velocity+optimizer.name=muon+optimizer.schedule=linear"
        "+optimizer.weight_decay=0.1",
    ),
}


def read_contestant(text: str) -> Spelling:
    """A method or a recipe, with what is set of it; a recipe's own choices are filled in.

    Raises:
        UserError: it does not follow the grammar, or a recipe's process does not exist.
    """
    spelling = read_spelling(text)
    if spelling.method not in RECIPES:
        return spelling
    recipe = read_spelling(RECIPES[spelling.method][1])
    target = spelling.prediction or recipe.prediction
    if spelling.schedule and not spelling.prediction:
        # Not at the top: it needs torch, which the help does without.
        from speed_engine.diffusion.processes import build_schedule

        target = build_schedule(spelling.schedule).prediction
    return Spelling(
        recipe.method,
        {**recipe.options, **spelling.options},
        spelling.schedule or recipe.schedule,
        target,
    )


def values_of(name: RecipeName) -> dict[str, Any]:
    """What a recipe sets of a configuration, by field and section.

    The target is none by name, which is the own one of whatever process the run has at last.
    """
    recipe = read_spelling(RECIPES[name][1])
    optimizer = {field.partition(".")[2]: value for field, value in recipe.options.items()}
    return {
        "method": recipe.method,
        "schedule": recipe.schedule,
        "prediction": None,
        "optimizer": optimizer,
    }
