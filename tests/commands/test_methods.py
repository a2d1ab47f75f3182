"""``speed-engine methods --run`` on a real run."""

import io
import re

import pytest
from PIL import Image
from rich.console import Console

from speed_engine import cli
from speed_engine.config import TrainConfig, to_json
from speed_engine.data.config import DataConfig
from speed_engine.evaluation.config import EvaluationConfig
from speed_engine.models.config import DiTConfig
from speed_engine.run.folder import kept_steps
from speed_engine.run.starting import start


def test_the_losses_of_every_kept_checkpoint_are_shown_by_area_and_drawn(tmp_path, capsys):
    run = tmp_path / "run"
    config = TrainConfig(
        steps=40,
        batch_size=32,
        checkpoint_every=20,
        keep_checkpoints=2,
        model=DiTConfig(dim=16, depth=1, num_heads=2),
        data=DataConfig(held_out=0.3),
        evaluation=EvaluationConfig(num_images=10, solver_steps=1, features="none"),
    )
    start(config, run, Console(file=io.StringIO()))
    assert kept_steps(run) == [20, 40]
    cli.main(["methods", "--run", str(run), "--figures", str(tmp_path / "figures")])
    shown = capsys.readouterr().out
    (header,) = (line for line in shown.splitlines() if "acceleration" in line)
    assert header.split() == ["acceleration", "deceleration", "convergence"]
    early, late = (
        [float(x) for x in re.findall(r"\d\.\d{4}", line)]
        for line in shown.splitlines()
        if line.startswith("step ")
    )
    assert len(early) == len(late) == 3 and all(b < a for a, b in zip(early, late, strict=True))
    with Image.open(tmp_path / "figures" / "losses-linear.png") as picture:
        assert picture.width > 1000


def test_a_run_without_a_checkpoint_is_refused(tmp_path, capsys):
    (tmp_path / "config.json").write_text(to_json(TrainConfig()))
    with pytest.raises(SystemExit):
        cli.main(["methods", "--run", str(tmp_path)])
    assert "checkpoint" in capsys.readouterr().err


def test_a_folder_that_is_no_run_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        cli.main(["methods", "--run", str(tmp_path)])
    assert "no config.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, named",
    [
        (["--json"], "--json"),
        (["--process", "linear"], "--process"),
        (["--num-timesteps", "10", "--json"], "--num-timesteps and --json"),
    ],
)
def test_a_run_goes_with_no_option_that_it_has_no_use_for(tmp_path, capsys, options, named):
    with pytest.raises(SystemExit):
        cli.main(["methods", "--run", str(tmp_path), *options])
    assert f"--run {tmp_path} with {named}:" in " ".join(capsys.readouterr().err.split())
