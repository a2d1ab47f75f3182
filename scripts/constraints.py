"""The releases in constraints.txt against those of this interpreter's environment.

python scripts/constraints.py           print what differs: package old -> new
python scripts/constraints.py --write   write the file anew from this environment
python scripts/constraints.py --oldest  print it with the oldest torch and triton of pyproject.toml
"""

import re
import sys
from importlib.metadata import distributions
from pathlib import Path

ROOT = Path(__file__).parent.parent
FILE = ROOT / "constraints.txt"
HEADER = """\
# The releases that the demo, the tests and CI use: what passed once passes on a fresh machine, and
# in a year. The package itself has lower bounds only, in pyproject.toml. `scripts/test --latest`
# tries newer releases; where that passes, this file is written anew by
# `.venv-latest/bin/python scripts/constraints.py --write`.
"""
LEFT_OUT = {"pip", "speed-engine"}  # what installs, and what is installed
LINUX_ONLY = re.compile(r"(nvidia-|cuda-|triton$|xformers$)")
# What a release of torch brings with it, or limits.
WITH_TORCH = re.compile(r"(torch|torchvision|triton|xformers|setuptools|nvidia-.*|cuda-.*)==")


def normal(name: str) -> str:
    """A package's name as PEP 503 compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def installed() -> dict[str, str]:
    """Versions by name."""
    found = {normal(each.metadata["Name"]): each.version for each in distributions()}
    return {name: found[name] for name in sorted(found) if name not in LEFT_OUT}


def constrained() -> dict[str, str]:
    """Versions by name, from the file."""
    pins = re.findall(r"^([a-z0-9-]+)==([^\s;]+)", FILE.read_text(), re.MULTILINE)
    return dict(pins)


def write() -> None:
    """The environment into the file."""
    lines = [
        f"{name}=={version}" + ('; sys_platform == "linux"' if LINUX_ONLY.match(name) else "")
        for name, version in installed().items()
    ]
    FILE.write_text(HEADER + "\n".join(lines) + "\n")


def compare() -> None:
    """Print what the environment has that the file has not, and the other way round."""
    old, new = constrained(), installed()
    moved = [name for name in sorted(old | new) if old.get(name) != new.get(name)]
    print(f"{len(moved)} of {len(old | new)} packages differ from constraints.txt")
    for name in moved:
        print(f"  {name} {old.get(name, '(none)')} -> {new.get(name, '(none)')}")


def oldest() -> None:
    """The file, but for what a release of torch brings with it, and the lower bounds of those."""
    bounds = re.findall(r'"(torch|triton)>=([0-9.]+)', (ROOT / "pyproject.toml").read_text())
    kept = [line for line in FILE.read_text().splitlines() if not WITH_TORCH.match(line)]
    print("\n".join([*kept, *(f"{name}=={release}.*" for name, release in bounds)]))


ACTIONS = {"": compare, "--write": write, "--oldest": oldest}

if __name__ == "__main__":
    ACTIONS["".join(sys.argv[1:])]()
