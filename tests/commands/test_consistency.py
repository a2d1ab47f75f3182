"""`speed-engine consistency` on two real runs of a few seconds."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from speed_engine import cli
from speed_engine.commands import consistency
from speed_engine.commands.consistency import complete_checkpoints, steps_compared
from speed_engine.run.folder import read_config
from speed_engine.runtime.checks import UserError

SHORT = [
    "train", "digits", "--steps", "160", "--checkpoint-every", "80", "--keep-every", "80",
    "--evaluation.every", "160", "--evaluation.features", "none", "--evaluation.num-images", "10",
    "--model.depth", "2", "--batch-size", "64", "--compile", "off",
]  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("consistency")
    a, b, c = (folder / name for name in "abc")
    cli.main([*SHORT, "--run", str(a)])
    # another seed, width, process and prediction; only the data are the same
    other = ["--seed", "1", "--model.dim", "48", "--schedule", "flow", "--method", "uniform"]
    cli.main([*SHORT, "--run", str(b), *other])
    cli.main([*SHORT, "--run", str(c), "--steps", "1", "--data.num-classes", "11"])
    return a, b, c


def compare(capsys, *arguments) -> dict:
    capsys.readouterr()
    cli.main(["consistency", *map(str, arguments), "--json"])
    return json.loads(capsys.readouterr().out)


def test_models_of_the_same_data_draw_alike_from_the_same_noise(runs, capsys, tmp_path):
    a, b, _ = runs
    out = tmp_path / "pairs.png"
    found = compare(capsys, a, b, "--count", "200", "--solver-steps", "10", "--out", out)
    steps = [(c["step_a"], c["step_b"]) for c in found["comparisons"]]
    assert steps == [(80, 80), (160, 160)]
    last = found["comparisons"][-1]["images"]
    assert last["distance"] < 0.9 * last["distance_unpaired"]
    assert last["cosine"] > last["cosine_unpaired"] + 0.05
    assert np.asarray(Image.open(out)).std() > 30


def test_a_run_agrees_with_itself_and_says_so_in_a_table(runs, capsys):
    a, *_ = runs
    cli.main(["consistency", str(a), str(a), "--count", "20", "--solver-steps", "2"])
    shown = capsys.readouterr().out
    rows = [line.split() for line in shown.splitlines() if " images " in line]
    assert [row[0] for row in rows] == ["80", "160"]
    assert all(row[3] == "0" and row[5] == "0.000" and row[6] == "1.000" for row in rows)
    assert (a / "samples" / "consistency-a.png").exists()


def test_runs_that_cannot_be_compared_are_named(runs, capsys, tmp_path):
    a, _, c = runs

    def fails(*arguments):
        with pytest.raises(SystemExit) as stopped:
            cli.main(["consistency", *map(str, arguments)])
        assert stopped.value.code == 2
        return " ".join(capsys.readouterr().err.split())

    assert "classes of" in fails(a, c) and "the same data" in fails(a, c)
    assert "not a run folder" in fails(a, tmp_path)
    assert "--count 20 or more" in fails(a, a, "--count", "15")


def test_steps_of_both_and_the_last_of_each_are_compared():
    assert steps_compared([100, 200, 300], [200, 300, 400]) == [(200, 200), (300, 300), (300, 400)]
    assert steps_compared([5], [5]) == [(5, 5)]


def test_both_runs_generate_with_the_steps_of_the_first_or_those_asked_for(
    runs, capsys, monkeypatch
):
    a, b, _ = runs
    config = read_config(b).with_evaluation(solver_steps=3)
    others = {b: config}
    monkeypatch.setattr(consistency, "read_config", lambda run: others.get(run) or read_config(run))
    steps = []
    generate = consistency.generate

    def generated(*given, **options):
        steps.append(given[4].steps)
        return generate(*given, **options)

    monkeypatch.setattr(consistency, "generate", generated)
    compare(capsys, b, a, "--count", "20")
    assert set(steps) == {3}
    with pytest.raises(SystemExit):
        cli.main(["consistency", str(a), str(b), "--count", "20", "--solver-steps", "0"])
    assert "evaluation.solver_steps=0" in capsys.readouterr().err


def test_checkpoints_that_are_not_complete_are_passed_over(runs, tmp_path, caplog):
    checkpoints = tmp_path / "a" / "checkpoints"
    shutil.copytree(runs[0] / "checkpoints", checkpoints)
    (checkpoints / "step-00000080" / "manifest.json").write_text("{}")
    (checkpoints / "step-notes").mkdir()  # none of a run's
    assert list(complete_checkpoints(tmp_path / "a")) == [160]
    assert caplog.text.count("it is left out") == 1
    shutil.rmtree(checkpoints)
    with pytest.raises(UserError, match="has no complete checkpoint; train it first"):
        complete_checkpoints(tmp_path / "a")
