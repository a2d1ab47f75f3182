"""Solvers on data whose best prediction is known in closed form, for every process."""

import pytest
import torch

from speed_engine.diffusion.discrete import linear
from speed_engine.diffusion.prediction import PREDICTIONS
from speed_engine.diffusion.processes import SCHEDULES, build_schedule
from speed_engine.diffusion.solvers import ddim
from speed_engine.diffusion.table import TimestepTable

MEAN, STD = 0.2, 0.1  # of the data, a Gaussian; narrow enough that no pixel leaves [-1, 1]


def draw(process: str, prediction: str, steps: int) -> torch.Tensor:
    """DDIM with the exact denoiser: E[x0 | x_t] is linear in x_t."""
    schedule = build_schedule(process)
    table = TimestepTable(schedule, prediction, torch.ones(1000))

    def predict(x, t):
        rows = table.rows_at(t)
        total = rows.a_x**2 * STD**2 + rows.a_e**2
        clean = MEAN + rows.a_x * STD**2 / total * (x - rows.a_x * MEAN)
        noise = (x - rows.a_x * clean) / rows.a_e
        return rows.b_x * clean + rows.b_e * noise

    x = torch.randn(10_000, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    return ddim(predict, schedule, table, x, steps).double()


@pytest.mark.parametrize(
    "process, prediction",
    [("linear", name) for name in PREDICTIONS]
    + [(name, build_schedule(name).prediction) for name in SCHEDULES if name != "linear"],
)
def test_ddim_draws_a_gaussian_from_its_exact_denoiser(process, prediction):
    drawn = draw(process, prediction, 500)
    assert float(drawn.mean()) == pytest.approx(MEAN, abs=4 * STD / 100)
    assert float(drawn.std()) == pytest.approx(STD, rel=0.08)  # the last denoising shrinks it


def test_ddim_converges_at_first_order():
    coarse, middle, fine = (draw("linear", "epsilon", steps) for steps in (250, 500, 1000))
    ratio = float((coarse - middle).norm() / (middle - fine).norm())
    assert 1.6 < ratio < 2.5


@pytest.mark.parametrize("steps", [1, 2, 25, 999, 1000])
def test_timesteps_fall_from_the_noisiest_to_the_cleanest(steps):
    timesteps = linear().solver_times(steps)
    assert len(set(timesteps)) == steps and timesteps[0] == 999
    assert timesteps == sorted(timesteps, reverse=True)
    assert steps == 1 or timesteps[-1] == 0


def test_more_steps_than_timesteps_are_refused():
    with pytest.raises(ValueError, match=r"41 solver steps: must lie in \[1, 40\]"):
        linear(40).solver_times(41)
