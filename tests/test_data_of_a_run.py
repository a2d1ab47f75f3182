"""What a run is does not depend on where its data lie, nor on whether its noise is stored."""

import dataclasses
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from safetensors.torch import load_file

from speed_engine.config import TrainConfig
from speed_engine.data.config import DataConfig
from speed_engine.data.format.writer import ShardWriter
from speed_engine.data.loading.resident import Resident
from speed_engine.data.preparing.pictures import npy_bytes
from speed_engine.data.training_data import TrainingData
from speed_engine.evaluation.config import EvaluationConfig
from speed_engine.models.config import DiTConfig
from speed_engine.run.starting import build_trainer, resume, start
from speed_engine.runtime import machine

ROOT = Path(__file__).parent.parent
TINY = TrainConfig(
    steps=12,
    batch_size=16,
    log_every=1,
    checkpoint_every=12,
    device="cpu",
    model=DiTConfig(dim=16, depth=1, num_heads=2, learn_sigma=True),
    evaluation=EvaluationConfig(every=12, num_images=4, solver_steps=2, features="none"),
)


def write_latents(folder: Path, channels: int = 4, **metadata: object) -> Path:
    """70 posteriors of (2, 4, 4): mean, then standard deviation; batches straddle epochs."""
    generator = np.random.default_rng(0)
    with ShardWriter(folder, "x", 16, metadata) as writer:
        for i in range(70):
            stored = generator.uniform(0.1, 4, (channels, 4, 4)).astype(np.float16)
            writer.write(f"{i:03d}", {"npy": npy_bytes(stored), "cls": b"1"})
    return folder


def data(name: str, tmp_path: Path, **options: object) -> DataConfig:
    if name == "digits":
        return DataConfig(**options)  # pyright: ignore[reportArgumentType]
    folder = tmp_path / "latents"
    if not folder.exists():
        write_latents(folder, latent_scale=0.5, latent_shift=0.1)
    shape = (2, 4, 4)
    return DataConfig(source=str(folder), image_shape=shape, latents=True, **options)  # pyright: ignore[reportArgumentType]


def figures(run: Path) -> list[tuple]:
    """Of every step."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(r["loss"], r["squared_error"], r["grad_norm"]) for r in records if "loss" in r]


def outcome(config: TrainConfig, run: Path) -> tuple[list[tuple], dict[str, bytes]]:
    """Figures of every step, and the bytes of every tensor of the last checkpoint."""
    start(config, run, Console(file=io.StringIO()))
    assert len(figures(run)) == config.steps
    checkpoint = run / "checkpoints" / f"step-{config.steps:08d}"
    (file,) = checkpoint.glob("*.safetensors")
    return figures(run), {name: value.numpy().tobytes() for name, value in load_file(file).items()}


@pytest.mark.parametrize("name, flip", [("digits", False), ("latents", True)])
def test_a_resident_data_set_trains_as_a_loader_does_bit_for_bit(tmp_path, name, flip, monkeypatch):
    made = []
    construct = Resident.__init__
    monkeypatch.setattr(
        Resident, "__init__", lambda self, *a, **k: (made.append(1), construct(self, *a, **k))[0]
    )
    outcomes = []
    for resident in ("off", "on"):
        options = data(name, tmp_path, resident=resident, flip=flip)
        outcomes.append(outcome(dataclasses.replace(TINY, data=options), tmp_path / resident))
        assert len(made) == (resident == "on")  # the path that was asked for is the one that ran
    assert outcomes[0] == outcomes[1] and outcomes[0][1]


@pytest.mark.long
def test_two_processes_with_resident_data_train_as_with_loaders_bit_for_bit(tmp_path):
    processes = {}
    for resident in ("off", "on"):
        launcher = "torch.distributed.run --standalone --nproc-per-node 2 -m --"
        options = f"""speed_engine train digits --run {resident} --data.resident {resident}
            --data.flip --steps 4 --batch-size 16 --log-every 1 --model.dim 16 --model.depth 1
            --model.num-heads 2 --evaluation.features none --evaluation.num-images 4
            --evaluation.solver-steps 2"""
        processes[resident] = subprocess.Popen(
            [sys.executable, "-m", *launcher.split(), *options.split()],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    for process in processes.values():
        said, _ = process.communicate(timeout=600)
        assert process.returncode == 0, said
    assert figures(tmp_path / "on") == figures(tmp_path / "off")


def test_a_flipped_run_is_another_run(tmp_path):
    one, other = (
        outcome(dataclasses.replace(TINY, data=DataConfig(flip=flip)), tmp_path / str(flip))
        for flip in (False, True)
    )
    assert one[0] != other[0]


def test_a_resident_run_resumes_bit_for_bit(tmp_path):
    config = dataclasses.replace(TINY, data=data("latents", tmp_path, resident="on", flip=True))
    straight = outcome(config, tmp_path / "straight")
    outcome(dataclasses.replace(config, steps=5), tmp_path / "resumed")
    resume(tmp_path / "resumed", Console(file=io.StringIO()), steps=12)
    assert figures(tmp_path / "resumed") == straight[0]


@pytest.mark.parametrize("learn_sigma", [False, True], ids=["error", "hybrid"])
def test_stored_noise_and_noise_drawn_again_give_the_same_run(tmp_path, learn_sigma, monkeypatch):
    outcomes = []
    for value in ("stored", "drawn again"):
        choice = machine.Choice(value, "for this test")
        monkeypatch.setattr(machine, "choose_noise", lambda *_, choice=choice: choice)
        model = dataclasses.replace(TINY.model, learn_sigma=learn_sigma)
        outcomes.append(outcome(dataclasses.replace(TINY, model=model), tmp_path / value))
    assert outcomes[0] == outcomes[1]


def test_latents_of_unknown_scale_are_refused(tmp_path):
    folder = write_latents(tmp_path / "latents")
    options = DataConfig(source=str(folder), image_shape=(2, 4, 4), latents=True)
    with pytest.raises(ValueError, match="does not say by which latent_scale"):
        outcome(dataclasses.replace(TINY, data=options), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_latents_that_were_drawn_before_are_scaled_only(tmp_path):
    folder = write_latents(tmp_path / "latents", channels=2, latent_scale=0.5)
    options = DataConfig(source=str(folder), image_shape=(2, 4, 4), latents=True)
    trainer, _ = build_trainer(
        dataclasses.replace(TINY, data=options), tmp_path / "run", Console(file=io.StringIO())
    )
    assert isinstance(trainer.data, TrainingData)
    assert trainer.data.cleaning[1:] == (False, 0.5, 0.0, False)
    assert float(next(trainer.data.batches(0, resident=False)).images.max()) <= 2
