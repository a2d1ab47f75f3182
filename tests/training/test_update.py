"""For every optimizer a step that is not finite changes nothing, and a resumed run is exact."""

import copy
import io
import itertools
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from other_optimizers import OTHERS, sgd
from rich.console import Console
from torch import Tensor, nn

from speed_engine import cli
from speed_engine.config import TrainConfig
from speed_engine.evaluation.config import EvaluationConfig
from speed_engine.models.config import DiTConfig
from speed_engine.run import starting
from speed_engine.run.averages import load_average
from speed_engine.run.folder import read_config
from speed_engine.runtime.checks import UserError
from speed_engine.training import checkpoint
from speed_engine.training.config import OptimizerConfig
from speed_engine.training.ema import Ema, power, warming_up
from speed_engine.training.muon import Muon
from speed_engine.training.one_sweep import OneSweep
from speed_engine.training.optimizers import OPTIMIZERS, Hyperparameters, adamw, muon
from speed_engine.training.update import Update

HYPER = Hyperparameters(learning_rate=0.05, beta2=0.99, weight_decay=0.1)
WAYS = {"one_sweep": (OneSweep, adamw)} | {
    name: (Update, make) for name, make in {**OPTIMIZERS, **OTHERS}.items()
}


class Net(nn.Module):
    """With blocks, whose matrices Muon trains; a frozen parameter is left alone."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(4, 6), nn.Linear(6, 3)])
        self.head = nn.Linear(3, 2)
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x).tanh()
        return self.head(x) * self.frozen


def make_update(way: str, grad_clip: float = 1.0) -> Update:
    """Of a net and a loss with one parameter, with two averages."""
    torch.manual_seed(0)
    model, loss = Net(), nn.Linear(1, 1)
    kind, make_optimizers = WAYS[way]
    return kind(
        model,
        loss,
        make_optimizers(model, loss, HYPER),
        {"ema": Ema(model, warming_up(0.9)), "power=7": Ema(model, power(7))},
        learning_rate=lambda step: HYPER.learning_rate / step,
        beta1=lambda step: 0.9 - 0.01 * step,
        grad_clip=grad_clip,
    )


def tensors(update: Update) -> dict[str, Tensor]:
    """All that the update may change, and the frozen parameter."""
    groups = {"model": update.model.state_dict(), "loss": update.loss.state_dict()}
    groups |= update.tensors()
    return {f"{g}/{name}": t for g, group in groups.items() for name, t in group.items()}


def backward(update: Update, seed: int) -> None:
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(seed))
    (update.model(x).square().sum() + update.loss(x[:, :1]).square().mean()).backward()


def steps(update: Update, numbers: range) -> None:
    for step in numbers:
        backward(update, step)
        _, finite = update.step(step)
        assert bool(finite)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["model", "loss"])
@pytest.mark.parametrize("grad_clip", [1.0, math.inf])
@pytest.mark.parametrize("first", [1, 4])
@pytest.mark.parametrize("way", WAYS)
def test_a_step_that_is_not_finite_changes_nothing(way, first, grad_clip, where, bad):
    update = make_update(way, grad_clip)
    steps(update, range(1, first))
    before = copy.deepcopy(tensors(update))
    backward(update, first)
    poisoned = update.loss.bias if where == "loss" else update.model.get_parameter("head.bias")
    assert isinstance(poisoned, Tensor) and poisoned.grad is not None
    poisoned.grad[-1] = bad
    norm, finite = update.step(first)
    assert not bool(finite) and bool(norm.isfinite()) == (where == "loss")
    assert all(p.grad is None for p in update.model.parameters())
    after = tensors(update)
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name].view(-1), tensor.view(-1)), name


@pytest.mark.parametrize("way", WAYS)
def test_training_goes_on_as_if_the_skipped_step_had_not_been(way):
    skipping, straight = make_update(way), make_update(way)
    for update in (skipping, straight):
        steps(update, range(1, 3))
    backward(skipping, 3)
    gradient = skipping.model.get_parameter("blocks.0.weight").grad
    assert gradient is not None
    gradient.fill_(math.nan)
    skipping.step(3)
    for update in (skipping, straight):
        steps(update, range(4, 6))
    expected = tensors(straight)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors(skipping).items())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("stop", [0, 3])
def test_state_loaded_by_name_continues_exactly(way, stop):
    straight, resumed = make_update(way), make_update(way)
    steps(straight, range(1, stop + 1))
    with torch.no_grad():
        for parameter in resumed.model.parameters():  # all of it must be loaded
            parameter.add_(1)
    saved = copy.deepcopy(tensors(straight))
    for name, tensor in tensors(resumed).items():
        tensor.detach().copy_(saved[name])
    for update in (straight, resumed):
        steps(update, range(stop + 1, stop + 4))
    expected = tensors(straight)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors(resumed).items())


@pytest.mark.parametrize("way", WAYS)
def test_rates_and_momentum_are_those_of_the_step(way):
    update = make_update(way)
    steps(update, range(1, 4))
    for group in (g for optimizer in update.optimizers for g in optimizer.param_groups):
        assert group["lr"] == pytest.approx(0.05 / 3)
        if "muon_momentum" in group:
            assert group["muon_momentum"] == 0.95  # beta1 is AdamW's
            continue
        momentum = group["betas"][0] if "betas" in group else group["momentum"]
        assert momentum == pytest.approx(0.87)


@pytest.mark.parametrize("make_optimizers", OTHERS.values(), ids=OTHERS)
def test_another_optimizer_updates_as_pytorch_s_own_steps_do(make_optimizers):
    update = make_update("adamw", grad_clip=math.inf)
    model, loss = update.model, update.loss
    others = copy.deepcopy((model, loss))
    update.optimizers = make_optimizers(model, loss, HYPER)
    update.beta1 = None
    alone = make_optimizers(*others, HYPER)
    for optimizer in alone:
        optimizer.state.clear()  # as PyTorch makes it
    for step in range(1, 5):
        backward(update, step)
        for ours, other in zip((model, loss), others, strict=True):
            for parameter, twin in zip(ours.parameters(), other.parameters(), strict=True):
                twin.grad = None if parameter.grad is None else parameter.grad.clone()
        update.step(step)
        for optimizer in alone:
            for group in optimizer.param_groups:
                group["lr"] = HYPER.learning_rate / step
            optimizer.step()
    for ours, other in zip((model, loss), others, strict=True):
        for parameter, twin in zip(ours.parameters(), other.parameters(), strict=True):
            assert torch.equal(parameter, twin)


def test_state_that_the_first_step_would_make_is_asked_for():
    update = make_update("sgd")
    update.optimizers[0].state.clear()
    backward(update, 1)
    with pytest.raises(RuntimeError, match="SGD made state in its first step.*`with_state`"):
        update.step(1)


def test_an_optimizer_that_cannot_bear_nan_never_sees_any():
    class Decomposing(torch.optim.SGD):
        def step(self, closure=None):
            for group in self.param_groups:
                assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in group["params"])

    update = make_update("sgd")
    decomposing = Decomposing([update.model.get_parameter("head.bias")], lr=0.1)
    update.optimizers = [decomposing]  # pyright: ignore[reportAttributeAccessIssue]
    backward(update, 1)
    gradient = update.model.get_parameter("head.bias").grad
    assert gradient is not None
    gradient[0] = math.nan
    assert not bool(update.step(1)[1])


def test_every_parameter_has_one_optimizer():
    update = make_update("muon")
    optimized = [p for o in update.optimizers for g in o.param_groups for p in g["params"]]
    trained = [p for p in update.model.parameters() if p.requires_grad]
    assert len(optimized) == len(set(optimized)) == len(trained) + 2
    assert type(update.optimizers[0]) is Muon


TINY = TrainConfig(
    steps=8,
    batch_size=8,
    log_every=2,
    checkpoint_every=4,
    model=DiTConfig(dim=16, depth=1, num_heads=2),
    evaluation=EvaluationConfig(every=1000, num_images=10, solver_steps=2, features="none"),
)


def resumed_and_straight(config: TrainConfig, folder: Path) -> list[dict[str, Tensor]]:
    """The last checkpoints of a run that was resumed from the middle, and of one that was not."""
    resumed, straight = folder / "resumed", folder / "straight"
    console = Console(file=io.StringIO())
    starting.start(config, straight, console)
    shutil.copytree(straight, resumed)
    shutil.rmtree(resumed / "checkpoints" / f"step-{config.steps:08d}")
    starting.resume(resumed, console)
    found = []
    for each in (resumed, straight):
        path = checkpoint.newest(each / "checkpoints")
        groups = {name.partition("/")[0] for name in checkpoint.shapes(path)}
        found.append(
            {f"{g}/{k}": v for g in groups for k, v in checkpoint.load_group(path, g).items()}
        )
    return found


@pytest.mark.parametrize("make_optimizers", [sgd, muon])
def test_a_run_with_another_optimizer_is_one_name_in_its_configuration(
    make_optimizers, tmp_path, monkeypatch
):
    monkeypatch.setitem(OPTIMIZERS, "another", make_optimizers)
    settings = OptimizerConfig(name="another", learning_rate=0.01)
    config = TrainConfig(**{**vars(TINY), "optimizer": settings})
    ours, theirs = resumed_and_straight(config, tmp_path)
    assert ours.keys() == theirs.keys()
    assert any(name.endswith("/momentum_buffer") for name in ours)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_run_with_further_averages_keeps_each_by_name(tmp_path):
    averages = ("power=6.94", "constant=0.5", "ema=0.1")
    config = TrainConfig(**{**vars(TINY), "optimizer": OptimizerConfig(averages=averages)})
    ours, theirs = resumed_and_straight(config, tmp_path)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    folder = tmp_path / "straight"
    config = read_config(folder)
    assert config.optimizer.averages == averages
    name = "final_layer.linear.weight"
    found = [theirs[f"{group}/{name}"] for group in ("ema", *(f"ema:{a}" for a in averages))]
    assert not any(torch.equal(*pair) for pair in itertools.combinations(found, 2))
    for average in ("ema", *averages):
        model, step = load_average(folder, config, torch.device("cpu"), average)
        group = average if average == "ema" else f"ema:{average}"
        assert step == 8 and torch.equal(model.state_dict()[name], theirs[f"{group}/{name}"])
    with pytest.raises(UserError, match=r"no EMA 'swa'; this run keeps ema, power=6\.94, con"):
        load_average(folder, config, torch.device("cpu"), "swa")


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"name": "sophia"}, r"optimizer\.name='sophia' is unknown; choose from adamw"),
        ({"averages": ("swa=1",)}, r"optimizer\.averages='swa=1' is unknown; choose from ema"),
    ],
)
def test_what_no_run_can_be_made_of_is_refused_first(settings, message, tmp_path):
    config = TrainConfig(**{**vars(TINY), "optimizer": OptimizerConfig(**settings)})
    with pytest.raises(UserError, match=message):
        starting.start(config, tmp_path / "run", Console(file=io.StringIO()))
    assert not (tmp_path / "run").exists()


def test_the_rate_of_what_muon_leaves_is_refused_without_muon(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "digits", "--optimizer.adamw-learning-rate", "1e-3", "--dry-run"])
    said = " ".join(capsys.readouterr().err.split())
    assert "adamw_learning_rate=0.001: has no effect with optimizer.name=adamw; set opt" in said


def test_an_average_is_named_once():
    with pytest.raises(UserError, match="name each EMA once"):
        OptimizerConfig(averages=("power=7", "power=7"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs the kernel in the interpreter")
def test_two_processes_update_and_divide_as_one_process_does(two_processes):
    said = two_processes(Path(__file__).with_name("sharded_update.py"))
    lines = [json.loads(line) for line in said.splitlines()]
    assert [line[0] for line in lines] == ["one sweep", "adamw", "muon", "sgd", "nadam", "parts"]
    for way, difference, *skipped in lines:
        assert difference <= 2e-6, way
        assert skipped == ([0, 0] if way == "parts" else [1, 1])
