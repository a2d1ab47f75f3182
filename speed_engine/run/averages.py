"""The EMAs of a run, as models, while it may still train."""

import logging
from pathlib import Path

import torch
from torch import Tensor, nn

from speed_engine.build import build_model, settle_operators
from speed_engine.config import TrainConfig
from speed_engine.models.layouts.files import load_parameters
from speed_engine.run.folder import kept_steps, of_newest
from speed_engine.runtime.checks import MOST, UserError, check, check_whole
from speed_engine.training import checkpoint, post_hoc
from speed_engine.training.checkpoint import CHECKPOINTS
from speed_engine.training.ema import EMA, average_group, decay_of

log = logging.getLogger(__name__)


def load_average(
    run: Path, config: TrainConfig, device: torch.device, name: str = EMA, step: int | None = None
) -> tuple[nn.Module, int]:
    """(model with the EMA of the parameters, its step) from a run's newest complete checkpoint.

    Args:
        run: folder.
        config: of the run.
        device: of the model.
        name: of the EMA: ``ema``, or one of ``optimizer.averages``.
        step: of the checkpoint; by default the newest.

    Raises:
        UserError: there is no such checkpoint, it belongs to another model, or lacks the EMA.
        InvalidCheckpoint: the one that was asked for is damaged.
    """
    check("average", name, isinstance(name, str), "must be the name of an EMA, such as ema")
    if step is None:
        return of_newest(run, lambda path: load_average_of(path, config, device, name))
    check_whole("checkpoint", step, 0, MOST)
    path = run / CHECKPOINTS / f"step-{step:08d}"
    try:
        if path.is_dir():
            checkpoint.verify(path)
            return load_average_of(path, config, device, name)
    except Exception:
        if path.exists():
            raise
        # Deleted while it was read, by a run that is training.
    kept = ", ".join(map(str, kept_steps(run))) or "none"
    raise UserError(f"{run} has no checkpoint of step {step}; it keeps those of: {kept}.")


def load_average_of(
    path: Path, config: TrainConfig, device: torch.device, name: str = EMA
) -> tuple[nn.Module, int]:
    """The same from one checkpoint, which must be complete.

    Raises:
        UserError: it belongs to another model, or lacks the EMA.
    """
    tensors = checkpoint.load_group(path, average_group(name))
    if not tensors and name.startswith(post_hoc.RULE):
        tensors = _reconstructed(path, config, name)
    if not tensors:
        kept = ", ".join((EMA, *config.optimizer.averages))
        raise UserError(f"{path} holds no EMA {name!r}; this run keeps {kept}.")
    if broken := [of for of, value in tensors.items() if not value.isfinite().all()]:
        log.warning(
            "%s: %d of the %d tensors of the EMA %s, such as %s, hold numbers that are not finite; "
            "such a model makes no pictures.",
            path, len(broken), len(tensors), name, broken[0],
        )  # fmt: skip
    step = checkpoint.read_state(path).step
    return load_network(tensors, config, device, path), step


def _reconstructed(path: Path, config: TrainConfig, name: str) -> dict[str, Tensor]:
    """A power-function average of another length than those that the run kept; none without them.

    Raises:
        UserError: the name does not parse.
    """
    decay_of(name)
    step = checkpoint.read_state(path).step
    exponent = float(name.removeprefix(post_hoc.RULE))
    while True:
        kept = checkpoint.complete(path.parent)
        try:
            stored = post_hoc.stored_averages(kept, config.optimizer.averages, step)
            return post_hoc.reconstructed(stored, step, exponent) if stored else {}
        except Exception:
            if not path.exists() or all(of.exists() for of in kept):
                raise
            # One of the older ones was deleted while it was read, by a run that is training.


def load_network(
    tensors: dict[str, Tensor], config: TrainConfig, device: torch.device, source: Path
) -> nn.Module:
    """A configured model with trained parameters, to be used.

    Args:
        tensors: the parameters, by name.
        config: of the run that trained them.
        device: of the model.
        source: what the parameters were read from, for messages.

    Raises:
        UserError: they are of another model.
    """
    # What a run asked for where it was trained need not be there where it is used.
    settle_operators(config, "off" if config.kernels == "off" else "auto", device)
    model = build_model(config)
    load_parameters(model, tensors, source)
    return model.to(device).eval().requires_grad_(False)
