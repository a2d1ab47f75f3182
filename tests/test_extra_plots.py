"""The extra ``plots``: what needs it says so before any work, and nothing else needs it."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from speed_engine import cli
from speed_engine.arena.report import write_report
from speed_engine.evaluation import method_report
from speed_engine.runtime.checks import UserError, check_installed

ROOT = Path(__file__).parent.parent
COMMAND = r"pip install 'speed-engine\[plots\]'"

WITHOUT_PLOTS = """
import sys
sys.modules["matplotlib"] = None  # importing it is an ImportError
from speed_engine import cli
cli.main(sys.argv[1:])
"""


@pytest.fixture
def without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)


def refusal(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        cli.main(list(arguments))
    assert stopped.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


def test_a_comparison_names_the_extra_before_it_trains(
    without_matplotlib, capsys, monkeypatch, tmp_path
):
    def train(*_: object, **__: object) -> None:
        raise AssertionError("the comparison has begun")

    monkeypatch.setattr("speed_engine.arena.compare.Comparison.__init__", train)
    message = refusal(capsys, "compare", "digits", "--out", str(tmp_path / "out"))
    assert "the report of a comparison needs the library matplotlib" in message
    assert "pip install 'speed-engine[plots]'" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("library", ["jinja2", "matplotlib"])
def test_a_report_names_the_extra_before_it_deletes_the_pictures_of_the_last_one(
    monkeypatch, tmp_path, library
):
    monkeypatch.setitem(sys.modules, library, None)
    (tmp_path / "figures").mkdir()
    with pytest.raises(UserError, match=f"library {library} .*{COMMAND}"):
        write_report(tmp_path)
    assert (tmp_path / "figures").exists()


def test_figures_of_methods_name_the_extra_before_the_table_and_the_table_needs_none(
    without_matplotlib, capsys, tmp_path
):
    folder = tmp_path / "figures"
    message = refusal(capsys, "methods", "--figures", str(folder))
    assert "a figure of the methods needs the library matplotlib" in message
    with pytest.raises(UserError, match=COMMAND):
        method_report.draw_figures("linear", 10, folder)
    assert not folder.exists()
    cli.main(["methods"])
    assert "speed_paper" in capsys.readouterr().out


def test_training_and_the_rest_of_the_commands_start_without_the_extra(tmp_path):
    for arguments in (["train", "digits", "--dry-run"], ["doctor"], ["compare", "--help"]):
        done = subprocess.run(
            [sys.executable, "-c", WITHOUT_PLOTS, *arguments],
            capture_output=True, text=True, cwd=ROOT, timeout=200,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr


def test_an_installed_library_is_no_obstacle():
    check_installed("this", "plots", "json", "math")


def test_the_libraries_are_in_the_extra_and_in_no_list_that_everyone_installs():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    plots = [text.split(">=")[0] for text in project["optional-dependencies"]["plots"]]
    assert plots == ["jinja2", "matplotlib"]
    assert not any(text.startswith(tuple(plots)) for text in project["dependencies"])
    assert "plots" in project["optional-dependencies"]["dev"][0]
    constraints = (ROOT / "constraints.txt").read_text().splitlines()
    for library in plots:
        assert any(line.startswith(f"{library}==") for line in constraints)
