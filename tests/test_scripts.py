"""The scripts make an environment that is whole, and serve all pages."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PYTHON = """#!/bin/bash
case "$1 $2" in
    "-m pip") [ -e "{0}/no-pip" ] && exit 1; echo pip "$@" >> "{0}/said" ;;
    "-m venv")
        echo venv >> "{0}/said"
        mkdir -p "$3/bin" && cp "$0" "$3/bin/python"
        [ ! -e "{0}/no-ensurepip" ] && rm -f "{0}/no-pip" ;;
esac
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A copy of the script with what it reads, and a Python that writes down what it is asked."""
    scripts = ("scripts/environment.sh", "scripts/constraints.py")
    for name in (*scripts, "pyproject.toml", "constraints.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    python = tmp_path / "bin" / "python3.13"
    python.parent.mkdir()
    python.write_text(PYTHON.format(tmp_path))
    python.chmod(0o755)
    monkeypatch.setenv("PATH", f"{python.parent}{os.pathsep}{os.environ['PATH']}")
    return tmp_path


def sourced(project, releases=""):
    script = f'set -euo pipefail; source scripts/environment.sh "[dev]" {releases}; echo "$PYTHON"'
    return subprocess.run(["bash", "-c", script], cwd=project, capture_output=True, text=True)


def test_an_environment_that_could_not_be_made_leaves_nothing(project):
    (project / "no-pip").touch()
    (project / "no-ensurepip").touch()
    done = sourced(project)
    assert done.returncode == 1 and "install python3-venv" in done.stderr
    assert not (project / ".venv").exists()
    (project / "no-ensurepip").unlink()
    assert sourced(project).returncode == 0


def test_an_environment_without_pip_is_made_anew(project):
    assert sourced(project).returncode == 0 and sourced(project).returncode == 0
    assert (project / "said").read_text().count("venv\n") == 1
    (project / "no-pip").touch()
    assert sourced(project).returncode == 0
    assert (project / "said").read_text().count("venv\n") == 2


def test_the_oldest_pytorch_has_an_environment_of_its_own(project):
    done = sourced(project, "oldest")
    assert done.returncode == 0 and done.stdout.endswith("/.venv-oldest/bin/python\n")
    constraints = project / ".venv-oldest/constraints.txt"
    assert f"--constraint {constraints}" in (project / "said").read_text()
    assert not (project / ".venv").exists()


def test_constraints_of_the_oldest_pytorch_are_the_file_but_for_what_comes_with_it():
    command = [sys.executable, str(ROOT / "scripts/constraints.py"), "--oldest"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found, file = done.stdout.splitlines(), (ROOT / "constraints.txt").read_text().splitlines()
    assert found[-2:] == ["torch==2.11.*", "triton==3.6.*"]  # the bounds of pyproject.toml
    left_out = {line.split("==")[0] for line in set(file) - set(found)}
    assert {"torch", "triton", "torchvision", "setuptools", "nvidia-cublas"} <= left_out
    assert all(re.match("torch|triton|xformers|setuptools|nvidia-|cuda-", n) for n in left_out)
    assert set(found[:-2]) < set(file) and "numpy" not in left_out


def test_pages_outside_of_docs_are_watched_while_they_are_served():
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "scripts/docs_hooks.py")
    assert spec is not None and spec.loader is not None
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    watched: list[str] = []

    class Server:
        watch = staticmethod(watched.append)

    assert hooks.on_serve(Server, config=None, builder=None) is Server
    assert {Path(path).relative_to(ROOT).as_posix() for path in watched} == set(hooks.OUTSIDE)
