"""What a resumed run may change of its configuration, and the record of it.

RUN/changes.jsonl   one line per resumption with changes: {"step": N, "changes": {name: [old, new]}}
"""

import json
import math
from pathlib import Path
from typing import Any

from speed_engine.config import TrainConfig, flat
from speed_engine.runtime.checks import UserError, shortened

FILE = "changes.jsonl"
# How long and how fast it trains, and what it measures and keeps. Whether moved data are the same
# is for their fingerprint to say.
MAY_CHANGE = frozenset(
    """
    steps log_every logger checkpoint_every keep_checkpoints keep_every on_nonfinite hang_timeout
    device compile attention kernels deterministic microbatch_size parallel reshard offload
    data.source data.test_source data.exclude data.vae data.workers data.resident
    data.on_bad_sample data.cache_gb
    optimizer.learning_rate optimizer.adamw_learning_rate optimizer.schedule
    optimizer.decay_share optimizer.reference_steps optimizer.grad_clip
    """.split()
)
_SECTION_MAY_CHANGE = "evaluation."


def between(before: TrainConfig, after: TrainConfig) -> dict[str, list[Any]]:
    """[before, after] of every option that differs, by its dotted name."""
    old, new = flat(before), flat(after)
    names = sorted(old.keys() | new.keys())
    return {n: [old.get(n), new.get(n)] for n in names if old.get(n) != new.get(n)}


def refuse_another_run(changes: dict[str, list[Any]], folder: Path) -> None:
    """Refuse changes that make another run of it.

    Args:
        changes: of ``between``.
        folder: of the run, for the message.

    Raises:
        UserError: it names them all.
    """
    fixed = [n for n in changes if n not in MAY_CHANGE and not n.startswith(_SECTION_MAY_CHANGE)]
    if fixed:
        texts = [f"{n}={shortened(changes[n][0])} (not {shortened(changes[n][1])})" for n in fixed]
        raise UserError(
            f"{folder} was started with {', '.join(texts)}, which a resumed run keeps: model, "
            f"method, data and batch size are what the run is. Leave the options out, or start a "
            f"new run, from these weights by --init-from {folder}."
        )


def record(changes: dict[str, list[Any]], folder: Path, step: int) -> None:
    """Append them to the run's record.

    Args:
        changes: of ``between``.
        folder: of the run.
        step: that the run goes on from with them.
    """
    line = json.dumps({"step": step, "changes": _finite(changes)}, allow_nan=False) + "\n"
    with (folder / FILE).open("a") as file:
        file.write(line)


def _finite(changes: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """As JSON can hold them: infinity, such as that of no clipping, as its text."""
    return {
        name: [str(value) if value in (math.inf, -math.inf) else value for value in values]
        for name, values in changes.items()
    }
