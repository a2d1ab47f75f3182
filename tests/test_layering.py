"""Imports point down: a module may import its own folder and the layers below it."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "speed_engine"
LAYERS = [  # lowest first; names on one line may not import each other
    {"ops"},
    {"runtime"},
    {"encoders", "diffusion"},
    {"data", "models"},
    {"evaluation"},
    {"training"},
    {"config"},
    {"build", "presets"},
    {"run", "planning"},
    {"arena"},
    {"commands"},
    {"cli"},
    {"__main__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
MODULES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")
# A folder's configuration is read by the command line, which must not wait for torch.
CONFIGURATION = {"models/config.py"}


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


@pytest.mark.parametrize("name", sorted(CONFIGURATION))
def test_the_configuration_of_a_folder_imports_only_the_checks(name):
    ours = [m for m in imported_modules(ROOT / name) if m.startswith("speed_engine")]
    assert set(ours) == {"speed_engine.runtime.checks"}


def test_kernels_know_no_engine():
    for path in (ROOT.parent / "kernels" / "speed_kernels").glob("*.py"):
        assert not any(name.startswith("speed_engine") for name in imported_modules(path)), path
