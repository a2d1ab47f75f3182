"""What a configuration says of the optimizer is what every step of a run is made with."""

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from speed_engine.runtime.checks import UserError
from speed_engine.training.config import OptimizerConfig
from speed_engine.training.configured import build_averages, build_update
from speed_engine.training.update import Update


class Net(nn.Module):
    """A matrix in a block, which Muon is for, and one that is in none."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(2, 2)])
        self.head = nn.Linear(2, 2)


def updates(settings: OptimizerConfig, momentum_decay: str = "none") -> Iterator[Update]:
    """The update after each step of a run of eight, in which every derivative is 1."""
    model, loss = Net(), nn.Linear(1, 1)
    update = build_update(
        settings,
        model,
        loss,
        build_averages(settings, model),
        steps=8,
        update="separate",
        momentum_decay=momentum_decay,
        loss_learning_rate=0.025,
    )
    for step in range(1, 9):
        for parameter in (*model.parameters(), *loss.parameters()):
            parameter.grad = torch.ones_like(parameter)
        update.step(step)
        yield update


def test_rates_warm_up_follow_the_schedule_and_make_up_for_the_decay_of_momentum():
    settings = OptimizerConfig(
        learning_rate=0.1, warmup_steps=2, schedule="linear", momentum_decay="demon", beta1=0.8,
        beta2=0.98, weight_decay=0.3,
    )  # fmt: skip
    rates, of_loss, betas = [], [], []
    for update in updates(settings):
        (optimizer,) = update.optimizers
        model_group, loss_group = optimizer.param_groups
        rates.append(model_group["lr"])
        of_loss.append(loss_group["lr"])
        betas.append(model_group["betas"])
        assert loss_group["betas"] == model_group["betas"]
        assert (model_group["weight_decay"], loss_group["weight_decay"]) == (0.3, 0.0)
    # 0.1 (1/2, 1, 1, 5/6, 4/6, 3/6, 2/6, 1/6) (1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
    expected = [0.05, 0.09, 0.08, 0.35 / 6, 0.04, 0.025, 0.04 / 3, 0.005]
    assert rates == pytest.approx(expected)
    assert of_loss == pytest.approx([rate / 4 for rate in expected])
    of_first_moments, of_second_moments = zip(*betas, strict=True)
    assert of_first_moments == pytest.approx(
        (8 / 10, 7 / 9, 6 / 8, 5 / 7, 4 / 6, 3 / 5, 2 / 4, 1 / 3)
    )
    assert set(of_second_moments) == {0.98}


@pytest.mark.parametrize("schedule, last", [("wsd", 0.05), ("inverse_sqrt", 0.1 / 2**0.5)])
def test_a_schedule_has_its_own_options(schedule, last):
    settings = OptimizerConfig(
        learning_rate=0.1, warmup_steps=2, schedule=schedule, decay_share=0.25, reference_steps=4
    )
    *_, update = updates(settings)
    assert update.optimizers[0].param_groups[0]["lr"] == pytest.approx(last)


@pytest.mark.parametrize(
    "configured, of_method, last",
    [
        (None, "none", 0.8),
        (None, "demon", 1 / 3),
        ("none", "demon", 0.8),
        ("demon", "none", 1 / 3),
        ("geometric", "demon", 0.8 * 0.9995**7),
    ],
)
def test_how_momentum_decays_is_the_method_s_unless_the_configuration_says_it(
    configured, of_method, last
):
    settings = OptimizerConfig(beta1=0.8, momentum_decay=configured)
    *_, update = updates(settings, of_method)
    assert update.optimizers[0].param_groups[0]["betas"][0] == pytest.approx(last)


def test_gradients_of_the_model_are_clipped_to_the_configured_norm():
    update = next(updates(OptimizerConfig(beta1=0.8, grad_clip=0.25)))
    (optimizer,) = update.optimizers
    model, loss = (
        torch.cat([optimizer.state[p]["exp_avg"].flatten() for p in module.parameters()])
        for module in (update.model, update.loss)
    )
    assert float(model.norm()) == pytest.approx((1 - 0.8) * 0.25, rel=1e-4)
    assert float(loss.norm()) == pytest.approx((1 - 0.8) * 2**0.5)


def test_muon_has_its_momentum_and_what_it_leaves_to_adamw_a_rate_of_its_own():
    settings = OptimizerConfig(
        name="muon", learning_rate=0.1, adamw_learning_rate=0.05, warmup_steps=2,
        schedule="linear", muon_momentum=0.7, weight_decay=0.3,
    )  # fmt: skip
    *_, update = updates(settings)
    (hidden,), (others, of_loss) = (optimizer.param_groups for optimizer in update.optimizers)
    rates = [group["lr"] for group in (hidden, others, of_loss)]
    assert rates == pytest.approx([0.1 / 6, 0.05 / 6, 0.025 / 6])
    assert [group["weight_decay"] for group in (hidden, others, of_loss)] == [0.3, 0.3, 0.0]
    assert hidden["muon_momentum"] == 0.7
    with pytest.raises(UserError, match=r"momentum decay \(demon\) is that of AdamW's beta1"):
        next(updates(settings, "demon"))
