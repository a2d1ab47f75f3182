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
@pytest.mark.parametrize("how", ["blocks", "graphs"])
def test_a_run_trains_evaluates_stops_and_is_continued(how, compiled, tmp_path):
    folder = tmp_path / "run"
    train = lambda *options: null_device.run("command.py", "train", *options, compiled=compiled)
    launched = train("digits", "--steps", "4", "--compile", how, *OPTIONS, "--run", str(folder))
    assert launched["_adaln_backward_kernel"] >= 4 * BLOCKS  # not only in its test
    assert json.loads((folder / "config.json").read_text())["compile"] == how
    train("--resume", str(folder), "--steps", "6")
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if "loss" in record] == [1, 2, 3, 4, 5, 6]
    assert [record["step"] for record in records if "fid" in record] == [4, 6]
    assert (folder / "checkpoints" / "step-00000006").is_dir()
    assert (folder / "ema.safetensors").is_file()
