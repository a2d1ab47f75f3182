"""Checkpoints are complete or invisible, and damage never loads."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from speed_engine import checkpoint

TENSORS = {
    "model": {"w": torch.arange(12.0).view(3, 4), "b": torch.ones(3)},
    "ema": {"w": torch.zeros(2)},
}


def write(folder, step):
    return checkpoint.save(folder, step, TENSORS, {"step": step})


def test_what_is_saved_is_loaded(tmp_path):
    tensors, state = checkpoint.load(write(tmp_path, 7))
    assert state == {"step": 7}
    for name, group in TENSORS.items():
        for key, value in group.items():
            assert torch.equal(tensors[name][key], value)


def test_the_newest_wins_and_old_ones_are_pruned(tmp_path):
    for step in (5, 10, 100):
        write(tmp_path, step)
    assert checkpoint.newest(tmp_path).name == "step-00000100"
    checkpoint.prune(tmp_path, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000010", "step-00000100"]


def test_every_flipped_bit_is_found(tmp_path):
    path = write(tmp_path, 1)
    rng = random.Random(0)
    files = sorted(path.iterdir())
    for _ in range(120):
        file = rng.choice(files)
        original = file.read_bytes()
        damaged = bytearray(original)
        damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        file.write_bytes(damaged)
        try:
            tensors, state = checkpoint.load(path)
        except checkpoint.InvalidCheckpoint as error:
            assert path.name in str(error)
        else:  # a flip in the manifest's white space or step number changes nothing that is loaded
            assert file.name == "manifest.json" and state == {"step": 1}
            assert torch.equal(tensors["model"]["w"], TENSORS["model"]["w"])
        file.write_bytes(original)


@pytest.mark.parametrize("damage", ["truncate", "remove", "no manifest"])
def test_a_damaged_newest_is_named_and_the_one_before_it_used(tmp_path, damage, caplog):
    write(tmp_path, 1)
    newest = write(tmp_path, 2)
    victim = newest / ("manifest.json" if damage == "no manifest" else "model.safetensors")
    if damage == "truncate":
        os.truncate(victim, 20)
    else:
        victim.unlink()
    assert checkpoint.newest(tmp_path).name == "step-00000001"
    assert str(victim) in caplog.text


def test_none_left_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="no complete checkpoint"):
        checkpoint.newest(tmp_path)


def test_a_manifest_cannot_reach_outside_its_folder(tmp_path):
    path = write(tmp_path, 1)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["../secret"] = {"bytes": 0, "sha256": ""}
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(checkpoint.InvalidCheckpoint, match="outside"):
        checkpoint.load(path)


def test_a_failed_write_leaves_the_earlier_checkpoint_and_no_litter(tmp_path, monkeypatch):
    write(tmp_path, 1)

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="No space"):
        write(tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    checkpoint.load(checkpoint.newest(tmp_path))


def test_kill_9_while_saving_always_leaves_a_complete_checkpoint(tmp_path):
    code = (
        "import sys, torch\nfrom pathlib import Path\nfrom speed_engine import checkpoint\n"
        "big = {'model': {'w': torch.zeros(500_000)}}\n"
        "for step in range(1, 10_000):\n"
        "    checkpoint.save(Path(sys.argv[1]), step, big, {'step': step})\n"
        "    checkpoint.prune(Path(sys.argv[1]), 2)\n"
        "    print(step, flush=True)\n"
    )
    rng = random.Random(1)
    folder = tmp_path / "run"
    for _ in range(5):
        shutil.rmtree(folder, ignore_errors=True)
        writer = subprocess.Popen(
            [sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, text=True
        )
        assert writer.stdout is not None
        for _ in range(rng.randint(1, 5)):
            writer.stdout.readline()
        time.sleep(rng.random() * 0.05)
        writer.send_signal(signal.SIGKILL)
        finished = [int(line) for line in writer.stdout.read().split()]
        writer.wait()
        newest = checkpoint.newest(folder)
        _, state = checkpoint.load(newest)
        assert state["step"] >= max(finished, default=1)
