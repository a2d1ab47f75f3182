import pytest
import torch
from torch import nn

from speed_engine.data.batch import Batch
from speed_engine.diffusion.discrete import from_betas
from speed_engine.diffusion.increments import increments
from speed_engine.diffusion.method import build_method
from speed_engine.diffusion.processes import build_schedule
from speed_engine.evaluation import timestep_losses
from speed_engine.evaluation.method_report import AREAS
from speed_engine.evaluation.validation import Validation


def images(count: int = 64) -> Batch:
    drawn = torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return Batch(drawn, {}, torch.arange(count))


class Silent(nn.Module):
    def forward(self, x, t):
        return torch.zeros_like(x)


def test_the_loss_of_a_model_that_answers_zero_is_that_of_the_noise_in_every_area():
    process = build_method("uniform", build_schedule("linear", 1000))
    errors = timestep_losses.losses(Validation(process, images(), 0), process, Silent())
    assert len(errors) == timestep_losses.TIMESTEPS
    found = timestep_losses.by_area(process, errors)
    assert list(found) == list(AREAS)
    assert list(found.values()) == pytest.approx([1.0] * 3, abs=0.05)


def test_the_means_of_the_areas_are_those_of_their_own_timesteps():
    process = build_method("uniform", build_schedule("linear", 1000))
    t = timestep_losses.cells(1000) + 1
    found = timestep_losses.by_area(process, t.double())
    areas = increments(process.schedule)
    assert found["acceleration"] == pytest.approx(areas.t_ad / 2, rel=0.05)
    assert found["convergence"] == pytest.approx((1000 + areas.tau(138.6)) / 2, rel=0.02)


@pytest.mark.parametrize("name", ["linear", "flow"])
def test_measured_increments_are_those_of_the_process_and_within_the_papers_bounds(name):
    process = build_method("uniform", build_schedule(name, 1000))
    squares, variances = timestep_losses.measured_increments(process, images(256), 3)
    areas, at = increments(process.schedule), timestep_losses.cells(1000)
    torch.testing.assert_close(squares, areas.mean.square()[at].double(), rtol=1e-3, atol=1e-9)
    torch.testing.assert_close(variances, areas.variance[at].double(), rtol=0.03, atol=0)
    if name == "linear":  # what the theorem is about
        assert bool((squares <= areas.mean_bound[at]).all())
        assert bool((variances >= 0.97 * areas.variance_bound[at]).all())


def test_past_tau_is_convergence_even_where_acceleration_has_not_ended():
    """As the picture shades it; small betas suppress the signal, and a large one follows."""
    process = build_method("uniform", from_betas(torch.tensor([0.001] * 5000 + [0.9] * 3)))
    areas, t = increments(process.schedule), timestep_losses.cells(5003) + 1
    assert areas.tau(138.6) < t[-1] < areas.t_ad
    found = timestep_losses.by_area(process, t.double())
    assert list(found) == ["acceleration", "convergence"] and found["convergence"] == t[-1]
