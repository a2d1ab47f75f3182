import pytest
import torch
from torch import nn

from speed_engine.ema import Ema
from speed_engine.optim import adamw, linear_warmup, load_optimizer_tensors, optimizer_tensors


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
    load_optimizer_tensors(other, fresh, tensors)
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
    torch.testing.assert_close(average, expected)
    assert not average.requires_grad
