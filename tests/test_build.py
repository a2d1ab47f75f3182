"""The objects of a run, made from its configuration."""

import dataclasses

import pytest
import torch

from speed_engine.build import build_evaluator, build_model, build_process
from speed_engine.config import TrainConfig
from speed_engine.diffusion.discrete import linear
from speed_engine.diffusion.method import build_method
from speed_engine.diffusion.processes import SCHEDULES, build_schedule
from speed_engine.evaluation.conditions import generation_conditions
from speed_engine.evaluation.config import EvaluationConfig
from speed_engine.models.config import DiTConfig
from speed_engine.runtime.checks import UserError

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


def test_more_than_this_machine_holds_is_refused_before_it_is_asked_for():
    wide = dataclasses.replace(CONFIG, model=DiTConfig(dim=65536, depth=28, num_heads=2))
    with pytest.raises(UserError, match=r"parameters take .* GB, .* choose a smaller model"):
        build_model(wide)
    many = dataclasses.replace(CONFIG, evaluation=EvaluationConfig(num_images=10**12))
    with pytest.raises(UserError, match=r"num_images=1,000,000,000,000 images take .* lower it"):
        build_evaluator(many, build_process(many))
    with pytest.raises(UserError, match="the numbers of 1,000,000,000,000 images take"):
        generation_conditions(CONFIG.data, 10**12, seed=0)


@pytest.mark.parametrize("count", [10**6 + 1, 10**13, 1, 0, -5])
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_process_of_too_few_or_too_many_timesteps_is_refused(name, count):
    with pytest.raises(UserError, match=f"num_timesteps={count}: must be at "):
        build_schedule(name, count)
