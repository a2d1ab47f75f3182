import pytest
import torch
from torch import nn

from speed_engine.runtime.checks import UserError
from speed_engine.training.config import OptimizerConfig
from speed_engine.training.configured import build_averages, build_update
from speed_engine.training.ema import DECAYS, EMA, Ema, decay_of
from speed_engine.training.lerp import lerp_in_one_kernel
from speed_engine.training.optimizers import (
    OPTIMIZERS,
    Hyperparameters,
    adamw,
    muon,
    set_rates,
    with_state,
)
from speed_engine.training.schedules import demon, geometric

TRUE, FALSE = torch.tensor(True), torch.tensor(False)


@pytest.mark.parametrize(
    "average, decay",
    [
        ("ema=0.9", lambda step: min(0.9, (1 + step) / (10 + step))),
        ("power=6.94", lambda step: (1 - 1 / step) ** 7.94),
        ("constant=0.9", lambda step: 0.9),
    ],
)
def test_an_average_follows_its_formula(average, decay):
    model = nn.Linear(2, 1)
    ema = Ema(model, decay_of(average))
    expected = model.weight.detach().clone()
    for step in range(1, 200):
        with torch.no_grad():
            model.weight += 1
        ema.update(step, TRUE)
        expected = decay(step) * expected + (1 - decay(step)) * model.weight.detach()
        found = ema.model.get_parameter("weight")
        torch.testing.assert_close(found, expected)  # at every step: a late one forgets warm-up
    ema.update(200, FALSE)
    assert torch.equal(ema.model.get_parameter("weight"), found)
    assert not found.requires_grad


def test_every_decay_is_a_share():
    for decay in (rule(0.9) for rule in DECAYS.values()):
        assert all(0 <= decay(step) < 1 for step in (1, 2, 10, 10_000))


@pytest.mark.parametrize(
    "average, message",
    [
        ("swa", r"averages='swa' is unknown; choose from ema=NUMBER, power=NUMBER"),
        ("ema", r"averages='ema' needs a number"),
        ("power=much", r"averages='power=much' needs a number"),
        ("ema=1", r"must lie in \[0, 1\); got 1"),
        ("power=-1", r"needs a positive exponent of at most 10\^6; got -1"),
        ("power=nan", r"needs a positive exponent of at most 10\^6; got nan"),
        ("power=1e400", r"needs a positive exponent of at most 10\^6; got inf"),
    ],
)
def test_an_average_that_cannot_be_is_named(average, message):
    with pytest.raises(UserError, match=message):
        decay_of(average)


@pytest.mark.parametrize("share", [0.9, 0.5, 1e-4])
def test_the_average_in_one_kernel_is_the_average_within_a_rounding(share):
    generator = torch.Generator().manual_seed(0)
    shapes = [(300, 7), (), (0,), (5,)]
    averages, parameters = ([torch.randn(s, generator=generator) for s in shapes] for _ in "ab")
    expected = [
        torch.lerp(average.double(), parameter.double(), share)
        for average, parameter in zip(averages, parameters, strict=True)
    ]
    kept = [parameter.clone() for parameter in parameters]
    before = [average.clone() for average in averages]
    lerp_in_one_kernel(averages, parameters, share, torch.tensor(1.0))
    assert all(torch.equal(*pair) for pair in zip(averages, before, strict=True))
    lerp_in_one_kernel(averages, parameters, share, torch.tensor(0.0))
    for average, wanted in zip(averages, expected, strict=True):
        torch.testing.assert_close(average.double(), wanted, rtol=2e-7, atol=2e-7)
    assert all(torch.equal(*pair) for pair in zip(parameters, kept, strict=True))


@pytest.mark.parametrize("step, beta1, factor", [(1, 0.8, 1.0), (5, 2 / 3, 0.6), (8, 1 / 3, 0.3)])
def test_demon_decays_momentum_and_keeps_the_weight_of_a_new_gradient(step, beta1, factor):
    momentum = demon(0.8, 8)
    found = momentum.beta1(step), momentum.compensation(step)
    assert found == pytest.approx((beta1, factor))
    assert found[1] * (1 - found[0]) == pytest.approx(1 - 0.8)


