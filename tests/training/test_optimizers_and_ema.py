import pytest
import torch
from torch import nn

from speed_engine.training.ema import Ema
from speed_engine.training.optimizers import (
    adamw,
    demon,
    geometric,
    linear_warmup,
    optimizer_tensors,
    set_rates,
)


def trained(steps: int, optimizer=None, model=None):
    if model is None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
    optimizer = optimizer or adamw(
        model, learning_rate=0.1, beta1=0.9, beta2=0.99, weight_decay=0.1
    )
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.ones(2, 3)).square().sum().backward()
        optimizer.step()
    return model, optimizer


def test_optimizer_state_travels_by_parameter_name():
    model, optimizer = trained(3)
    tensors = {key: value.clone() for key, value in optimizer_tensors(model, optimizer).items()}
    assert {"0.weight/exp_avg", "0.weight/exp_avg_sq", "1.bias/step"} <= set(tensors)

    other, fresh = trained(0)
    other.load_state_dict(model.state_dict())
    for name, tensor in optimizer_tensors(other, fresh).items():
        tensor.copy_(tensors[name])
    trained(2, optimizer, model)
    trained(2, fresh, other)
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_the_learning_rate_rises_linearly_then_stays():
    rate = linear_warmup(0.4, 4)
    assert [rate(step) for step in range(1, 7)] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4, 0.4])
    assert linear_warmup(0.4, 0)(1) == 0.4


def test_the_average_follows_its_formula_and_warms_up():
    model = nn.Linear(2, 1)
    ema = Ema(model, decay=0.9)
    expected = model.weight.detach().clone()
    for step in range(1, 200):
        with torch.no_grad():
            model.weight += 1
        ema.update(step)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * model.weight.detach()
        average = ema.model.get_parameter("weight")
        torch.testing.assert_close(average, expected)  # at every step: a late one forgets warm-up
    assert not average.requires_grad


def test_demon_decays_momentum_and_keeps_the_weight_of_a_new_gradient():
    momentum = demon(0.9, 1000)
    for step in (1, 2, 500, 1000):
        p = (step - 1) / 1000
        expected = 0.9 * (1 - p) / ((1 - 0.9) + 0.9 * (1 - p))
        assert momentum.beta1(step) == pytest.approx(expected)
        factor = momentum.compensation(step)
        assert factor == pytest.approx((1 - 0.9) / (1 - expected)) == pytest.approx(1 - 0.9 * p)


def test_the_geometric_decay_has_a_floor():
    momentum = geometric(0.9, 1000)
    assert momentum.beta1(1) == 0.9 and momentum.beta1(3) == pytest.approx(0.9 * 0.9995**2)
    assert momentum.beta1(10_000) == 0.4 and momentum.compensation(500) == 1


def test_a_loss_s_parameters_have_a_rate_of_their_own_and_no_decay():
    loss = nn.Linear(1, 1)
    optimizer = adamw(
        nn.Linear(2, 2), learning_rate=0.1, beta1=0.9, beta2=0.99, weight_decay=0.1,
        loss=loss, loss_learning_rate=0.025,
    )  # fmt: skip
    set_rates(optimizer, 0.01, 0.5)
    model_group, loss_group = optimizer.param_groups
    assert (model_group["lr"], loss_group["lr"]) == pytest.approx((0.01, 0.0025))
    assert (model_group["weight_decay"], loss_group["weight_decay"]) == (0.1, 0.0)
    assert model_group["betas"] == loss_group["betas"] == (0.5, 0.99)
