"""What a network declares and a method adds: passes, random words, features, terms, targets."""

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import nn

from speed_engine.diffusion.learned_variance import SquaredErrorAndBound
from speed_engine.diffusion.method import build_method
from speed_engine.diffusion.objective import Objective
from speed_engine.diffusion.processes import build_schedule
from speed_engine.diffusion.terms import Pass
from speed_engine.ops import Stream, random_bits

WORDS = 10
# What a masked network declares: a plain pass, and one under a mask.
MASKED = SimpleNamespace(training_passes=({}, {"mask_draws": WORDS}))


class Recorder:
    """A model that keeps what it is called with; under a mask it answers something else."""

    def __init__(self, channels: int = 1) -> None:
        self.calls: list[dict] = []
        self.channels = channels

    def __call__(self, x_in, t, features=(), **conditions):
        self.calls.append({"x_in": x_in, "t": t, **conditions})
        answer = 0.5 * x_in if "mask_draws" in conditions else 0.1 * x_in
        answer = answer.repeat(1, self.channels, 1, 1)
        return (answer, {name: x_in for name in features}) if features else answer


class Distance(nn.Module):
    """A term: how far a feature is from the batch's target of that name."""

    def __init__(self, name: str, weight: float) -> None:
        super().__init__()
        self.features = (name,)
        self.weight = nn.Parameter(torch.tensor(float(weight)))

    def forward(self, seen: Pass) -> torch.Tensor:
        (name,) = self.features
        return self.weight * (seen.features[name] - seen.targets[name]).flatten(1).square().mean(1)


def objective(seed: int = 3, method: str = "speed_paper", **options: Any) -> Objective:
    return Objective(build_method(method, build_schedule("linear", 1000)), seed, **options)


def data(ids=(5, 6, 9)):
    ids = torch.tensor(ids)
    images = torch.sin(torch.arange(16.0) + ids[:, None]).view(-1, 1, 4, 4)
    return images, {"labels": ids % 4}, ids, 0


def test_the_loss_is_that_of_all_passes():
    output = objective(network=MASKED)(Recorder(), *data())
    full = objective()(lambda x, t, **_: 0.1 * x, *data())
    hidden = objective()(lambda x, t, **_: 0.5 * x, *data())
    assert torch.equal(output.loss, full.loss + hidden.loss)
    assert torch.equal(output.weighted_error, full.weighted_error + hidden.weighted_error)
    assert torch.equal(output.squared_error, full.squared_error)
    assert torch.equal(output.t, full.t)


def test_all_passes_see_the_same_input_and_conditions():
    model = Recorder()
    objective(network=MASKED)(model, *data())
    full, hidden = model.calls
    assert hidden.pop("mask_draws").shape == (3, WORDS) and full.keys() == hidden.keys()
    for name in full:
        assert torch.equal(full[name], hidden[name]), name


def test_masks_are_a_function_of_seed_and_image_alone():
    def draws(seed=3, ids=(5, 6, 9)):
        model = Recorder()
        objective(seed, network=MASKED)(model, *data(ids))
        return model.calls[1]["mask_draws"]

    assert torch.equal(draws(), draws())
    assert torch.equal(draws(ids=(9,)), draws()[2:])  # whatever else is in the batch
    assert not bool((draws(seed=4) == draws()).any())
    assert len(draws().flatten().unique()) == 3 * WORDS


def test_every_argument_of_every_pass_has_words_of_its_own():
    declared = SimpleNamespace(training_passes=({"a": 2, "b": 3}, {"a": 4}))
    model = Recorder()
    objective(network=declared)(model, *data())
    given = torch.cat([model.calls[0]["a"], model.calls[0]["b"], model.calls[1]["a"]], dim=1)
    ids = torch.tensor([5, 6, 9])
    assert torch.equal(given, random_bits(torch.tensor(3), ids, 9, Stream.TOKEN_MASK))


def test_a_learned_variance_is_masked_as_well():
    method = build_method("uniform", build_schedule("linear", 1000))
    error = SquaredErrorAndBound(method)
    output = Objective(method, 3, network=MASKED, error=error)(Recorder(channels=2), *data())
    plain = Objective(method, 3, error=error)
    full = plain(lambda x, t, **_: (0.1 * x).repeat(1, 2, 1, 1), *data())
    hidden = plain(lambda x, t, **_: (0.5 * x).repeat(1, 2, 1, 1), *data())
    assert torch.equal(output.loss, full.loss + hidden.loss)
    assert float(full.loss) > float(full.squared_error.mean())  # with the bound


@pytest.mark.parametrize("method", ["adaptive", "learned_uncertainty"])
def test_what_a_method_learns_has_the_same_names_with_a_mask(method):
    masked = objective(method=method, network=MASKED)
    output = masked(Recorder(), *data())
    for step in range(50):
        masked.observe(step, output)
    assert masked.state_dict()
    assert masked.state_dict().keys() == objective(method=method).state_dict().keys()
    if method == "learned_uncertainty":
        output.loss.backward()
        assert all(parameter.grad is not None for parameter in masked.parameters())


def test_a_term_compares_features_with_targets_and_adds_to_the_loss_alone():
    model, targets = Recorder(), {"x": torch.full((3, 1, 4, 4), 0.25)}
    term = Distance("x", 0.5)
    network = SimpleNamespace(features=("x", "y"))
    output = objective(network=network, terms=[term])(model, *data(), targets)
    plain = objective()(Recorder(), *data())
    added = 0.5 * (model.calls[0]["x_in"] - 0.25).square().mean()
    torch.testing.assert_close(output.loss, plain.loss + added)
    assert torch.equal(output.weighted_error, plain.weighted_error)
    output.loss.backward()
    assert term.weight.grad is not None and float(term.weight.grad) > 0


def test_learned_weights_leave_other_terms_as_they_are():
    options: dict[str, Any] = {"network": SimpleNamespace(features=("x",))}
    targets = {"x": torch.full((3, 1, 4, 4), 0.25)}

    model = Recorder()

    def loss(weight: float) -> float:
        learned = objective(method="learned_uncertainty", terms=[Distance("x", weight)], **options)
        nn.init.constant_(cast(torch.Tensor, learned.batch_loss.weight), 0.05)
        return float(learned(model, *data(), targets).loss.detach())

    assert loss(0.5) - loss(0) == pytest.approx(
        0.5 * float((model.calls[0]["x_in"] - 0.25).square().mean()), rel=1e-5
    )


def test_a_term_keeps_its_expectation_where_timesteps_are_drawn_by_importance():
    learned = objective(
        method="adaptive", network=SimpleNamespace(features=("x",)), terms=[Distance("x", 1)]
    )
    learned.timesteps.distribution.get_buffer("cell_probabilities").copy_(
        torch.linspace(0.5, 1.5, 1000).double() / 1000
    )
    model, targets = Recorder(), {"x": torch.full((3, 1, 4, 4), 0.25)}
    output = learned(model, *data(), targets)
    plain = learned.batch_loss(None, output.weighted_error * learned.timesteps.importance(output.t))
    each = (model.calls[0]["x_in"] - 0.25).flatten(1).square().mean(1)
    added = (each * learned.timesteps.importance(output.t)).mean()
    torch.testing.assert_close(output.loss, plain + added)


def test_features_that_the_network_does_not_return_are_named():
    with pytest.raises(ValueError, match="needs features z of the model; it has x, y"):
        objective(network=SimpleNamespace(features=("x", "y")), terms=[Distance("z", 1)])
    with pytest.raises(ValueError, match="needs features z of the model; it has none"):
        objective(terms=[Distance("z", 1)])
