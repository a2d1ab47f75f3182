"""AdamW, clipping and averages in one sweep: the same training as by PyTorch's passes."""

import copy
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from speed_engine.build import build_model, build_objective, build_process
from speed_engine.config import TrainConfig
from speed_engine.data.batch import Batch
from speed_engine.models.config import DiTConfig
from speed_engine.runtime.machine import choose_update
from speed_engine.runtime.world import World
from speed_engine.training.checkpoint import Checkpoints, load, newest
from speed_engine.training.config import OptimizerConfig
from speed_engine.training.ema import Ema
from speed_engine.training.engine import Engine
from speed_engine.training.optimizers import (
    OneSweep,
    adamw,
    demon,
    linear_warmup,
    one_sweep,
    optimizer_tensors,
    set_rates,
)
from speed_engine.training.shadow import ShadowedModel

ROOT = Path(__file__).parents[2]
CONFIG = TrainConfig(method="ant_uw", model=DiTConfig(dim=8, depth=1, num_heads=2))


def engine(make_optimizer, grad_clip: float = 0.05) -> Engine:
    """With weight decay, clipping, falling momentum, warm-ups and a loss that learns."""
    model = build_model(CONFIG)
    objective = build_objective(CONFIG, build_process(CONFIG), model)
    optimizer = make_optimizer(
        model, learning_rate=1e-2, beta1=0.9, beta2=0.99, weight_decay=0.1,
        loss=objective, loss_learning_rate=2e-2,
    )  # fmt: skip
    warmup, momentum = linear_warmup(1e-2, 3), demon(0.9, 10)
    return Engine(
        model,
        objective,
        optimizer,
        Ema(model, 0.9),
        learning_rate=lambda step: warmup(step) * momentum.compensation(step),
        beta1=momentum.beta1,
        grad_clip=grad_clip,
    )


