"""The releases in constraints.txt against those of this interpreter's environment.

python scripts/constraints.py          print what differs: package old -> new
python scripts/constraints.py --write  write the file anew from this environment
"""

import re
import sys
from importlib.metadata import distributions
from pathlib import Path

FILE = Path(__file__).parent.parent / "constraints.txt"
HEADER = """\
# The releases that the demo, the tests and CI use: what passed once passes on a fresh machine, and
# in a year. The package itself has lower bounds only, in pyproject.toml. `scripts/test --latest`
# tries newer releases; where that passes, this file is written anew by
# `.venv-latest/bin/python scripts/constraints.py --write`.
"""
LEFT_OUT = {"pip", "speed-engine"}  # what installs, and what is installed
LINUX_ONLY = re.compile(r"(nvidia-|cuda-|triton$|xformers$)")


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


if __name__ == "__main__":
    write() if sys.argv[1:] == ["--write"] else compare()
