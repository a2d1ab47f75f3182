"""Checkpoints are complete or invisible, and damage never loads."""

import contextlib
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace
from typing import Any

import pytest
import states
import torch

from speed_engine.build import build_model
from speed_engine.config import TrainConfig, to_json
from speed_engine.models.config import DiTConfig
from speed_engine.run.averages import load_average
from speed_engine.run.starting import _load_weights
from speed_engine.runtime.checks import UserError
from speed_engine.training import checkpoint
from speed_engine.training.checkpoint import Checkpoints
from speed_engine.training.config import OptimizerConfig
from speed_engine.training.ema import average_group

TENSORS = {
    "model/w": torch.arange(12.0).view(3, 4),
    "model/steps": torch.tensor(7.0),
    "ema/w": torch.zeros(2),
}


def write(folder, step, tensors=TENSORS, **keep):
    checkpoints = Checkpoints(folder, **keep)
    checkpoints.save(tensors, states.at(step))
    checkpoints.wait()
    assert not checkpoints.failures
    return folder / f"step-{step:08d}"


def read(path):
    checkpoint.verify(path)
    tensors = {name: torch.full_like(value, -1) for name, value in TENSORS.items()}
    return checkpoint.load(path, tensors), tensors


def test_what_is_saved_is_loaded(tmp_path):
    state, tensors = read(write(tmp_path, 7))
    assert state == states.at(7)
    assert all(torch.equal(tensors[name], value) for name, value in TENSORS.items())
    assert torch.equal(
        checkpoint.load_group(tmp_path / "step-00000007", "ema")["w"], torch.zeros(2)
    )


def test_tensors_may_change_once_saving_has_begun(tmp_path):
    tensors = {"model/w": torch.zeros(1_000_000)}
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(tensors, states.at(1))
    tensors["model/w"] += 1
    checkpoints.wait()
    assert not checkpoint.load_group(tmp_path / "step-00000001", "model")["w"].any()


def test_the_newest_wins_and_old_ones_are_pruned(tmp_path):
    for step in (5, 10, 15, 100):
        write(tmp_path, step, keep=2, keep_every=5 if step == 10 else 10)
    assert checkpoint.newest(tmp_path).name == "step-00000100"
    kept = sorted(path.name for path in tmp_path.iterdir())
    assert kept == ["step-00000010", "step-00000015", "step-00000100"]


def test_steps_are_ordered_by_number_and_other_folders_left_alone(tmp_path):
    for step in (99_999_999, 100_000_000, 100_000_001):
        write(tmp_path, step, keep=2)
        (tmp_path / f"step-{step:08d}.kept").mkdir()
    assert checkpoint.newest(tmp_path).name == "step-100000001"
    assert list(checkpoint.by_step(tmp_path)) == [100_000_000, 100_000_001]
    assert [path.name for path in checkpoint.complete(tmp_path)][-1] == "step-100000001"


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
            state, tensors = read(path)
        except checkpoint.InvalidCheckpoint as error:
            assert path.name in str(error)
        else:  # a flip in the manifest's white space or step number changes nothing that is loaded
            assert file.name == "manifest.json" and state == states.at(1)
            assert torch.equal(tensors["model/w"], TENSORS["model/w"])
        file.write_bytes(original)


@pytest.mark.parametrize("damage", ["truncate", "remove", "no manifest"])
def test_a_damaged_newest_is_named_and_the_one_before_it_used(tmp_path, damage, caplog):
    write(tmp_path, 1)
    newest = write(tmp_path, 2)
    victim = newest / (
        "manifest.json"
        if damage == "no manifest"
        else "shard-00001-model-00001-of-00001.safetensors"
    )
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
        checkpoint.verify(path)


