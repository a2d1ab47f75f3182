import math

import numpy as np
import pytest
import torch
from torch import nn

from speed_engine.arena.final import LOG_SNRS, denoising_errors, times_at
from speed_engine.build import build_process
from speed_engine.config import TrainConfig
from speed_engine.data.config import DataConfig
from speed_engine.data.format.held_out import is_held_out
from speed_engine.data.loading.decoding import read_all
from speed_engine.data.opening import open_data


class Silent(nn.Module):
    """Answers zero, whatever it is asked."""

    def forward(self, x: torch.Tensor, t: torch.Tensor, **conditions: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(x)


def errors(schedule: str, prediction: str) -> dict[int, float]:
    config = TrainConfig(
        method="uniform", schedule=schedule, prediction=prediction, device="cpu",
        data=DataConfig(held_out=0.3),
    )  # fmt: skip
    found = denoising_errors(config, build_process(config), Silent())
    return {int(log_snr): error for log_snr, error in found.items()}


@pytest.mark.parametrize("schedule", ["linear", "edm", "flow"])
def test_no_noise_at_all_as_the_answer_leaves_the_noise(schedule):
    for log_snr, error in errors(schedule, "epsilon").items():
        assert math.log(error) == pytest.approx(-log_snr, abs=0.1)


def test_a_grey_image_as_the_answer_costs_a_held_out_image_s_mean_square_at_every_ratio(
    monkeypatch,
):
    monkeypatch.setattr("speed_engine.arena.final.DENOISED_IMAGES", 2000)  # all that there are
    reader = open_data(DataConfig(), part=None)
    held_out = [is_held_out(reader.key(n), 0.3) for n in range(len(reader))]
    images = read_all(reader, (1, 8, 8))[0][held_out] / 127.5 - 1
    found = errors("linear", "x0")
    assert len(set(found.values())) == 1
    assert found[0] == pytest.approx(np.square(images).mean(), rel=1e-5)


def test_ratios_that_a_process_does_not_reach_are_left_out():
    short = TrainConfig(method="uniform", schedule="linear", num_timesteps=1000)
    process = build_process(short)
    assert set(times_at(process, LOG_SNRS)) == set(LOG_SNRS)
    assert set(times_at(process, (-30, 0, 30))) == {0}
    reached = process.schedule.snr(torch.tensor([int(times_at(process, (2,))[2])])).log()
    assert float(reached) == pytest.approx(2, abs=0.05)
