"""Measures the structure of the source: how deep, how long, how many.

Usage: ``python scripts/house.py``. Prints the files at the top of ``speed_engine/``, the longest
chain of imports, the frames from the command to the optimizer step, and lines per folder.
"""

import ast
import statistics
import sys
import tempfile
import traceback
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
PACKAGES = {"speed_engine": ROOT / "speed_engine", "speed_kernels": ROOT / "kernels/speed_kernels"}


@cache
def modules() -> dict[str, Path]:
    """Every module by its dotted name; packages' own files, which hold a line of text, left out."""
    return {
        ".".join((name, *path.relative_to(folder).with_suffix("").parts)): path
        for name, folder in PACKAGES.items()
        for path in folder.rglob("*.py")
        if path.name != "__init__.py"
    }


def imported(path: Path) -> Iterator[str]:
    """Dotted names that a file imports, inside functions too; not those for type checkers alone."""
    tree = ast.parse(path.read_text())
    blocks = (n for n in ast.walk(tree) if isinstance(n, ast.If))
    for_types = {
        inner
        for block in blocks
        if ast.unparse(block.test) == "TYPE_CHECKING"
        for statement in block.body
        for inner in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if node in for_types:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def top_files() -> list[str]:
    """Names of the modules that lie in no folder of the package."""
    return sorted(path.name for path in PACKAGES["speed_engine"].glob("*.py"))


def longest_chain() -> list[str]:
    """The modules of the longest chain in which each imports the next."""
    paths = modules()
    edges = {name: {*imported(path)} & paths.keys() - {name} for name, path in paths.items()}

    @cache
    def chain(name: str) -> list[str]:
        return [name, *max(map(chain, edges[name]), key=len, default=[])]

    return max(map(chain, paths), key=len)


def frames_to_step() -> list[str]:
    """Functions of speed_engine on the stack in an optimizer step of a real run of the command."""
    from speed_engine import cli
    from speed_engine.training.engine import Engine

    found: list[list[str]] = []
    step = Engine.step

    def watched(self: Engine, batch):
        frames = traceback.extract_stack()[:-1]
        ours = [f for f in frames if Path(f.filename).is_relative_to(PACKAGES["speed_engine"])]
        found.append([f"{Path(f.filename).stem}.{f.name}" for f in ours] + ["engine.step"])
        return step(self, batch)

    Engine.step = watched
    with tempfile.TemporaryDirectory() as folder:
        options = ["--steps", "1", "--evaluation.features", "none", "--evaluation.num-images", "10"]
        cli.main(["train", "digits", "--run", f"{folder}/run", *options])
    return found[0]


def functions(path: Path) -> Iterator[int]:
    """Lines of each function."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef) and node.end_lineno is not None:
            yield node.end_lineno - node.lineno + 1


def main() -> None:
    """Print everything."""
    frames = frames_to_step()
    chain = longest_chain()
    top = top_files()
    print(f"\nfiles at the top of speed_engine: {len(top)}: {', '.join(top)}")
    print(f"longest chain of imports: {len(chain) - 1}: {' > '.join(chain)}")
    print(f"frames from the command to the optimizer step: {len(frames)}: {' > '.join(frames)}")
    lengths = [n for path in modules().values() for n in functions(path)]
    print(f"functions: {len(lengths):,}, {statistics.median(lengths):g} lines in the median")
    folders: dict[str, int] = {}
    for name, path in modules().items():
        folder = ".".join(name.split(".")[:2]) if name.count(".") > 1 else name.split(".")[0]
        folders[folder] = folders.get(folder, 0) + len(path.read_text().splitlines())
    for folder, lines in sorted(folders.items()):
        print(f"{lines:8,} lines in {folder}")
    print(f"{sum(folders.values()):8,} lines")


if __name__ == "__main__":
    main()
