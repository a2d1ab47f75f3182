"""EMA lengths chosen after training (Karras et al. 2024, EDM2, section 3 and algorithm 3).

A power-function average with exponent g, at step s, weighs the parameters of step t by

    p(t) = (g + 1) t**g / s**(g + 1)        for 0 < t <= s

Of any two such profiles the inner product over t is known in closed form, so the combination of
stored averages (some exponents, at several steps) that is nearest to a wanted profile follows from
one small system of linear equations. Two exponents and a few checkpoints are enough; from fewer the
profile may be far from the wanted one, which is refused.

Letters: K stored averages.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from speed_engine.runtime.checks import UserError
from speed_engine.training import checkpoint
from speed_engine.training.ema import average_group

RULE = "power="  # begins the names of averages with such a profile
LARGEST_ERROR = 0.1  # of a profile: root of the summed squares, relative


def stored_averages(
    checkpoints: Sequence[Path], averages: Sequence[str], step: int
) -> dict[tuple[int, float], tuple[Path, str]]:
    """(step, exponent) -> (checkpoint, average) of the averages to combine, up to a step.

    Args:
        checkpoints: folders of complete checkpoints, of one run.
        averages: names of the EMAs that they hold.
        step: of the wanted average.
    """
    exponents = {float(name.removeprefix(RULE)): name for name in averages if name.startswith(RULE)}
    found = {}
    for path in checkpoints:
        at = checkpoint.read_state(path).step
        if at <= step:
            found |= {(at, exponent): (path, name) for exponent, name in exponents.items()}
    return found


def reconstructed(
    stored: Mapping[tuple[int, float], tuple[Path, str]], step: int, exponent: float
) -> dict[str, Tensor]:
    """The parameters of an average that was not kept, by name; buffers are those of the newest.

    Args:
        stored: of ``stored_averages``.
        step: after which the average ends.
        exponent: of its profile.

    Raises:
        UserError: no combination comes near the wanted profile.
    """
    weights, error = combination([*stored], step, exponent)
    if error > LARGEST_ERROR:
        kept = ", ".join(f"{RULE}{g:g} of step {at}" for at, g in stored)
        raise UserError(
            f"{RULE}{exponent:g} cannot be made of the averages that are kept ({kept}): the "
            f"nearest combination differs from it by {error:.0%}. Keep two averages of this kind, "
            "such as power=6.94 and power=16.97, in several checkpoints, or choose another length."
        )
    newest = max(stored)
    total: dict[str, Tensor] = {}
    for weight, (at, (path, name)) in zip(weights, stored.items(), strict=True):
        for key, value in checkpoint.load_group(path, average_group(name)).items():
            if value.is_floating_point():
                term = weight * value.double()
                total[key] = total[key] + term if key in total else term
            elif at == newest:
                total[key] = value
    return {key: v.float() if v.is_floating_point() else v for key, v in total.items()}


def combination(
    stored: Sequence[tuple[int, float]], step: int, exponent: float
) -> tuple[Tensor, float]:
    """(K,) float64 weights of stored averages, whose sum is nearest to the wanted profile.

    And how far from it the sum is: root of the summed squares of the difference, relative.

    Args:
        stored: (step, exponent) of each.
        step: of the wanted average.
        exponent: of its profile.
    """
    wanted = torch.tensor([(step, exponent)], dtype=torch.float64)
    known = torch.tensor(stored, dtype=torch.float64)
    overlap = _products(known, wanted)
    weights = torch.linalg.lstsq(_products(known, known), overlap).solution
    distance = 1 - float((weights * overlap).sum() / _products(wanted, wanted))
    return weights[:, 0], max(distance, 0.0) ** 0.5


def _products(a: Tensor, b: Tensor) -> Tensor:
    """(K, 2), (L, 2) steps and exponents -> (K, L) inner products of their profiles."""
    (s, g), (t, h) = a.T[:, :, None], b.T[:, None, :]
    earlier = torch.where(s < t, (s / t) ** h, (t / s) ** g)
    return (g + 1) * (h + 1) * earlier / ((g + h + 1) * torch.maximum(s, t))
