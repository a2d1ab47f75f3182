"""Contestants as a person names them: a method, with its process, target and options.

    METHOD[@PROCESS][:PREDICTION][+OPTION=VALUE ...]        speed_paper@linear:v+k=3

What is left out is the comparison's own, the target that of the process. A recipe (recipes.py) may
stand in place of the method. An option is one of the method, one of the optimizer or the network
(``optimizer.ema_decay``, ``model.variant``), or one of these:

    seed_offset   the contestant's runs have other seeds. The same method twice, once with other
                  seeds, is the false-alarm test of a comparison: neither may come out faster.
    budget        share of the comparison's images that the contestant trains on, in (0, 1]. A
                  learning rate that falls to zero is finished then: what a recipe reaches with half
                  of the images is not what a longer run has reached at its half.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from speed_engine.arena.recipes import read_contestant
from speed_engine.arena.results import BUDGET, SEED_OFFSET
from speed_engine.build import build_model, build_process
from speed_engine.config import TrainConfig, check_whole, with_values
from speed_engine.diffusion.grammar import Spelling, Value
from speed_engine.diffusion.method import options_of
from speed_engine.diffusion.methods import METHODS
from speed_engine.runtime.checks import UserError

SECTIONS = ("optimizer", "model")
BASELINES = ("uniform@linear:epsilon", "logit_normal@flow:velocity")

# Table 6 of SpeeD's paper: its two parts, k and lambda; then what the paper leaves open.
ABLATION = (
    "uniform",
    "speed_paper",
    "speed_paper+lam=0.5",  # weights are constant: asymmetric sampling alone
    "speed_paper+k=1",  # change-aware weighting alone
    *(f"speed_paper+k={k}" for k in (2, 10, 25)),
    *(f"speed_paper+lam={lam}" for lam in (0.7, 0.8, 0.9)),
    *(f"speed_paper+r={r}" for r in (10, 30, 500)),
    "speed_official",  # mirrored
    "speed_paper+normalised=True",
    "speed_paper+stratified=True",
    "speed_paper+weight_on=prediction",
)


def resolve(name: str, base: TrainConfig) -> TrainConfig:
    """The configuration of a contestant in a comparison.

    Raises:
        UserError: the name does not parse, or a part of it is unknown or does not fit.
    """
    try:
        spelling = read_contestant(name)
        method, sections, seed_offset, budget = _parts(spelling)
        schedule = spelling.schedule or base.schedule
        own_target = base.prediction if schedule == base.schedule else None
        config = replace(
            base,
            method=str(Spelling(spelling.method, method)),
            schedule=schedule,
            prediction=spelling.prediction or own_target,
            seed=base.seed + seed_offset,
        )
        config = with_values(config, sections)
        if budget != 1:
            config = _shortened(config, budget)
        if "model" in sections:
            with torch.device("meta"):
                build_model(config)
        check_whole(config)
        return replace(config, prediction=build_process(config).prediction)
    except UserError as error:
        raise UserError(f"methods={name!r}: {error}") from error


def options(name: str) -> dict[str, Any]:
    """What the name sets beyond method, process and target."""
    return dict(read_contestant(name).options)


def every_method(base: TrainConfig) -> tuple[str, ...]:
    """All methods on the comparison's process.

    Task curriculum has twenty stages that each last at least ``patience`` steps: here the shortest
    curriculum takes half of the run, whatever its length.
    """
    patience = max(1, base.steps // 40)
    own = {"task_curriculum": f"task_curriculum+patience={patience}"}
    return tuple(own.get(method, method) for method in METHODS)


def identity(name: str, base: TrainConfig, tuned: bool) -> tuple[TrainConfig, bool]:
    """Equal for names of the same contestant; where rates are chosen from a grid, one that names
    its own is another contestant, even if that is the configured one.
    """
    return resolve(name, base), tuned and "optimizer.learning_rate" in options(name)


def expand(names: Sequence[str], base: TrainConfig, tuned: bool = False) -> tuple[str, ...]:
    """Names with the sets ``all`` and ``ablation`` in place of their names, then the baselines that
    speed-ups are given against, uniform on each process and target among them; each once.

    Args:
        names: of contestants and sets.
        base: the configuration of the comparison.
        tuned: whether learning rates are chosen from a grid.
    """
    listed: list[str] = []
    for name in names:
        sets = {"all": every_method(base), "ablation": ABLATION}
        listed += sets.get(name, (name,))
    listed += BASELINES
    processes = {(c.schedule, c.prediction) for c in (resolve(name, base) for name in listed)}
    own = [f"uniform@{schedule}:{prediction}" for schedule, prediction in sorted(processes)]
    chosen: dict[tuple[TrainConfig, bool], str] = {}
    for name in (*listed, *own):
        chosen.setdefault(identity(name, base, tuned), name)
    return tuple(chosen.values())


def _shortened(config: TrainConfig, share: float) -> TrainConfig:
    """A run of a share of the steps, whose evaluations are as far apart.

    Raises:
        UserError: it does not end with one of them.
    """
    every = config.evaluation.every
    evaluations = config.steps // every
    wanted = share * evaluations
    part = round(wanted)
    if part < 1 or abs(wanted - part) > 1e-6:
        raise UserError(
            f"{BUDGET}={share:g} of {evaluations} evaluations is no whole number of them; choose "
            f"from multiples of {1 / evaluations:g}, or another --evaluations."
        )
    steps = every * part
    return replace(config, steps=steps, checkpoint_every=min(config.checkpoint_every, steps))


def _parts(
    spelling: Spelling,
) -> tuple[dict[str, Value], dict[str, dict[str, Value]], int, float]:
    """Options of the method, those of a section of the configuration by their field, the offset of
    the seed, and the share of the budget.
    """
    method, sections = dict(spelling.options), dict[str, dict[str, Value]]()
    offset = method.pop(SEED_OFFSET, 0)
    if type(offset) is not int or offset < 0:
        raise UserError(f"{SEED_OFFSET}={offset} must be a whole number, 0 or more.")
    share = method.pop(BUDGET, 1)
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share <= 1:
        raise UserError(f"{BUDGET}={share} must be a share of the images, in (0, 1].")
    for option in spelling.options:
        section, _, field = option.rpartition(".")
        if section in SECTIONS:
            sections.setdefault(section, {})[field] = method.pop(option)
    for option in method:
        if option not in options_of(spelling.method):
            raise UserError(
                f"there is no option {option}; there are those of {spelling.method} "
                f"({', '.join(options_of(spelling.method))}), optimizer.NAME, model.NAME, "
                f"{SEED_OFFSET} and {BUDGET}. "
                "What else differs would not be the same comparison."
            )
    return method, sections, offset, share