class Bomb:
    """Unpickling it leaves a file."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return (open, (str(self.trace), "w"))


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "state.json", "model.pt"])
def test_a_pickle_in_a_checkpoint_is_refused_and_never_opened(tmp_path, name):
    path, trace = write(tmp_path / "run", 1), tmp_path / "trace"
    (path / name).write_bytes(pickle.dumps(Bomb(trace)))
    with pytest.raises(checkpoint.InvalidCheckpoint, match=name):
        checkpoint.verify(path)
    # Even one whose manifest vouches for it is not unpickled.
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"][name] = vars(checkpoint.describe(path / name))
    (path / "manifest.json").write_text(json.dumps(manifest))
    checkpoint.verify(path)
    with contextlib.suppress(UserError):  # a state that is not JSON
        read(path)
    assert not trace.exists()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    mounted = subprocess.run(command, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a small file system here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_costs_one_checkpoint_and_leaves_no_litter(small_disk, caplog):
    run = small_disk / "run"
    write(run, 1)
    checkpoints = Checkpoints(run)
    checkpoints.save({"model/w": torch.zeros(1_000_000)}, states.at(2))
    checkpoints.wait()
    assert len(checkpoints.failures) == 1 and checkpoints.failures[0].startswith("2: ")
    assert "no checkpoint of step 2" in caplog.text and "earlier ones are intact" in caplog.text
    assert [path.name for path in run.iterdir()] == ["step-00000001"]
    read(checkpoint.newest(run))
    checkpoints.save(TENSORS, states.at(3))  # there is room again
    checkpoints.wait()
    assert checkpoint.newest(run).name == "step-00000003"


@pytest.mark.long
def test_kill_9_while_saving_always_leaves_a_complete_checkpoint(tmp_path):
    code = (
        "import states, sys, torch\nfrom pathlib import Path\n"
        "from speed_engine.training.checkpoint import Checkpoints\n"
        "checkpoints = Checkpoints(Path(sys.argv[1]), keep=2)\n"
        "for step in range(1, 10_000):\n"
        "    checkpoints.save({'model/w': torch.zeros(500_000)}, states.at(step))\n"
        "    checkpoints.wait()\n"
        "    print(step, flush=True)\n"
    )
    rng = random.Random(1)
    folder = tmp_path / "run"
    for _ in range(5):
        shutil.rmtree(folder, ignore_errors=True)
        writer = subprocess.Popen(
            [sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )  # fmt: skip
        assert writer.stdout is not None
        for _ in range(rng.randint(1, 5)):
            writer.stdout.readline()
        time.sleep(rng.random() * 0.05)
        writer.send_signal(signal.SIGKILL)
        finished = [int(line) for line in writer.stdout.read().split()]
        writer.wait()
        newest = checkpoint.newest(folder)
        assert checkpoint.read_state(newest).step >= max(finished, default=1)


WRITTEN_BY_0_1 = {
    "objective": ("timesteps.law.squares", "timesteps.law.cell_probabilities", "batch_loss.weight"),
    "objective_optimizer": ("batch_loss.weight/exp_avg",),
    "model": ("objective.timesteps.law.w", "blocks.0.attn.qkv.weight"),
}


@pytest.mark.parametrize("prefix", ["", "objective."], ids=["plain", "masked"])
def test_names_that_version_0_1_wrote_are_those_of_this_version(tmp_path, prefix):
    written = {
        f"{group}/{'' if group == 'model' else prefix}{name}": torch.full((2,), float(i))
        for group, names in WRITTEN_BY_0_1.items()
        for i, name in enumerate(names)
    }
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(written, states.at(1))
    checkpoints.wait()
    path = tmp_path / "step-00000001"
    now = [
        "objective/timesteps.distribution.squares",
        "objective/timesteps.distribution.cell_probabilities",
        "objective/batch_loss.weight",
        "objective_optimizer/batch_loss.weight/exp_avg",
        "model/objective.timesteps.law.w",
        "model/blocks.0.attn.qkv.weight",
    ]
    assert checkpoint.shapes(path) == dict.fromkeys(now, (2,))
    tensors = {name: torch.full((2,), -1.0) for name in now}
    checkpoint.load(path, tensors)
    assert [float(value[0]) for value in tensors.values()] == [0, 1, 2, 0, 0, 1]


@pytest.mark.parametrize("where", ["verify", "load_group"])
def test_a_checkpoint_deleted_while_it_is_read_makes_way_for_a_newer_one(
    monkeypatch, tmp_path, caplog, where
):
    """As a run that trains beside the reader does; the reader takes what there is then."""
    config = TrainConfig(model=DiTConfig(dim=16, depth=1, num_heads=2), device="cpu")
    average = {f"ema/{k}": v for k, v in build_model(config).state_dict().items()}
    write(tmp_path / "checkpoints", 1, average)
    original, calls = getattr(checkpoint, where), []

    def pruned_meanwhile(path, *arguments):
        calls.append(path.name)
        if len(calls) == 1:
            write(tmp_path / "checkpoints", 2, average, keep=1)
        return original(path, *arguments)

    monkeypatch.setattr(checkpoint, where, pruned_meanwhile)
    _, step = load_average(tmp_path, config, torch.device("cpu"))
    assert step == 2 and calls == ["step-00000001", "step-00000002"]
    assert not [r for r in caplog.records if r.levelname == "WARNING"]


def test_the_newest_that_is_deleted_while_it_is_verified_makes_way(monkeypatch, tmp_path):
    for step in (1, 2):
        write(tmp_path, step, keep=2)
    describe = checkpoint.describe

    def deleted(path):
        if path.parent.name == "step-00000002":
            shutil.rmtree(path.parent)
            path.stat()
        return describe(path)

    monkeypatch.setattr(checkpoint, "describe", deleted)
    assert checkpoint.newest(tmp_path).name == "step-00000001"


def test_an_average_of_several_checkpoints_holds_while_a_run_prunes_the_older_ones(
    monkeypatch, tmp_path
):
    averages = ("power=6.94", "power=16.97")
    config = TrainConfig(
        model=DiTConfig(dim=16, depth=1, num_heads=2),
        device="cpu",
        optimizer=OptimizerConfig(averages=averages),
    )
    ema = {k: v for k, v in build_model(config).state_dict().items()}
    for step in range(1, 9):
        tensors = {
            f"{average_group(name)}/{k}": v * step for name in averages for k, v in ema.items()
        }
        write(tmp_path / "checkpoints", step, tensors, keep=9)
    original, calls = checkpoint.load_group, []

    def pruned_meanwhile(path, *arguments):
        calls.append(path.name)
        if calls.count("step-00000001") == 1 and path.name == "step-00000001":
            shutil.rmtree(path)
        return original(path, *arguments)

    monkeypatch.setattr(checkpoint, "load_group", pruned_meanwhile)
    _, step = load_average(tmp_path, config, torch.device("cpu"), "power=9")
    assert step == 8 and calls.count("step-00000001") == 1 and calls.count("step-00000002") == 2


def test_a_checkpoint_that_was_asked_for_and_is_pruned_meanwhile_is_named(monkeypatch, tmp_path):
    config = TrainConfig(model=DiTConfig(dim=16, depth=1, num_heads=2), device="cpu")
    average = {f"ema/{k}": v for k, v in build_model(config).state_dict().items()}
    write(tmp_path / "checkpoints", 1, average)
    original = checkpoint.load_group

    def pruned_meanwhile(path, *arguments):
        write(tmp_path / "checkpoints", 2, average, keep=1)
        return original(path, *arguments)

    monkeypatch.setattr(checkpoint, "load_group", pruned_meanwhile)
    with pytest.raises(UserError, match="no checkpoint of step 1; it keeps those of: 2"):
        load_average(tmp_path, config, torch.device("cpu"), step=1)


def test_weights_to_start_from_hold_while_their_run_prunes(monkeypatch, tmp_path):
    config = TrainConfig(model=DiTConfig(dim=16, depth=1, num_heads=2), device="cpu")
    model, trained = build_model(config), build_model(config)
    (tmp_path / "config.json").write_text(to_json(config))
    for step in (1, 2):
        average = {f"ema/{k}": v + step for k, v in trained.state_dict().items()}
        write(tmp_path / "checkpoints", step, average, keep=2)
    original, calls = checkpoint.load_group, []

    def pruned_meanwhile(path, *arguments):
        calls.append(path.name)
        if len(calls) == 1:
            shutil.rmtree(path)
        return original(path, *arguments)

    monkeypatch.setattr(checkpoint, "load_group", pruned_meanwhile)
    _load_weights(model, tmp_path)
    assert calls == ["step-00000002", "step-00000001"]
    for now, was in zip(model.parameters(), trained.parameters(), strict=True):
        assert torch.equal(now, was + 1)


def test_all_processes_start_from_the_weights_that_the_first_one_chose(tmp_path):
    config = TrainConfig(model=DiTConfig(dim=16, depth=1, num_heads=2), device="cpu")
    model, trained = build_model(config), build_model(config)
    (tmp_path / "config.json").write_text(to_json(config))
    for step in (1, 2):
        average = {f"ema/{k}": v + step for k, v in trained.state_dict().items()}
        write(tmp_path / "checkpoints", step, average, keep=2)
    answers = iter([False, str(tmp_path / "checkpoints/step-00000001")])  # not whole; where it is
    world: Any = SimpleNamespace(size=2, from_first=lambda _: next(answers))
    _load_weights(model, tmp_path, world)
    for now, was in zip(model.parameters(), trained.parameters(), strict=True):
        assert torch.equal(now, was + 1)
