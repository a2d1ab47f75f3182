"""A run repeats bit for bit, survives kill -9, and refuses what does not fit."""

import dataclasses
import io
import json
import math
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

import fault_harness
from speed_engine import cli
from speed_engine.config import TrainConfig, from_json, to_json
from speed_engine.data.format.index import index_path, load_index
from speed_engine.data.format.writer import index_folder
from speed_engine.data.preparing.sources.digits import write_digits
from speed_engine.diffusion.methods import METHODS
from speed_engine.diffusion.processes import SCHEDULES
from speed_engine.evaluation.config import EvaluationConfig
from speed_engine.evaluation.metrics import curve
from speed_engine.models.config import DiTConfig
from speed_engine.run import starting
from speed_engine.run.averages import load_average
from speed_engine.run.folder import newest_checkpoint, read_config
from speed_engine.run.starting import build_trainer, resume, start
from speed_engine.runtime.checks import UserError
from speed_engine.training import checkpoint
from speed_engine.training.config import OptimizerConfig
from speed_engine.training.trainer import Trainer

TINY = TrainConfig(
    steps=60,
    batch_size=16,
    log_every=7,  # does not divide the checkpoint interval: a checkpoint falls inside an average
    checkpoint_every=20,
    model=DiTConfig(dim=16, depth=1, num_heads=2),
    evaluation=EvaluationConfig(every=1000, num_images=100, solver_steps=2),
)


def quiet() -> Console:
    return Console(file=io.StringIO())


