import math

import pytest
import torch
from torch import nn

from speed_engine.arena.final import LOG_SNRS, denoising_errors, times_at
from speed_engine.build import build_process
from speed_engine.config import TrainConfig
from speed_engine.data.config import DataConfig


class Silent(nn.Module):
    """Answers zero, whatever it is asked."""

    def forward(self, x: torch.Tensor, t: torch.Tensor, **conditions: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(x)


def errors(schedule: str, prediction: str, held_out: float = 0.3) -> dict[int, float]:
    config = TrainConfig(
        method="uniform", schedule=schedule, prediction=prediction, device="cpu",
        data=DataConfig(held_out=held_out),
    )  # fmt: skip
    found = denoising_errors(config, build_process(config), Silent())
    return {int(log_snr): error for log_snr, error in found.items()}


@pytest.mark.parametrize("schedule", ["linear", "edm", "flow"])
def test_no_noise_at_all_as_the_answer_leaves_the_noise(schedule):
    for log_snr, error in errors(schedule, "epsilon").items():
        assert math.log(error) == pytest.approx(-log_snr, abs=0.1)


def test_a_grey_image_as_the_answer_costs_the_same_at_every_ratio():
    of_held_out, of_all = errors("linear", "x0"), errors("linear", "x0", held_out=0)
    assert len(set(of_held_out.values())) == 1 and 0.3 < of_held_out[0] < 1
    assert of_held_out[0] != of_all[0]  # other images


def test_ratios_that_a_process_does_not_reach_are_left_out():
    short = TrainConfig(method="uniform", schedule="linear", num_timesteps=1000)
    process = build_process(short)
    assert set(times_at(process, LOG_SNRS)) == set(LOG_SNRS)
    assert set(times_at(process, (-30, 0, 30))) == {0}
    reached = process.schedule.snr(torch.tensor([int(times_at(process, (2,))[2])])).log()
    assert float(reached) == pytest.approx(2, abs=0.05)
