"""A new result beside the committed one of the same kind of machine: the ratio of every figure.

Nothing fails here: a ratio is for who measures to judge, since machines of one kind differ, too.
"""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SILENT = {"environment"}  # says where a result was measured, not what
NAMES = ("case", "name", "ours", "theirs")  # what a row of a list is known by


def committed(path: Path) -> dict[str, Any] | None:
    """A result as the newest commit has it; None if there is none, or no git."""
    try:
        shown = subprocess.run(
            ["git", "show", f"HEAD:./{path.name}"], cwd=path.parent, capture_output=True, text=True
        )
    except OSError:
        return None
    return json.loads(shown.stdout) if shown.returncode == 0 else None


def compared(before: dict[str, Any] | None, after: dict[str, Any]) -> Iterator[str]:
    """One line per figure that both results have; a timing counts by its median."""
    if before is None:
        yield "no committed result of this kind of machine to compare with"
        return
    old = dict(figures(before))
    for name, value in figures(after):
        if name in old and old[name]:
            yield f"{name}: {old[name]:.4g} -> {value:.4g}, ratio {value / old[name]:.3f}"


def figures(tree: Any, path: str = "") -> Iterator[tuple[str, float]]:
    """(where it stands, number) of every figure of a result."""
    if isinstance(tree, bool) or tree is None:
        return
    if isinstance(tree, (int, float)):
        yield path, float(tree)
    elif isinstance(tree, dict) and "median" in tree:
        yield path, float(tree["median"])
    elif isinstance(tree, dict):
        for key, value in tree.items():
            if key not in SILENT:
                yield from figures(value, f"{path} / {key}" if path else str(key))
    elif isinstance(tree, list):
        for i, value in enumerate(tree):
            known = [str(value[n]) for n in NAMES if isinstance(value, dict) and n in value]
            yield from figures(value, f"{path} / {' / '.join(known) or i}")