def losses(run: Path) -> list[tuple[int, float, float, float]]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        (r["step"], r["loss"], r["squared_error"], r["grad_norm"]) for r in records if "loss" in r
    ]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The run of TINY; whoever changes it copies it."""
    run = tmp_path_factory.mktemp("trained") / "run"
    start(TINY, run, quiet())
    return run


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def run_cli(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "speed_engine", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_two_runs_with_one_seed_are_bitwise_equal(trained, tmp_path):
    start(TINY, tmp_path / "again", quiet())
    assert losses(tmp_path / "again") == losses(trained)
    assert [step for step, *_ in losses(trained)] == [7, 14, 21, 28, 35, 42, 49, 56, 60]


def test_a_deterministic_run_finds_a_deterministic_algorithm_for_everything(tmp_path):
    short = dataclasses.replace(TINY, steps=2, log_every=1, deterministic=True)
    for name in ("a", "b"):
        start(short, tmp_path / name, quiet())
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert read_config(tmp_path / "a").deterministic


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("compile", ["off", "blocks"])
def test_deterministic_runs_are_bitwise_equal_on_a_gpu(tmp_path, compile):
    """In processes of their own: cuBLAS reads its workspace from the environment once."""
    options = "--deterministic --steps 40 --log-every 10 --evaluation.features none".split()
    for name in ("a", "b"):
        where = ["--run", tmp_path / name, "--compile", compile]
        done = run_cli("train", "digits", *options, *where)
        assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    averages = [load_file(tmp_path / name / "ema.safetensors") for name in ("a", "b")]
    assert all(torch.equal(averages[0][name], averages[1][name]) for name in averages[0])


# Of those that keep nothing of their own, one stands for all: the one with all other options.
STATEFUL = ("adaptive", "ant_uw", "clts_mdlrc", "learned_uncertainty")


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"method": name}, marks=[pytest.mark.long] * (name not in STATEFUL))
        for name in METHODS
    ]
    + [
        {"method": "task_curriculum+clusters=5+patience=2"},
        {
            "method": "speed_paper+stratified=True",
            "model": dataclasses.replace(TINY.model, learn_sigma=True),
            "optimizer": OptimizerConfig(momentum_decay="geometric"),
        },
    ],
    ids=lambda changes: "-".join(map(str, changes.values()))[:40],
)
def test_a_run_resumes_bit_for_bit_from_any_checkpoint(tmp_path, changes):
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    start(dataclasses.replace(TINY, **changes), straight, quiet())
    assert all(math.isfinite(value) for record in losses(straight) for value in record)
    shutil.copytree(straight, resumed)
    for step in (40, 60):
        shutil.rmtree(resumed / "checkpoints" / f"step-{step:08d}")
    resume(resumed, quiet())
    assert losses(resumed) == losses(straight)
    ours, theirs = (run / "checkpoints" / "step-00000060" for run in (resumed, straight))
    states = [checkpoint.read_state(path) for path in (ours, theirs)]
    assert all(state.seconds > 0 for state in states)
    assert dataclasses.replace(states[0], seconds=states[1].seconds) == states[1]
    for group in ("model", "ema", "optimizer", "objective", "objective_optimizer"):
        expected = checkpoint.load_group(theirs, group)
        for name, tensor in checkpoint.load_group(ours, group).items():
            assert torch.equal(tensor, expected[name])


def test_a_run_in_one_sweep_resumes_bit_for_bit(tmp_path):
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    settings = OptimizerConfig(update="one_sweep")
    config = dataclasses.replace(TINY, steps=6, log_every=2, checkpoint_every=3, optimizer=settings)
    start(config, straight, quiet())
    shutil.copytree(straight, resumed)
    shutil.rmtree(resumed / "checkpoints" / "step-00000006")
    resume(resumed, quiet())
    assert losses(resumed) == losses(straight)


LIKE_ANOTHER = ("quadratic", "scaled_linear", "shifted_flow")  # but for their figures


@pytest.mark.parametrize(
    "schedule",
    [pytest.param(name, marks=[pytest.mark.long] * (name in LIKE_ANOTHER)) for name in SCHEDULES],
)
def test_every_process_trains_and_draws(tmp_path, schedule):
    config = dataclasses.replace(TINY, schedule=schedule, steps=100, log_every=20)
    start(config, tmp_path / "run", quiet())
    first, *_, last = losses(tmp_path / "run")
    assert last[1] < first[1]


def test_what_a_method_learns_is_trained_and_kept(tmp_path):
    run = tmp_path / "run"
    start(dataclasses.replace(TINY, method="ant_uw"), run, quiet())
    newest = newest_checkpoint(run)
    learned = checkpoint.load_group(newest, "objective")["batch_loss.log_variance"]
    assert bool((learned != 0).all())
    moments = checkpoint.load_group(newest, "objective_optimizer")
    assert "batch_loss.log_variance/exp_avg" in moments


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"schedule": "edm"}, "needs prediction epsilon, not F"),
        ({"schedule": "vp"}, "'vp' is none"),
        ({"prediction": "v"}, "needs prediction epsilon, not v"),
    ],
)
def test_a_learned_variance_where_there_is_none_is_refused(tmp_path, changes, message):
    model = dataclasses.replace(TINY.model, learn_sigma=True)
    with pytest.raises(ValueError, match=message):
        start(dataclasses.replace(TINY, model=model, **changes), tmp_path / "run", quiet())
    assert not (tmp_path / "run").exists()


def test_another_seed_is_another_run(trained, tmp_path):
    start(dataclasses.replace(TINY, steps=7, seed=1), tmp_path / "run", quiet())
    assert [step for step, *_ in losses(tmp_path / "run")] == [7]
    assert losses(tmp_path / "run")[0] != losses(trained)[0]


def test_a_run_killed_with_signal_9_resumes_bit_for_bit(tmp_path):
    """While it saves its second checkpoint, which so is lost."""
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    fault = fault_harness.Fault("speed_engine.training.checkpoint:Checkpoints.commit", 2)
    options = "--steps 60 --checkpoint-every 20 --log-every 7".split()
    assert fault_harness.train(killed, options, 1, fault).join() == [-signal.SIGKILL]
    assert fault_harness.checkpoints(killed) == ["step-00000020"]

    resume(killed, quiet())
    start(read_config(killed), straight, quiet())
    assert losses(killed) == losses(straight)
    averages = [
        load_average(run, read_config(run), torch.device("cpu"))[0].state_dict()
        for run in (killed, straight)
    ]
    assert all(torch.equal(averages[0][name], averages[1][name]) for name in averages[0])


def test_kernels_are_demanded_where_a_run_trains_and_not_where_it_is_used(tmp_path, monkeypatch):
    demanding = dataclasses.replace(TINY, steps=1, device="cpu", kernels="on")
    with pytest.raises(UserError, match="kernels=on, but the kernels need CUDA"):
        start(demanding, tmp_path / "refused", quiet())
    assert not (tmp_path / "refused").exists()
    settled: list[str] = []
    monkeypatch.setattr(
        starting, "settle_operators", lambda _, kernels, *__: settled.append(kernels)
    )
    start(dataclasses.replace(demanding, kernels="auto"), tmp_path / "run", quiet())
    assert settled == ["auto"]
    monkeypatch.undo()
    _, step = load_average(tmp_path / "run", demanding, torch.device("cpu"))
    assert step == 1


def test_a_finished_run_can_be_trained_longer(run):
    resume(run, quiet(), steps=70)
    assert losses(run)[-1][0] == 70
    assert read_config(run).steps == 70


def test_a_run_folder_holds_what_it_promises(trained):
    run = trained
    # What auto chose, so that resuming keeps it.
    resolved = dataclasses.replace(TINY, compile="off", attention="sdpa")
    assert from_json((run / "config.json").read_text()) == resolved
    environment = json.loads((run / "environment.json").read_text())
    assert environment["packages"]["torch"] == torch.__version__
    assert (run / "samples" / "step-00000060.png").stat().st_size > 0
    assert list((run / "tensorboard").iterdir())
    assert len(list((run / "checkpoints").iterdir())) == 3
    final = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert final["step"] == 60 and final["fid"] > 0


def test_a_curve_says_of_what_features_it_is(trained):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    curves = EventAccumulator(str(trained / "tensorboard"))
    curves.Reload()
    names = curves.Tags()["scalars"]
    assert "fid/classifier_features" in names and "fid" not in names
    recorded = json.loads((trained / "metrics.jsonl").read_text().splitlines()[-1])["fid"]
    assert curves.Scalars("fid/classifier_features")[-1].value == pytest.approx(recorded)


@pytest.mark.parametrize(
    "extractor, name",
    [
        (None, "held_out_fid"),
        ("inception-v3-compat", "held_out_fid"),
        ("speed-classifier-0123", "held_out_fid/classifier_features"),
        ("dinov2-large-4567", "held_out_fid/DINOv2_features"),
    ],
)
def test_a_curve_of_published_features_has_its_field_s_name(extractor, name):
    assert curve("held_out_fid", extractor) == name
    assert curve("loss", extractor) == "loss"


def test_evaluate_repeats_the_figure_of_training(run, capsys):
    recorded = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    (run / "metrics.jsonl").unlink()
    cli.main(["evaluate", str(run), "--json"])
    assert json.loads(capsys.readouterr().out)["fid"] == pytest.approx(recorded["fid"], rel=1e-6)


def test_sample_draws_a_grid(trained, tmp_path, capsys):
    out = tmp_path / "grid.png"
    sample = ["sample", str(trained), "--out", str(out)]
    cli.main([*sample, "--count", "20", "--guidance", "2"])
    assert out.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit) as refused:
        cli.main([*sample, "--count", "0"])
    assert refused.value.code == 2
    assert "num_images=0: must be at least 1" in capsys.readouterr().err


def test_too_few_images_for_fid_are_refused_before_training(tmp_path):
    few = dataclasses.replace(TINY.evaluation, num_images=64)
    with pytest.raises(ValueError, match="needs 65 images or more"):
        start(dataclasses.replace(TINY, evaluation=few), tmp_path / "run", quiet())
    assert not (tmp_path / "run").exists()


def test_an_existing_run_folder_is_kept_and_the_two_ways_on_are_named(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json").touch()
    with pytest.raises(ValueError, match=r"exists already; .*--resume .* --run"):
        start(TINY, tmp_path / "run", quiet())


def test_a_bad_option_leaves_no_run_folder(tmp_path):
    with pytest.raises(ValueError, match="unknown method .sped."):
        start(dataclasses.replace(TINY, method="sped"), tmp_path / "run", quiet())
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_of_another_model_is_refused(run):
    other = dataclasses.replace(TINY, model=DiTConfig(dim=32, depth=2, num_heads=2))
    (run / "config.json").write_text(to_json(other))
    with pytest.raises(ValueError, match="checkpoint of another model: missing .*blocks.1"):
        resume(run, quiet(), steps=70)


def test_a_complete_run_without_checkpoints_is_not_trained_again(run):
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(ValueError, match="is complete, and its checkpoints are gone"):
        resume(run, quiet())


def test_a_complete_run_says_how_to_train_it_longer(run):
    with pytest.raises(ValueError, match=r"complete at step 60 of 60; --steps N"):
        resume(run, quiet())
    with pytest.raises(ValueError, match=r"at step 60, beyond the 20 .* with N above 60"):
        resume(run, quiet(), steps=20)


def test_a_restart_after_the_end_has_nothing_to_do(tmp_path, monkeypatch):
    config, run = dataclasses.replace(TINY, steps=4), tmp_path / "run"
    start(config, run, quiet())
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="exists already"):
        start(config, run, quiet())
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")  # torchrun started this process again
    start(config, run, quiet())
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


def bad_samples(run: Path) -> list[int]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record["bad_samples"] for record in records if "loss" in record]


@pytest.mark.parametrize(
    "options", [{"resident": "on"}, {"resident": "off"}, {"workers": 1}], ids=str
)
def test_damaged_samples_are_replaced_counted_and_survive_a_resumption(tmp_path, options):
    shards = tmp_path / "shards"
    write_digits(shards)
    path = shards / "digits-000002.tar"
    index, _ = load_index(index_path(path))
    tar = bytearray(path.read_bytes())
    for offset in index.offset[:200, index.extensions.index("npy")].tolist():
        tar[offset + 150] ^= 1
    path.write_bytes(tar)
    data = dataclasses.replace(TINY.data, source=str(shards), **options)
    config = dataclasses.replace(TINY, steps=40, data=data)
    start(config, tmp_path / "whole", quiet())
    start(dataclasses.replace(config, steps=20), tmp_path / "halves", quiet())
    resume(tmp_path / "halves", quiet(), steps=40)
    counts = bad_samples(tmp_path / "whole")
    assert counts == sorted(counts) and counts[-1] > 10
    assert bad_samples(tmp_path / "halves")[-1] == counts[-1]
    assert losses(tmp_path / "halves")[-1] == losses(tmp_path / "whole")[-1]

    stopping = dataclasses.replace(data, on_bad_sample="stop")
    with pytest.raises(ValueError, match=r"digits-000002\.tar: sample '\d+': CRC-32 mismatch"):
        start(dataclasses.replace(config, data=stopping), tmp_path / "stopped", quiet())


def test_data_that_changed_under_a_run_is_refused(tmp_path):
    shards, run = tmp_path / "shards", tmp_path / "run"
    write_digits(shards)
    data = dataclasses.replace(TINY.data, source=str(shards))
    start(dataclasses.replace(TINY, steps=5, data=data), run, quiet())
    sorted(shards.glob("*.tar"))[-1].unlink()
    with pytest.raises(ValueError, match=r"lacks \['digits-000005.tar'\]"):
        resume(run, quiet(), steps=10)
    index_folder(shards)
    with pytest.raises(ValueError, match="holds other data than when"):
        resume(run, quiet(), steps=10)


def poison(trainer: Trainer, steps: range) -> None:
    """Make the loss of some steps NaN, by NaN pixels."""
    step = trainer.engine.step

    def poisoned(batch):
        bad = trainer.engine.steps_done + 1 in steps
        nan = dataclasses.replace(batch, images=batch.images * torch.nan)
        return step(nan if bad else batch)

    trainer.engine.step = poisoned


@pytest.mark.parametrize("method", ["adaptive", "task_curriculum", "ant_uw"])
def test_a_step_that_is_not_finite_is_skipped_and_counted(tmp_path, method):
    run = tmp_path / "run"
    trainer, _ = build_trainer(dataclasses.replace(TINY, method=method), run, quiet())
    run.mkdir()
    poison(trainer, range(25, 27))
    before = {}
    step = trainer.engine.step

    def watched(batch):
        now = trainer.engine.steps_done + 1
        if now in (25, 27):
            tensors = trainer._tensors()
            before[now] = {name: value.clone() for name, value in tensors.items()}
        return step(batch)

    trainer.engine.step = watched
    trainer.train()
    assert all(torch.equal(value, before[27][name]) for name, value in before[25].items())
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [r.get("skipped_steps", 0) for r in records if "loss" in r] == [0] * 3 + [2] * 6
    assert all(math.isfinite(r["loss"]) for r in records if "loss" in r)


def test_many_steps_in_a_row_that_are_not_finite_stop_the_run(tmp_path):
    run = tmp_path / "run"
    trainer, _ = build_trainer(TINY, run, quiet())
    run.mkdir()
    poison(trainer, range(30, 33))
    with pytest.raises(FloatingPointError, match=r"in 3 steps in a row, up to step 32 \(3 in"):
        trainer.train()
    trainer.checkpoints.wait()
    assert [path.name for path in (run / "checkpoints").glob("step-*")] == ["step-00000020"]


@pytest.mark.long
def test_a_compiled_run_trains_like_an_eager_one(tmp_path):
    config = dataclasses.replace(TINY, steps=4, log_every=1)
    for mode in ("on", "off"):
        start(dataclasses.replace(config, compile=mode), tmp_path / mode, quiet())
    for compiled, eager in zip(losses(tmp_path / "on"), losses(tmp_path / "off"), strict=True):
        assert compiled == pytest.approx(eager, rel=1e-3)
