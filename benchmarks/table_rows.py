"""Rows of the documentation's tables, and the results that they are made from."""

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
MACHINE = "x86-64-2-cores"  # of blocks that name no other


def result(name: str, machine: str = MACHINE) -> dict[str, Any] | None:
    path = RESULTS / machine / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def rows(head: list[str], body: list[list[str]]) -> str:
    """A table of Markdown, the first column text, the others figures."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def missing(command: str) -> str:
    return f"Not measured (`benchmarks/{command}`)."
