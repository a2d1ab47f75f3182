"""Contestants as a person names them: a method, with its process, target and options.

    METHOD[@PROCESS][:PREDICTION][+OPTION=VALUE ...]        speed_paper@linear:v+k=3

What is left out is the comparison's own, the target that of the process. An option is one of the
method, one of the optimizer (``optimizer.ema_decay``), or ``seed_offset``: the contestant's runs
have other seeds then. The same method twice, once with other seeds, is the false-alarm test of a
comparison: neither may come out faster.
"""

import dataclasses
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from speed_engine.build import build_process
from speed_engine.config import MethodOptions, OptimizerConfig, TrainConfig
from speed_engine.diffusion.methods import METHODS
from speed_engine.runtime.checks import UserError

GRAMMAR = re.compile(
    r"(?P<method>\w+)(@(?P<schedule>\w+))?(:(?P<prediction>\w+))?(?P<options>(\+[\w.]+=[^+]+)*)"
)
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
    match = GRAMMAR.fullmatch(name)
    if match is None:
        raise UserError(
            f"contestant {name!r}: write METHOD[@PROCESS][:PREDICTION][+OPTION=VALUE ...], such as "
            "speed_paper@linear:v+k=3."
        )
    given = dict(part.split("=", 1) for part in match["options"].split("+")[1:])
    schedule = match["schedule"] or base.schedule
    own_target = base.prediction if schedule == base.schedule else None
    try:
        config = replace(
            base,
            method=match["method"],
            schedule=schedule,
            prediction=match["prediction"] or own_target,
            method_options=_with(base.method_options, _of(given, MethodOptions, "")),
            optimizer=_with(base.optimizer, _of(given, OptimizerConfig, "optimizer.")),
            seed=base.seed + _whole(given.pop("seed_offset", "0")),
        )
        if given:
            raise UserError(
                f"there is no option {', '.join(given)}; there are those of the method, "
                "optimizer.NAME and seed_offset. What else differs would not be the same "
                "comparison."
            )
        return replace(config, prediction=build_process(config).prediction)
    except ValueError as error:
        raise UserError(f"contestant {name!r}: {error}") from error


def options(name: str) -> dict[str, Any]:
    """What the name sets beyond method, process and target."""
    parts = name.split("+")[1:]
    return {key: _value(text) for key, text in (part.split("=", 1) for part in parts)}


def every_method(base: TrainConfig) -> tuple[str, ...]:
    """All methods on the comparison's process.

    Task curriculum has twenty stages that each last at least ``patience`` steps: here the shortest
    curriculum takes half of the run, whatever its length.
    """
    patience = max(1, base.steps // 40)
    own = {"task_curriculum": f"task_curriculum+patience={patience}"}
    return tuple(own.get(method, method) for method in METHODS)


def expand(names: Sequence[str], base: TrainConfig) -> tuple[str, ...]:
    """Names with the sets ``all`` and ``ablation`` in place of their names, then the baselines that
    speed-ups are given against, uniform on each process and target among them; each once.
    """
    listed: list[str] = []
    for name in names:
        sets = {"all": every_method(base), "ablation": ABLATION}
        listed += sets.get(name, (name,))
    listed += BASELINES
    processes = {(c.schedule, c.prediction) for c in (resolve(name, base) for name in listed)}
    own = [f"uniform@{schedule}:{prediction}" for schedule, prediction in sorted(processes)]
    chosen: dict[TrainConfig, str] = {}
    for name in (*listed, *own):
        chosen.setdefault(resolve(name, base), name)
    return tuple(chosen.values())


def _of(given: dict[str, str], kind: type, prefix: str) -> dict[str, Any]:
    """Takes what belongs to one part of the configuration out of the given options."""
    names = {prefix + field.name: field.name for field in dataclasses.fields(kind)}
    return {names[key]: _value(given.pop(key)) for key in list(given) if key in names}


def _whole(text: str) -> int:
    if not text.isdecimal():
        raise UserError(f"seed_offset={text} must be a whole number, 0 or more.")
    return int(text)


def _with(part: Any, values: dict[str, Any]) -> Any:
    return replace(part, **values)


def _value(text: str) -> Any:
    """A number or truth value as JSON or Python writes it, or else the text."""
    try:
        return json.loads(text.lower() if text in ("True", "False") else text)
    except json.JSONDecodeError:
        return text
