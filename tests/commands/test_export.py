"""Weights leave a run and start another, through the command line."""

# pyright: reportPrivateImportUsage=false

from dataclasses import replace
from typing import Any

import pytest
import safetensors.torch
import states
import torch
from diffusers import DDIMScheduler, DiTPipeline
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from safetensors.torch import load_file

from speed_engine import build, cli
from speed_engine.config import TrainConfig, to_json
from speed_engine.diffusion.discrete import from_diffusers
from speed_engine.evaluation.config import EvaluationConfig
from speed_engine.models.config import DiTConfig
from speed_engine.models.layouts.dit import set_frequency_shift
from speed_engine.run.averages import load_average
from speed_engine.run.folder import read_config
from speed_engine.training import checkpoint
from speed_engine.training.checkpoint import Checkpoints

CONFIG = TrainConfig(model=DiTConfig(dim=16, depth=2, num_heads=2))
OPTIONS = (
    "--steps 2 --batch-size 8 --model.dim 16 --model.depth 2 --model.num-heads 2 "
    "--evaluation.num-images 100 --evaluation.solver-steps 2"
).split()


@pytest.fixture
def run(tmp_path):
    """A folder as training leaves it, its average random."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_text(to_json(CONFIG))
    torch.manual_seed(0)
    model = build.build_model(CONFIG)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    checkpoints = Checkpoints(folder / "checkpoints")
    tensors = {f"ema/{name}": value for name, value in model.state_dict().items()}
    tensors |= {f"ema:power=1/{name}": -value for name, value in model.state_dict().items()}
    checkpoints.save(tensors, states.at(7))
    checkpoints.wait()
    return folder


def export(run, out):
    cli.main(["export", str(run), "--layout", "diffusers", "--out", str(out)])


def answers(run, config, transformer) -> tuple[torch.Tensor, torch.Tensor]:
    ours, _ = load_average(run, config, torch.device("cpu"))
    inputs = torch.randn(2, 1, 8, 8), torch.tensor([3, 871]), torch.tensor([0, 10])
    return transformer(*inputs).sample, ours(*inputs)


def test_an_exported_model_is_loaded_by_diffusers_alone_and_answers_the_same(run, tmp_path, caplog):
    config = replace(CONFIG, model=replace(CONFIG.model, frequency_shift=1))
    (run / "config.json").write_text(to_json(config))
    export(run, tmp_path / "out")
    assert "frequency shift" not in caplog.text
    pipeline: Any = DiTPipeline.from_pretrained(tmp_path / "out", vae=None)
    assert isinstance(pipeline.transformer, DiTTransformer2DModel)
    assert isinstance(pipeline.scheduler, DDIMScheduler)
    theirs, ours = answers(run, config, pipeline.transformer)
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-4)


def test_an_earlier_checkpoint_is_exported_by_its_step(run, tmp_path, capsys):
    known = build.build_model(CONFIG).state_dict()
    checkpoints = Checkpoints(run / "checkpoints")
    zeros = {f"ema/{name}": torch.zeros_like(value) for name, value in known.items()}
    checkpoints.save(zeros, states.at(9))
    checkpoints.wait()
    for step in (7, 9):
        out = str(tmp_path / f"{step}.safetensors")
        cli.main(["export", str(run), "--checkpoint", str(step), "--out", out])
        assert f"step {step}: " in capsys.readouterr().out
    early, late = (load_file(tmp_path / f"{step}.safetensors") for step in (7, 9))
    assert all(of.any() for of in early.values()) and not any(of.any() for of in late.values())
    with pytest.raises(SystemExit):
        cli.main(["export", str(run), "--checkpoint", "8", "--out", str(tmp_path / "8")])
    assert "no checkpoint of step 8; it keeps those of: 7, 9" in capsys.readouterr().err


def test_a_model_whose_time_features_diffusers_lacks_is_exported_with_a_warning(
    run, tmp_path, caplog
):
    export(run, tmp_path / "out")
    assert "set_frequency_shift(transformer, 0)" in caplog.text
    loaded: Any = DiTTransformer2DModel.from_pretrained(tmp_path / "out", subfolder="transformer")
    theirs, ours = answers(run, CONFIG, loaded)
    assert (theirs - ours).abs().max() > 0.01
    set_frequency_shift(loaded, 0)
    torch.testing.assert_close(*answers(run, CONFIG, loaded), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    "schedule, prediction, num_timesteps",
    [
        *(("linear", target, 1000) for target in ("epsilon", "x0", "v")),
        *((name, None, 1000) for name in ("linear", "quadratic", "scaled_linear", "cosine")),
        ("scaled_linear", None, 200),
        ("flow", None, 1000),
        ("shifted_flow", None, 1000),
    ],
)
def test_the_exported_scheduler_shows_the_model_what_it_was_trained_on(
    run, tmp_path, schedule, prediction, num_timesteps
):
    config = replace(
        CONFIG, schedule=schedule, prediction=prediction, num_timesteps=num_timesteps,
        method="uniform",
    )  # fmt: skip
    (run / "config.json").write_text(to_json(config))
    export(run, tmp_path / "out")
    scheduler = DiTPipeline.from_pretrained(tmp_path / "out", vae=None).scheduler
    ours, theirs = build.build_process(config).schedule, from_diffusers(scheduler)
    assert theirs.prediction == (prediction or ours.prediction)
    t = torch.arange(0, theirs.num_timesteps, 37)
    times, alpha, sigma = theirs.model_time(t), theirs.alpha(t), theirs.sigma(t)
    if "flow" in schedule:  # at these levels of noise ours is given the same time
        assert torch.allclose(times, 1000 * sigma.float(), atol=1e-3)
        grid = torch.linspace(0.001, 0.999, 99, dtype=torch.float64)
        given = ours.model_time(grid)
        assert torch.allclose(given, 1000 * ours.sigma(grid), atol=1e-3)
        even = torch.arange(1, 1001) / 1000
        shift = scheduler.config.shift
        expected = shift * even / (1 + (shift - 1) * even)
        assert torch.allclose(theirs.sigma(torch.arange(1000)).float(), expected, atol=1e-4)
        return
    assert theirs.num_timesteps == ours.num_timesteps
    torch.testing.assert_close(alpha, ours.alpha(t), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sigma, ours.sigma(t), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(times, ours.model_time(t))


@pytest.mark.parametrize("changes", [{"schedule": "edm"}, {"schedule": "flow", "prediction": "v"}])
def test_a_process_that_diffusers_lacks_is_refused_before_anything_is_written(
    run, tmp_path, capsys, changes
):
    (run / "config.json").write_text(to_json(replace(CONFIG, method="uniform", **changes)))
    with pytest.raises(SystemExit):
        export(run, tmp_path / "out")
    said = " ".join(capsys.readouterr().err.split())
    assert f"diffusers has no scheduler for the process {changes['schedule']}" in said
    assert "--layout original" in said and not (tmp_path / "out").exists()


def test_another_average_is_exported_by_its_name(run, tmp_path):
    for average in ("ema", "power=1"):
        out = str(tmp_path / average)
        cli.main(["export", str(run), "--average", average, "--out", f"{out}.safetensors"])
    first, second = (load_file(tmp_path / f"{name}.safetensors") for name in ("ema", "power=1"))
    assert any(tensor.any() for tensor in first.values())
    assert all(torch.equal(second[name], -tensor) for name, tensor in first.items())


@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_training_starts_from_what_was_exported(run, tmp_path, layout, capsys):
    shift = ["--model.frequency-shift", "1"] if layout == "diffusers" else []
    if shift:
        shifted = replace(CONFIG, model=replace(CONFIG.model, frequency_shift=1))
        (run / "config.json").write_text(to_json(shifted))
    out, tuned = tmp_path / "out.safetensors", tmp_path / "tuned"
    cli.main(["export", str(run), "--layout", layout, "--out", str(out)])
    start = ["train", "digits", "--init-from", str(out), "--run", str(tuned), *OPTIONS, *shift]
    cli.main([*start, "--optimizer.learning-rate", "1e-12"])
    newest = checkpoint.newest(tuned / "checkpoints")
    wanted = checkpoint.load_group(checkpoint.newest(run / "checkpoints"), "ema")
    assert checkpoint.read_state(newest).step == 2
    for part in ("model", "ema"):
        tuned_weights = checkpoint.load_group(newest, part)
        torch.testing.assert_close(tuned_weights, wanted, rtol=0, atol=1e-6)
    assert read_config(tuned).init_from == out


def test_weights_that_do_not_fit_are_named_before_anything_is_written(run, tmp_path, capsys):
    cli.main(["export", str(run), "--out", str(tmp_path / "out.safetensors")])
    options = ["--init-from", str(tmp_path / "out.safetensors"), "--run", str(tmp_path / "new")]
    with pytest.raises(SystemExit) as stopped:
        cli.main(["train", "digits", *options, *OPTIONS, "--model.depth", "3"])
    assert stopped.value.code == 2
    message = " ".join(capsys.readouterr().err.split())
    assert "missing ['blocks.2.adaLN_modulation.1.bias'" in message
    assert not (tmp_path / "new").exists()


def test_evaluation_runs_where_the_training_attention_is_missing(run):
    """xFormers trained it, perhaps on another machine; here PyTorch computes."""
    elsewhere = replace(CONFIG, attention="xformers")
    model, _ = load_average(run, elsewhere, torch.device("cpu"))
    answer = model(torch.randn(1, 1, 8, 8), torch.tensor([3]), torch.tensor([0]))
    assert bool(answer.isfinite().all())


def test_the_evaluation_of_an_exported_run_needs_no_init_file(run):
    moved = replace(CONFIG, init_from=run / "gone", evaluation=EvaluationConfig())
    (run / "config.json").write_text(to_json(moved))
    assert load_average(run, read_config(run), torch.device("cpu"))[1] == 7


@pytest.mark.parametrize("layout, name", [("original", "x.safetensors"), ("diffusers", "pipeline")])
def test_a_full_disk_is_one_error_and_the_same_command_writes_the_file(
    run, tmp_path, capsys, monkeypatch, layout, name
):
    out, save_file = tmp_path / name, safetensors.torch.save_file

    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        text = "Error while serializing: I/O error: No space left on device (os error 28)"
        raise safetensors.SafetensorError(text)

    command = ["export", str(run), "--layout", layout, "--out", str(out)]
    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(SystemExit) as stopped:
        cli.main(command)
    said = " ".join(capsys.readouterr().err.split())
    assert stopped.value.code == 2 and f"No space left on device: '{out}'. Make room" in said
    assert sorted(tmp_path.iterdir()) == before
    monkeypatch.setattr(safetensors.torch, "save_file", save_file)
    cli.main(command)
    assert out.exists()


def test_weights_that_are_not_finite_are_named(tmp_path, caplog):
    state = build.build_model(CONFIG).state_dict()
    state["blocks.1.mlp.fc1.bias"][3] = torch.inf
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save({f"ema/{name}": value for name, value in state.items()}, states.at(7))
    checkpoints.wait()
    load_average(tmp_path, CONFIG, torch.device("cpu"))
    (said,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert f"step-00000007: 1 of the {len(state)} tensors of the EMA ema" in said
    assert "such as blocks.1.mlp.fc1.bias, hold numbers that are not finite" in said
