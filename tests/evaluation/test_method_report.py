"""The report of methods: table, arrays, pictures, and the command that prints them."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from speed_engine import cli
from speed_engine.diffusion.methods import METHODS
from speed_engine.diffusion.processes import SCHEDULES
from speed_engine.evaluation import method_report

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "methods.json").read_text())


def test_every_cell_works_or_says_why_not():
    cells = method_report.compatibility(250)
    assert list(cells) == list(SCHEDULES)
    for process, of_method in cells.items():
        assert list(of_method) == list(METHODS)
        for method, reason in of_method.items():
            assert reason is None or (isinstance(reason, str) and reason.endswith("."))
            if reason is not None:
                assert method == "speed_official", (process, reason)  # tau=700, its mirror
    refused = {process for process in cells if cells[process]["speed_official"] is not None}
    assert refused == set(SCHEDULES)


@pytest.mark.parametrize("process", ["linear", "flow", "edm"])
def test_arrays_are_distributions_and_weights(process):
    report = method_report.arrays(process, 100)
    assert list(report) == list(METHODS)
    json.dumps(report, allow_nan=False)
    for name, method in report.items():
        if "why_not" in method:
            assert name == "speed_official" and set(method) == {"why_not"}
            continue
        assert len(method["P"]) == len(method["w"]) == 100
        assert sum(method["P"]) == pytest.approx(1) and min(method["P"]) >= 0
        assert min(method["w"]) >= 0
    learned = {n for n, m in report.items() if m.get("changes_in_training")}
    assert learned == {
        "clts", "clts_mdlrc", "ant_uw", "task_curriculum", "adaptive", "learned_uncertainty",
        "edm2",
    }  # fmt: skip


def test_arrays_hold_the_reference_values():
    methods = method_report.arrays("linear", 1000)
    for name, key in (
        ("speed_paper", "w_paper_lam0.6"),
        ("speed_official", "w_official_lam0.6_tau700"),
    ):
        found = [methods[name]["w"][i] for i in GOLDEN["idx0"]]
        assert found == pytest.approx(GOLDEN[key], abs=1e-6)
    found = [methods["speed_paper"]["P"][i] for i in GOLDEN["idx0"]]
    assert found == pytest.approx(GOLDEN["P_paper_k5_tau700"], abs=1e-12)


def test_why_not_names_the_reason_and_the_way_out():
    reason = method_report.arrays("edm", 1000)["speed_official"]["why_not"]
    assert "no point to mirror at" in reason and "Use speed_paper" in reason


@pytest.mark.parametrize("process", ["linear", "flow"])
def test_two_figures_are_written(process, tmp_path):
    paths = method_report.draw_figures(process, 50, tmp_path / "new" / "folder")
    assert [p.name for p in paths] == [f"methods-{process}.png", f"increments-{process}.png"]
    for path in paths:
        with Image.open(path) as picture:
            assert picture.format == "PNG" and min(picture.size) > 300
            grey = np.asarray(picture.convert("L"))
            assert grey.min() < 64 and grey.max() == 255  # something is drawn


def test_the_command_prints_the_table(capsys):
    cli.main(["methods"])
    shown = capsys.readouterr().out
    for method in METHODS:
        assert shown.count(method) >= 2, method  # its row, and what it is
    assert "(1) speed_official has no point to mirror at" in shown


def test_the_command_prints_json(capsys, tmp_path):
    cli.main(["methods", "--json", "--process", "flow", "--num-timesteps", "20",
              "--figures", str(tmp_path)])  # fmt: skip
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert list(report) == list(METHODS) and len(report["speed_paper"]["P"]) == 20
    assert captured.err.split() == [
        str(tmp_path / name) for name in ("methods-flow.png", "increments-flow.png")
    ]


@pytest.mark.parametrize(
    "options, message",
    [
        (["--process", "lineer"], "choose from linear, quadratic, cosine"),
        (["--process", "flow", "--num-timesteps", "1"], "at least 2"),
        (["--json", "--process", ""], "choose from linear, quadratic, cosine"),
    ],
)
def test_bad_input_is_one_message(options, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["methods", *options])
    captured = capsys.readouterr()
    assert stopped.value.code == 2 and captured.out == ""
    assert message in " ".join(captured.err.split())
