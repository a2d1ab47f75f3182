"""What is on record of the source is the commit, and whether the code is still as it was in it."""

import subprocess

import pytest

from speed_engine.runtime import environment


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A repository with a module and a result."""
    (tmp_path / "package").mkdir()
    module = tmp_path / "package" / "environment.py"
    for path in (module, tmp_path / "other.py", tmp_path / "result.json"):
        path.write_text("1\n")
    git = ["git", "-c", "user.name=x", "-c", "user.email=x"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"]):
        subprocess.run([*git, *command], cwd=tmp_path, check=True)
    monkeypatch.setattr(environment, "__file__", str(module))
    return tmp_path


def test_code_that_differs_from_the_commit_is_marked(checkout):
    commit = environment.describe([])["git_commit"]
    assert len(commit) == 40
    (checkout / "result.json").write_text("2\n")
    (checkout / "new.py").write_text("2\n")
    assert environment.describe([])["git_commit"] == commit
    (checkout / "other.py").write_text("2\n")
    assert environment.describe([])["git_commit"] == commit + "-dirty"


def test_a_package_that_no_repository_has_is_of_no_commit(checkout, monkeypatch):
    monkeypatch.setattr(environment, "__file__", str(checkout / "package" / "installed.py"))
    assert environment.describe([])["git_commit"] is None
