"""Imports point down: a module may import its own folder and the layers below it."""

import ast
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent / "speed_engine"
_SCRIPT = importlib.util.spec_from_file_location("house", ROOT.parent / "scripts/house.py")
assert _SCRIPT is not None and _SCRIPT.loader is not None
house: Any = importlib.util.module_from_spec(_SCRIPT)
_SCRIPT.loader.exec_module(house)
LAYERS = [  # lowest first; names on one line may not import each other
    {"ops"},
    {"runtime"},
    {"encoders", "diffusion"},
    {"data", "models"},
    {"evaluation"},
    {"training"},
    {"config"},
    {"build", "presets"},
    {"planning"},
    {"run"},
    {"arena"},
    {"commands"},
    {"api", "cli"},
    {"__main__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
MODULES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")
# The command line reads the configuration of folders, which must not wait for torch. The metrics
# are a table of names, of which the help text is made.
MAY_IMPORT = {"speed_engine.runtime.checks", "speed_engine.evaluation.metrics"}


def imported_modules(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            if node.module == "speed_engine":
                yield from (f"speed_engine.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path):
    unit = path.relative_to(ROOT).parts[0].removesuffix(".py")
    for package, *rest in (name.split(".") for name in imported_modules(path)):
        if package == "speed_kernels":
            assert unit == "ops", f"{unit} imports speed_kernels; only speed_engine/ops.py may."
        if package == "speed_engine" and rest and rest[0] not in (unit, "__version__"):
            assert LEVEL[rest[0]] < LEVEL[unit], (
                f"{unit} (layer {LEVEL[unit]}) imports {rest[0]} (layer {LEVEL[rest[0]]})."
            )


@pytest.mark.parametrize("path", [*ROOT.glob("*/config.py")], ids=lambda p: p.parent.name)
def test_the_configuration_of_a_folder_imports_only_the_checks(path):
    ours = {m for m in imported_modules(path) if m.startswith("speed_engine")}
    assert ours <= MAY_IMPORT


def test_the_house_stays_small_at_the_top_and_shallow():
    assert len(house.top_files()) <= 9
    assert len(house.longest_chain()) - 1 <= 12, house.longest_chain()


def test_kernels_know_no_engine():
    for path in (ROOT.parent / "kernels" / "speed_kernels").glob("*.py"):
        assert not any(name.startswith("speed_engine") for name in imported_modules(path)), path