def test_the_geometric_decay_has_a_floor():
    momentum = geometric(0.9, 1000)
    assert momentum.beta1(1) == 0.9 and momentum.beta1(3) == pytest.approx(0.9 * 0.9995**2)
    assert momentum.beta1(10_000) == 0.4 and momentum.compensation(500) == 1


def test_a_loss_s_parameters_have_a_rate_of_their_own_and_no_decay():
    hyper = Hyperparameters(
        learning_rate=0.1, beta2=0.99, weight_decay=0.1, loss_learning_rate=0.025
    )
    (optimizer,) = adamw(nn.Linear(2, 2), nn.Linear(1, 1), hyper)
    set_rates(optimizer, 0.01, 0.5)
    model_group, loss_group = optimizer.param_groups
    assert (model_group["lr"], loss_group["lr"]) == pytest.approx((0.01, 0.0025))
    assert (model_group["weight_decay"], loss_group["weight_decay"]) == (0.1, 0.0)
    assert model_group["betas"] == loss_group["betas"] == (0.5, 0.99)


@pytest.mark.parametrize("given, rate", [(None, 0.002), (0.05, 0.005)])
def test_beside_muon_a_loss_s_parameters_have_the_rate_of_adamw_s_others(given, rate):
    hyper = Hyperparameters(learning_rate=0.1, adamw_learning_rate=0.02, loss_learning_rate=given)
    model = nn.Sequential(nn.ModuleList([nn.Linear(2, 2)]))
    rates = []
    for optimizer in muon(model, nn.Linear(1, 1), hyper):
        set_rates(optimizer, 0.01, None)
        rates += [group["lr"] for group in optimizer.param_groups]
    assert rates == pytest.approx([0.01, 0.002, rate])


def test_momentum_is_set_by_the_name_that_an_optimizer_gives_it():
    parameters = list(nn.Linear(2, 2).parameters())
    with_momentum = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    without = torch.optim.SGD(parameters, lr=0.1)
    for optimizer in (with_momentum, without):
        set_rates(optimizer, 0.01, 0.5)
    assert with_momentum.param_groups[0]["momentum"] == 0.5
    assert without.param_groups[0]["momentum"] == 0


@pytest.mark.parametrize("decay, momentum", [("none", 0.7), ("demon", 0.9)])
def test_an_optimizer_keeps_its_own_momentum_where_no_decay_is_asked_for(
    monkeypatch, decay, momentum
):
    def sgd(model, loss, hyper):
        optimizer = torch.optim.SGD(model.parameters(), lr=hyper.learning_rate, momentum=0.7)
        return [with_state(optimizer, lambda of: {"momentum_buffer": torch.zeros_like(of)})]

    monkeypatch.setitem(OPTIMIZERS, "sgd", sgd)
    settings, model = OptimizerConfig(name="sgd", momentum_decay=decay), nn.Linear(2, 1)
    update = build_update(
        settings,
        model,
        nn.Identity(),
        build_averages(settings, model),
        steps=10,
        update="separate",
        momentum_decay="none",
        loss_learning_rate=None,
    )
    model(torch.ones(1, 2)).sum().backward()
    update.step(1)
    assert update.optimizers[0].param_groups[0]["momentum"] == pytest.approx(momentum)


@pytest.mark.parametrize("warmup, first", [(False, 0.9999), (True, 2 / 11)])
def test_an_average_without_warm_up_keeps_its_share_from_the_first_step(warmup, first):
    settings = OptimizerConfig(ema_decay=0.9999, ema_warmup=warmup)
    average = build_averages(settings, nn.Linear(2, 1))[EMA]
    assert average.decay(1) == pytest.approx(first)
    assert average.decay(200_000) == 0.9999
