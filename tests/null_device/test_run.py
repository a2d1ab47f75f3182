"""A whole run on the null device: the trainer's path through CUDA, but for the numbers."""

import json

import null_device
import pytest

OPTIONS = (
    "--log-every", "1", "--checkpoint-every", "2", "--evaluation.every", "4",
    "--evaluation.num-images", "100", "--evaluation.solver-steps", "2",
)  # fmt: skip
BLOCKS = 4  # of the model of digits


@pytest.mark.long
def test_a_run_trains_evaluates_stops_and_is_continued(compiled, tmp_path):
    folder = tmp_path / "run"
    train = lambda *options: null_device.run("command.py", "train", *options, compiled=compiled)
    launched = train("digits", "--steps", "4", *OPTIONS, "--run", str(folder))
    assert launched["_adaln_backward_kernel"] >= 4 * BLOCKS  # not only in its test
    assert json.loads((folder / "config.json").read_text())["compile"] == "blocks"
    train("--resume", str(folder), "--steps", "6")
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if "loss" in record] == [1, 2, 3, 4, 5, 6]
    assert [record["step"] for record in records if "fid" in record] == [4, 6]
    assert (folder / "checkpoints" / "step-00000006").is_dir()
    assert (folder / "ema.safetensors").is_file()


@pytest.mark.long
def test_a_longer_run_of_a_small_model_replays_graphs_and_is_continued(compiled, tmp_path):
    folder = tmp_path / "run"
    train = lambda *options: null_device.run("command.py", "train", *options, compiled=compiled)
    options = ("--log-every", "10", "--checkpoint-every", "120", "--evaluation.every", "120")
    options += ("--evaluation.num-images", "100", "--evaluation.solver-steps", "2")
    launched = train("digits", "--steps", "240", *options, "--run", str(folder))
    assert launched["_adaln_backward_kernel"] < 240  # in the graphs, which are launched instead
    assert json.loads((folder / "config.json").read_text())["compile"] == "graphs"
    train("--resume", str(folder), "--steps", "250")
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "loss" in r] == [*range(10, 251, 10)]
    assert [r["step"] for r in records if "fid" in r] == [120, 240, 250]
    assert json.loads((folder / "config.json").read_text())["compile"] == "graphs"
