"""Named methods: a timestep distribution together with a loss weighting, for any process.

Without this library's trainer, a method takes three lines of someone else's loop:

    method = build_method("speed_paper", noise_scheduler)
    ...
    timesteps, weights = method.draw(batch_size, step, device)
    ...
    loss = method.loss(mse)       # of each image; (weights * mse).mean() where nothing is learned
"""

import inspect
import math
from typing import Any, Literal

import torch

from speed_engine.diffusion import weighting
from speed_engine.diffusion.discrete import from_diffusers
from speed_engine.diffusion.fitted import Method
from speed_engine.diffusion.grammar import Spelling, Value, canonical, read_spelling
from speed_engine.diffusion.methods import METHODS, Definition
from speed_engine.diffusion.schedule import NoiseSchedule
from speed_engine.diffusion.table import TimestepTable
from speed_engine.diffusion.timesteps import independent
from speed_engine.diffusion.timesteps import stratified as stratified_words
from speed_engine.runtime import strict
from speed_engine.runtime.checks import UserError, check, check_seed, nearest, shortened, unknown


def build_method(
    method: str,
    schedule: NoiseSchedule | Any,
    prediction: str | None = None,
    *,
    seed: int = 0,
    **options: Value,
) -> Method:
    """The named method for a process and a target.

    Args:
        method: a key of ``METHODS``; options may follow, as in ``speed_paper+k=3``.
        schedule: the process, or a scheduler of diffusers, see ``from_diffusers``.
        prediction: the model's target, a key of ``PREDICTIONS``; by default the process's own.
        seed: root of ``Method.draw``.
        options: further ones: arguments of the method's definition, and for every method

            - stratified: draw a batch's timesteps evenly spread instead of independently, from the
              same P; by default as the method does. Not for ``ant_uw``.
            - normalised: scale the weights such that E_P[w] = 1 (P of the first step).
            - weight_on: "definition", the default, converts the weight from the target that it is
              defined on, so that the loss stays the same; "prediction" applies its values to the
              model's target as they are, which is a different method.
            - max_weight: larger weights are cut to it. A flow that predicts x0 has the weight
              1 / t**2 of its velocity; 400 cuts it where t is less than 0.05 (Li and He 2025, JiT).
            - weigh_bound: with a learned variance, multiply its bound by the weight, too.

    Raises:
        UserError: an unknown name, a process or a target in its spelling, an option that the method
            does not have, one of another type or out of range, or something that is no process.

    Examples:
        >>> method = se.build_method("speed_paper+k=3", scheduler)
        >>> timesteps, weights = method.draw(8, step=0)
        >>> timesteps.shape, weights.shape
        (torch.Size([8]), torch.Size([8]))
    """
    if not isinstance(schedule, NoiseSchedule):
        schedule = from_diffusers(schedule)
    check("method", method, isinstance(method, str), "must be a text, such as speed_paper+k=3")
    check_seed(seed)
    spelling = read_spelling(canonical(method))
    name = spelling.method
    given = check_options(Spelling(name, {**spelling.options, **options}))
    shared = {option: given.pop(option) for option in list(given) if option in SHARED}
    definition = METHODS[name](schedule, **given)
    return _fitted(definition, name, schedule, prediction or schedule.prediction, seed, **shared)


def options_of(name: str) -> dict[str, inspect.Parameter]:
    """What may be set of a method: its own options, then those that every method has.

    Raises:
        UserError: an unknown name.
    """
    if name not in METHODS:
        raise unknown("method", name, METHODS)
    return dict(list(inspect.signature(METHODS[name]).parameters.items())[1:]) | SHARED


def check_options(spelling: Spelling) -> dict[str, Any]:
    """A method's options as arguments of its definition; ranges are the definition's own to check.

    Raises:
        UserError: an unknown method or option, or a value of another type.
    """
    name, known = spelling.method, options_of(spelling.method)
    for option in spelling.options:
        if option not in known:
            raise UserError(
                f"method {name!r} has no option {shortened(option)}, the nearest is "
                f"{nearest(option, known)}; it has {', '.join(known)}."
            )
    return {
        option: strict.read(known[option].annotation, value, f"method {name!r}: {option}")
        for option, value in spelling.options.items()
    }


def _fitted(
    definition: Definition,
    name: str,
    schedule: NoiseSchedule,
    prediction: str,
    seed: int,
    *,
    stratified: bool | None = None,
    normalised: bool = False,
    weight_on: Literal["definition", "prediction"] = "definition",
    max_weight: float = math.inf,
    weigh_bound: bool = False,
) -> Method:
    """A definition for one target; keyword arguments are the options of every method."""
    timesteps = definition.timesteps
    if stratified is not None:
        if timesteps.words not in (independent, stratified_words):
            raise UserError(
                f"method {name!r}: stratified={stratified} would replace the intervals that it "
                "draws in turn, on which its loss relies; leave stratified out."
            )
        timesteps.words = stratified_words if stratified else independent
    weight = definition.weighting.values
    if weight_on == "definition":
        weight = weighting.converted(definition.weighting, schedule, prediction)
    if normalised:
        weight = weight / (timesteps.probabilities(0) * weight).sum()
    if not max_weight > 0:
        raise UserError(f"method {name!r}: max_weight={max_weight} must be positive.")
    weight = weight.clamp(max=max_weight)
    return Method(
        name, schedule, prediction, timesteps, weight,
        TimestepTable(schedule, prediction, weight), weigh_bound,
        definition.batch_loss, definition.momentum_decay, torch.tensor(seed),
    )  # fmt: skip


SHARED = {
    name: parameter
    for name, parameter in inspect.signature(_fitted).parameters.items()
    if parameter.kind is parameter.KEYWORD_ONLY
}
