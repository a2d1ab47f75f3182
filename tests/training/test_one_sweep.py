"""AdamW, clipping and averages in one sweep: the same training as by PyTorch's passes."""

import math

import pytest
import states
import torch
from torch import Tensor, nn

from speed_engine.build import build_model, build_objective, build_process
from speed_engine.config import TrainConfig, from_json, to_json
from speed_engine.data.batch import Batch
from speed_engine.models.config import DiTConfig
from speed_engine.runtime.checks import UserError
from speed_engine.runtime.kernels import choose_kernels
from speed_engine.runtime.machine import choose_update
from speed_engine.training.checkpoint import Checkpoints, load, newest
from speed_engine.training.config import OptimizerConfig
from speed_engine.training.ema import Ema, power, warming_up
from speed_engine.training.engine import Engine
from speed_engine.training.one_sweep import OneSweep
from speed_engine.training.optimizers import Hyperparameters, adamw
from speed_engine.training.schedules import demon, linear_warmup
from speed_engine.training.update import Update

CONFIG = TrainConfig(method="ant_uw", model=DiTConfig(dim=8, depth=1, num_heads=2))
HYPER = Hyperparameters(
    learning_rate=1e-2, beta1=0.9, beta2=0.99, weight_decay=0.1, loss_learning_rate=2e-2
)


def engine(kind: type[Update], grad_clip: float = 0.05) -> Engine:
    """With weight decay, clipping, falling momentum, warm-ups, two averages, a loss that learns."""
    model = build_model(CONFIG)
    objective = build_objective(CONFIG, build_process(CONFIG), model)
    warmup, momentum = linear_warmup(1e-2, 3), demon(0.9, 10)
    update = kind(
        model,
        objective,
        adamw(model, objective, HYPER),
        {"ema": Ema(model, warming_up(0.9)), "power=7": Ema(model, power(7))},
        learning_rate=lambda step: warmup(step) * momentum.compensation(step),
        beta1=momentum.beta1,
        grad_clip=grad_clip,
    )
    return Engine(model, objective, update)


def batch(seed: int = 0, size: int = 4) -> Batch:
    images = torch.rand(size, 1, 8, 8, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return Batch(images, {"labels": torch.arange(size) % 10}, torch.arange(size) + size * seed)


def everything(trained: Engine) -> dict[str, Tensor]:
    """Parameters, averages and optimizer state, by name."""
    groups = {
        "model": trained.model.state_dict(),
        "objective": trained.objective.state_dict(),
        **trained.update.tensors(),
    }
    return {
        f"{g}/{name}": value for g, tensors in groups.items() for name, value in tensors.items()
    }


def assert_same_training(ours: Engine, theirs: Engine) -> None:
    actual, expected = everything(ours), everything(theirs)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype and actual[name].shape == value.shape, name
        torch.testing.assert_close(actual[name], value, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("grad_clip", [0.05, math.inf])
def test_both_ways_train_alike(grad_clip):
    ours, theirs = engine(OneSweep, grad_clip), engine(Update, grad_clip)
    for step in range(6):
        data = batch(step)
        if step == 3:  # both skip it
            data.images[0] = math.nan
        report, expected = ours.step(data), theirs.step(data)
        torch.testing.assert_close(report, expected, equal_nan=True)
        assert float(expected.skipped) == (step == 3)
        assert step == 3 or float(expected.grad_norm) > 0.05  # so that clipping is at work
    assert_same_training(ours, theirs)


@pytest.mark.parametrize("kinds", [(Update, OneSweep), (OneSweep, Update)])
def test_either_way_continues_the_other_s_run(kinds, tmp_path):
    first, second = (engine(kind) for kind in kinds)
    straight = engine(Update)
    for step in range(4):
        straight.step(batch(step))
    for step in range(2):
        first.step(batch(step))
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(everything(first), states.at(2))
    checkpoints.wait()
    load(newest(tmp_path), everything(second))
    second.steps_done = 2
    for step in range(2, 4):
        second.step(batch(step))
    assert_same_training(second, straight)


def test_what_cannot_be_swept_is_named():
    def swept(model: nn.Module, optimizers: list | None = None) -> OneSweep:
        hyper, nothing = Hyperparameters(learning_rate=0.1), nn.Module()
        optimizers = optimizers or adamw(model, nothing, hyper)
        rate = linear_warmup(0.1, 0)
        return OneSweep(model, nothing, optimizers, {}, learning_rate=rate, grad_clip=1.0)

    model = nn.Linear(3, 5)
    with pytest.raises(UserError, match=r"shape \(5, 3\) has no gradient.*one_sweep updates all"):
        swept(model).step(1)
    with pytest.raises(UserError, match="one_sweep is AdamW; SGD needs optimizer.update=separate"):
        swept(model, [torch.optim.SGD(model.parameters())])
    with pytest.raises(UserError, match=r"float32 parameters; one of shape \(5, 3\) is torch.bfl"):
        swept(model.to(torch.bfloat16))


def test_the_choice_says_what_runs_and_why():
    kernel = choose_kernels("auto", "cpu")["update"]
    assert choose_update("auto", kernel).value == "separate"
    assert "1 % faster on an H200" in choose_update("auto", kernel).reason
    assert choose_update("separate", kernel) == ("separate", "asked for")
    assert choose_update("one_sweep", kernel).reason.endswith("the kernels need CUDA")


def test_a_run_of_bfloat16_weights_is_told_how_it_continues():
    text = to_json(TrainConfig(optimizer=OptimizerConfig(update="one_sweep")))
    with pytest.raises(UserError, match=r"one_sweep_bf16: choose from auto, .*continues with"):
        from_json(text.replace('"one_sweep"', '"one_sweep_bf16"'))
