"""The validation loss is the mean error of the process's own target, whatever a model predicts."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from speed_engine.build import build_evaluator, build_process, build_validation
from speed_engine.config import TrainConfig
from speed_engine.data.batch import Batch
from speed_engine.data.config import DataConfig
from speed_engine.data.format.held_out import is_held_out
from speed_engine.data.loading.decoding import read_all
from speed_engine.data.opening import open_data
from speed_engine.diffusion.prediction import linear_form, solve
from speed_engine.evaluation.config import EvaluationConfig
from speed_engine.evaluation.validation import LEVELS, Validation
from speed_engine.models.config import DiTConfig


class Grey(nn.Module):
    """Estimates the clean image as zeros, and answers what it is asked: ``prediction``."""

    def __init__(self, config: TrainConfig) -> None:
        super().__init__()
        self.process = build_process(config)
        self.calls = 0

    def forward(self, x: torch.Tensor, t: torch.Tensor, **conditions: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        schedule = self.process.schedule
        cells = schedule.timesteps
        nearest = (schedule.model_time(cells) - float(t[0])).abs().argmin()
        rows = linear_form(schedule, self.process.prediction, cells[nearest])
        return (rows.b_e / rows.a_e * x).float()  # with no clean image, all of the input is noise


def config_of(schedule: str = "flow", prediction: str | None = None, **data) -> TrainConfig:
    return TrainConfig(
        method="uniform", schedule=schedule, prediction=prediction, device="cpu",
        data=DataConfig(**{"held_out": 0.3, **data}),
    )  # fmt: skip


def loss(config: TrainConfig) -> float:
    return build_validation(config, build_process(config), images=40)(Grey(config))


@pytest.mark.parametrize(
    "schedule, predictions",
    [("flow", ("velocity", "x0", "epsilon")), ("linear", ("epsilon", "x0", "v")), ("edm", ("F",))],
)
def test_what_a_model_predicts_does_not_change_the_loss(schedule, predictions):
    losses = [loss(config_of(schedule, prediction)) for prediction in predictions]
    assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-4)


def test_a_grey_estimate_costs_an_image_s_mean_square_over_the_time_squared():
    images = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    config = config_of("flow")
    batch = Batch(images, {}, torch.arange(6))
    found = Validation(build_process(config), batch, seed=0)(Grey(config))
    # noise - 0 instead of noise - x0, where the noise is estimated as x_in / t
    times = [(i + 0.5) / LEVELS for i in range(LEVELS)]
    expected = sum(float(images.square().mean()) / t**2 for t in times) / LEVELS
    assert found == pytest.approx(expected, rel=0.02)  # times are centres of cells


def test_it_is_of_held_out_images_where_there_are_some_and_never_mirrored():
    config = config_of()
    reader = open_data(config.data, part=None)
    held_out = [is_held_out(reader.key(n), 0.3) for n in range(len(reader))]
    pixels = read_all(reader, config.data.image_shape)[0][held_out]
    found = build_validation(config, build_process(config), images=len(reader)).batch.images
    assert torch.equal(((found + 1) * 127.5).round().byte(), torch.from_numpy(pixels))
    assert loss(config) == loss(config_of(flip=True))


def test_processes_share_the_images_out_and_agree(monkeypatch):
    config = config_of()
    process, images = build_process(config), torch.randn(7, 1, 8, 8)
    batch = Batch(images, {}, torch.arange(7))
    alone = Validation(process, batch, seed=3)

    class World:
        size = 2

        def __init__(self, rank: int) -> None:
            self.rank, self.sent = rank, None

        def gather_on_host(self, tensor: torch.Tensor) -> torch.Tensor:
            self.sent = tensor
            return tensor

    worlds = [World(0), World(1)]
    parts = [Validation(process, batch, seed=3, world=world) for world in worlds]  # pyright: ignore[reportArgumentType]
    models = [Grey(config) for _ in parts]
    for part, model in zip(parts, models, strict=True):
        part(model)
    assert models[0].calls == models[1].calls  # sharded models compute together
    both = torch.cat([world.sent for world in worlds])  # pyright: ignore[reportArgumentType,reportCallIssue]
    together = both[:, :-1].sum(0) / both[:, -1].sum()
    times = process.schedule.timesteps[
        ((torch.arange(LEVELS) + 0.5) / LEVELS * process.schedule.num_timesteps).long()
    ]
    torch.testing.assert_close(together, alone.errors(Grey(config), times, "velocity"))


def test_a_run_without_features_records_it(tmp_path: Path):
    from rich.console import Console

    from speed_engine.run import starting
    from speed_engine.run.averages import load_average

    config = TrainConfig(
        steps=2, batch_size=4, model=DiTConfig(dim=16, depth=1, num_heads=2), device="cpu",
        evaluation=EvaluationConfig(every=1, num_images=4, solver_steps=2, features="none"),
    )  # fmt: skip
    starting.start(config, tmp_path / "run", Console(quiet=True))
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    found = [r["validation_loss"] for r in map(json.loads, lines) if "validation_loss" in r]
    assert len(found) == 2 and found[0] != found[1]
    evaluator = build_evaluator(config, build_process(config))
    model, _ = load_average(tmp_path / "run", config, torch.device("cpu"))
    assert evaluator.validate(model) == pytest.approx(found[1], rel=1e-5)


def test_the_answer_is_solved_as_in_generation():
    """The conversion of errors is that of estimates."""
    config = config_of("flow", "epsilon")
    process = build_process(config)
    t = float(process.schedule.timesteps[300])
    rows, x, noise = process.table.rows_at(t), torch.randn(2, 1, 4, 4), torch.randn(2, 1, 4, 4)
    x_in = (rows.a_x * x + rows.a_e * noise).float()

    class Wrong(nn.Module):
        def forward(self, x_in, t, **conditions):
            return noise + 0.1

    clean = solve(rows, x_in, noise + 0.1)[0]
    validation = Validation(process, Batch(x, {}, torch.arange(2)), seed=0)
    validation._noise = noise
    found = validation.errors(Wrong(), [t], "x0")
    assert float(found) == pytest.approx(float((clean - x).square().mean()), rel=1e-4)
