"""The objects of a run, made from its configuration."""

import dataclasses

import pytest
import torch

from speed_engine.build import build_process
from speed_engine.config import TrainConfig
from speed_engine.diffusion.discrete import linear
from speed_engine.diffusion.method import build_method

CONFIG = TrainConfig(steps=40)


def test_a_curriculum_takes_the_whole_run_unless_it_is_told_otherwise():
    for spelled, steps in (("clts", 40), ("clts+ramp_steps=10", 10)):
        built = build_process(dataclasses.replace(CONFIG, method=spelled))
        expected = build_method("clts", linear(), ramp_steps=steps)
        for step in (0, 5, 10, 40):
            ours, theirs = (m.timesteps.probabilities(step) for m in (built, expected))
            assert torch.equal(ours, theirs)


def test_a_process_is_built_with_all_that_the_configuration_says_of_it():
    config = dataclasses.replace(
        CONFIG, method="speed_paper+k=3+weigh_bound=True", schedule="cosine", num_timesteps=200,
        prediction="v", seed=7,
    )  # fmt: skip
    method = build_process(config)
    assert (method.name, method.prediction, method.weigh_bound) == ("speed_paper", "v", True)
    assert (method.schedule.name, method.schedule.num_timesteps) == ("cosine", 200)
    p = method.probabilities
    assert float(p.max() / p.min()) == pytest.approx(3) and int(method.seed) == 7