def batch(seed: int = 0, size: int = 4) -> Batch:
    images = torch.rand(size, 1, 8, 8, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return Batch(images, {"labels": torch.arange(size) % 10}, torch.arange(size) + size * seed)


def everything(trained: Engine) -> dict[str, Tensor]:
    """Parameters, averages and optimizer state, by name."""
    groups = {
        "model": trained.model.state_dict(),
        "ema": trained.ema.model.state_dict(),
        "objective": trained.objective.state_dict(),
        "optimizer": optimizer_tensors(trained.model, trained.optimizer),
        "objective_optimizer": optimizer_tensors(trained.objective, trained.optimizer),
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
    ours, theirs = engine(one_sweep, grad_clip), engine(adamw, grad_clip)
    for step in range(6):
        data = batch(step)
        if step == 3:  # both skip it
            data.images[0] = math.nan
        report, expected = ours.step(data), theirs.step(data)
        torch.testing.assert_close(report, expected, equal_nan=True)
        assert float(expected.skipped) == (step == 3)
        assert step == 3 or float(expected.grad_norm) > 0.05  # so that clipping is at work
    assert_same_training(ours, theirs)


@pytest.mark.parametrize("makers", [(adamw, one_sweep), (one_sweep, adamw)])
def test_either_way_continues_the_other_s_run(makers, tmp_path):
    first, second = (engine(make) for make in makers)
    straight = engine(adamw)
    for step in range(4):
        straight.step(batch(step))
    for step in range(2):
        first.step(batch(step))
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(2, everything(first), {})
    checkpoints.wait()
    load(newest(tmp_path), everything(second))
    second.steps_done = 2
    for step in range(2, 4):
        second.step(batch(step))
    assert_same_training(second, straight)


def small(shadowed: bool = False) -> tuple[nn.Module, OneSweep, ShadowedModel | None]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.GELU(), nn.Linear(5, 2))
    shadow = ShadowedModel(model) if shadowed else None
    optimizer = one_sweep(
        model, learning_rate=0.1, beta1=0.9, beta2=0.99, weight_decay=0.1,
        shadows=shadow and shadow.shadows,
    )  # fmt: skip
    return model, optimizer, shadow


def sweeps(model, optimizer, averages, scales, forward=None, max_norm=1.0, autocast=False):
    """One sweep per factor of the loss."""
    for scale in scales:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            answer = (forward or model)(torch.ones(2, 3))
        answer.float().square().sum().mul(scale).backward()
        norm_and_finite = optimizer.sweep([averages], [0.9], max_norm)
        optimizer.zero_grad()
    return norm_and_finite


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(bad):
    (model, optimizer, _), (other, clean, _) = small(), small()
    averages = [[p.detach().clone() for p in m.parameters()] for m in (model, other)]
    norm, finite = sweeps(model, optimizer, averages[0], [1, 2, bad])
    sweeps(other, clean, averages[1], [1, 2])
    assert not bool(norm.isfinite()) and not bool(finite)
    assert float(optimizer_tensors(model, optimizer)["0.weight/step"]) == 2
    sweeps(model, optimizer, averages[0], [3])
    sweeps(other, clean, averages[1], [3])
    ours = [*model.parameters(), *averages[0], *optimizer_tensors(model, optimizer).values()]
    expected = [*other.parameters(), *averages[1], *optimizer_tensors(other, clean).values()]
    assert all(torch.equal(*pair) for pair in zip(ours, expected, strict=True))


def test_several_averages_each_have_a_horizon():
    model, optimizer, _ = small()
    start = [p.detach().clone() for p in model.parameters()]
    short, long = copy.deepcopy(start), copy.deepcopy(start)
    model(torch.ones(2, 3)).square().sum().backward()
    optimizer.sweep([short, long], [0.5, 0.75], math.inf)
    for p, before, s, l in zip(model.parameters(), start, short, long, strict=True):
        torch.testing.assert_close(s, (before + p) / 2)
        torch.testing.assert_close(l, 0.75 * before + 0.25 * p)


def test_shadows_give_the_bits_of_autocast():
    (model, optimizer, _), (other, shadowing, shadow) = small(), small(shadowed=True)
    assert shadow is not None and set(shadow.copies) == {"0.weight", "0.bias", "3.weight", "3.bias"}
    averages = [[p.detach().clone() for p in m.parameters()] for m in (model, other)]
    # without clipping: the sums in the norm are taken in another order
    options: dict[str, Any] = dict(scales=[1, 2, 3], max_norm=math.inf, autocast=True)
    sweeps(model, optimizer, averages[0], **options)
    sweeps(other, shadowing, averages[1], forward=shadow, **options)
    expected = [*model.parameters(), *averages[0]]
    for ours, theirs in zip([*other.parameters(), *averages[1]], expected, strict=True):
        assert torch.equal(ours, theirs)
    for parameter, copied in shadow.shadows.items():
        assert torch.equal(copied, parameter.to(torch.bfloat16))


def test_a_loaded_model_can_have_new_shadows():
    model, optimizer, shadow = small(shadowed=True)
    assert shadow is not None
    model.load_state_dict({name: value + 1 for name, value in model.state_dict().items()})
    optimizer.renew_shadows()
    assert torch.equal(shadow.copies["0.weight"], model.get_parameter("0.weight").bfloat16())


def test_a_shadowed_model_compiles_whole():
    model, _, shadow = small(shadowed=True)
    compiled: Any = torch.compile(cast(Any, shadow), fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(compiled(torch.ones(2, 3)), model(torch.ones(2, 3)))


def test_pytorch_s_own_state_dict_travels_too():
    (model, optimizer, _), (other, fresh, _) = small(), small()
    averages = [p.detach().clone() for p in model.parameters()]
    sweeps(model, optimizer, averages, [1, 2])
    other.load_state_dict(model.state_dict())
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    others = copy.deepcopy(averages)
    sweeps(model, optimizer, averages, [3])
    sweeps(other, fresh, others, [3])
    assert all(torch.equal(*pair) for pair in zip(averages, others, strict=True))
    assert float(optimizer_tensors(other, fresh)["0.weight/step"]) == 3


def test_groups_keep_their_rates_and_a_plain_step_is_a_sweep():
    model, loss = nn.Linear(2, 2), nn.Linear(1, 1)
    optimizer = one_sweep(
        model, learning_rate=0.1, beta1=0.9, beta2=0.99, weight_decay=0.1,
        loss=loss, loss_learning_rate=0.025,
    )  # fmt: skip
    set_rates(optimizer, 0.01, 0.5)
    before = loss.weight.detach().clone()
    (model(torch.ones(1, 2)).sum() + loss(torch.ones(1, 1)).sum()).backward()
    optimizer.step()
    torch.testing.assert_close(loss.weight.detach(), before - 0.0025)  # Adam's first step
    assert loss.weight.grad is not None
    loss.weight.grad.fill_(math.nan)  # one decision for all groups
    tensors = [t.clone() for m in (model, loss) for t in optimizer_tensors(m, optimizer).values()]
    optimizer.step()
    after = [t for m in (model, loss) for t in optimizer_tensors(m, optimizer).values()]
    assert all(torch.equal(*pair) for pair in zip(tensors, after, strict=True))


def test_what_cannot_be_swept_is_named():
    model, optimizer, _ = small()
    with pytest.raises(ValueError, match=r"shape \(5, 3\) has no gradient; one sweep updates all"):
        optimizer.sweep([], [], 1.0)
    with pytest.raises(ValueError, match=r"must be float32; one of shape \(5, 3\) is torch.bfl"):
        one_sweep(
            model.to(torch.bfloat16), learning_rate=0.1, beta1=0.9, beta2=0.99, weight_decay=0.0
        )


def test_the_choice_says_what_runs_and_why():
    assert choose_update("auto", "cuda").value == "separate"
    assert "no GPU has measured it" in choose_update("auto", "cuda").reason
    assert choose_update("separate", "cpu") == ("separate", "asked for")
    assert choose_update("one_sweep", "cpu").reason.endswith("since the kernel needs CUDA")
    assert choose_update("one_sweep_bf16", "cuda").value == "one_sweep_bf16"
    with pytest.raises(ValueError, match="one_sweep_bf16 needs CUDA"):
        choose_update("one_sweep_bf16", "cpu")
    with pytest.raises(ValueError, match="for one process.*here on 2 processes"):
        choose_update("one_sweep_bf16", "cuda", World(size=2))
    with pytest.raises(ValueError, match="microbatch_size=2: gradients of microbatches would be"):
        TrainConfig(microbatch_size=2, optimizer=OptimizerConfig(update="one_sweep_bf16"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs the kernel in the interpreter")
def test_two_processes_update_their_shards_as_one_process_updates_all(tmp_path):
    script = Path(__file__).with_name("sharded_update.py")
    paths = os.pathsep.join(str(ROOT / folder) for folder in (".", "kernels"))
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(tmp_path / "store")],
            env=os.environ | {"PYTHONPATH": paths, "TRITON_INTERPRET": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=120) for process in processes]
    assert all(process.returncode == 0 for process in processes), outputs
    difference, updates = outputs[0][0].split()
    assert float(difference) <= 1e-6 and int(updates) == 3
