"""Full and masked loss together: what is shared, what is drawn, what resumes."""

import pytest
import torch

from speed_engine.diffusion.hybrid import HybridObjective
from speed_engine.diffusion.masked import MaskedObjective
from speed_engine.diffusion.method import build_method
from speed_engine.diffusion.objective import Objective
from speed_engine.diffusion.processes import build_schedule

WORDS = 10


class Recorder:
    """A model that keeps what it is called with; under a mask it answers something else."""

    def __init__(self, channels: int = 1) -> None:
        self.calls: list[dict] = []
        self.channels = channels

    def __call__(self, x_in, t, **conditions):
        self.calls.append({"x_in": x_in, "t": t, **conditions})
        answer = 0.5 * x_in if "mask_draws" in conditions else 0.1 * x_in
        return answer.repeat(1, self.channels, 1, 1)


def objective(seed: int = 3, method: str = "speed_paper") -> Objective:
    return Objective(build_method(method, build_schedule("linear", 1000)), seed)


def data(ids=(5, 6, 9)):
    ids = torch.tensor(ids)
    images = torch.sin(torch.arange(16.0) + ids[:, None]).view(-1, 1, 4, 4)
    return images, {"labels": ids % 4}, ids, 0


def test_the_loss_is_that_of_both_passes():
    masked, parts = MaskedObjective(objective(), WORDS), objective()
    output = masked(Recorder(), *data())
    full = parts(lambda x, t, **_: 0.1 * x, *data())
    hidden = parts(lambda x, t, **_: 0.5 * x, *data())
    torch.testing.assert_close(output.loss, full.loss + hidden.loss)
    torch.testing.assert_close(output.weighted_error, full.weighted_error + hidden.weighted_error)
    torch.testing.assert_close(output.squared_error, full.squared_error)
    assert torch.equal(output.t, full.t)


def test_both_passes_see_the_same_input_and_conditions():
    model = Recorder()
    MaskedObjective(objective(), WORDS)(model, *data())
    full, hidden = model.calls
    draws = hidden.pop("mask_draws")
    assert draws.shape == (3, WORDS) and full.keys() == hidden.keys()
    for name in full:
        assert torch.equal(full[name], hidden[name]), name


def test_masks_are_a_function_of_seed_and_image_alone():
    def draws(seed=3, ids=(5, 6, 9)):
        model = Recorder()
        MaskedObjective(objective(seed), WORDS)(model, *data(ids))
        return model.calls[1]["mask_draws"]

    assert torch.equal(draws(), draws())
    assert torch.equal(draws(ids=(9,)), draws()[2:])  # whatever else is in the batch
    assert not bool((draws(seed=4) == draws()).any())
    assert len(draws().flatten().unique()) == 3 * WORDS


def test_a_learned_variance_is_masked_as_well():
    method = build_method("uniform", build_schedule("linear", 1000))
    output = MaskedObjective(HybridObjective(method, 3), WORDS)(Recorder(channels=2), *data())
    plain = HybridObjective(method, 3)(Recorder(channels=2), *data())
    assert float(output.loss) > float(plain.loss)


@pytest.mark.parametrize("method", ["adaptive", "learned_uncertainty"])
def test_what_a_method_learns_is_observed_and_kept_in_checkpoints(method):
    masked = MaskedObjective(objective(method=method), WORDS)
    output = masked(Recorder(), *data())
    for step in range(50):
        masked.observe(step, output)
    inner = masked.objective.state_dict()
    assert inner and {f"objective.{name}" for name in inner} == set(masked.state_dict())
    if method == "learned_uncertainty":
        output.loss.backward()
        assert all(parameter.grad is not None for parameter in masked.parameters())
