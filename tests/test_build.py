"""The objects of a run, made from its configuration."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from speed_engine import build
from speed_engine.arena.recipes import RECIPES, values_of
from speed_engine.build import (
    build_evaluator,
    build_model,
    build_objective,
    build_process,
    spelled,
)
from speed_engine.config import TrainConfig, with_values
from speed_engine.data.config import DataConfig
from speed_engine.diffusion.discrete import linear
from speed_engine.diffusion.method import build_method
from speed_engine.diffusion.processes import SCHEDULES, build_schedule
from speed_engine.diffusion.terms import SquaredError
from speed_engine.evaluation.conditions import generation_conditions
from speed_engine.evaluation.config import EvaluationConfig
from speed_engine.models.config import DiTConfig
from speed_engine.runtime.checks import UserError
from speed_engine.runtime.world import ALONE, World
from speed_engine.training.config import OptimizerConfig

CONFIG = TrainConfig(steps=40)


def test_a_curriculum_takes_the_whole_run_unless_it_is_told_otherwise():
    for text, steps in (("clts", 40), ("clts+ramp_steps=10", 10)):
        built = build_process(dataclasses.replace(CONFIG, method=text))
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


def test_a_family_of_models_need_not_offer_a_learned_variance():
    config: Any = SimpleNamespace(**(vars(CONFIG) | {"model": SimpleNamespace()}))
    objective = build_objective(config, build_process(CONFIG), torch.nn.Identity())
    assert type(objective.error) is SquaredError


def test_what_is_trained_is_spelled_as_recipes_are():
    for name, (_, text) in RECIPES.items():
        assert spelled(with_values(CONFIG, values_of(name))) == text
    config = dataclasses.replace(
        CONFIG, method="speed_paper+k=3", schedule="cosine", prediction="v",
        optimizer=OptimizerConfig(weight_decay=1e-5),
    )  # fmt: skip
    set_of_adamw = "optimizer.name=adamw+optimizer.schedule=constant+optimizer.weight_decay=1e-05"
    assert spelled(config) == f"speed_paper@cosine:v+k=3+{set_of_adamw}"
    own = dataclasses.replace(config, schedule="edm", prediction=None)
    assert spelled(own).startswith("speed_paper@edm:F+k=3+")


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_every_process_compares_images_on_its_own_device(monkeypatch, kind):
    """By CLIP, and by features, for which joining the others chose the current GPU."""
    config = TrainConfig(
        data=DataConfig(members=("npy", "cls", "tokens.npy")),
        evaluation=EvaluationConfig(metrics=("clip",), clip_model="clip"),
    )
    process, placed = build_process(config), []
    monkeypatch.setattr(
        build, "torch_device", lambda wanted, world=ALONE: torch.device(kind, world.local_rank)
    )
    monkeypatch.setattr(build, "ClipScore", lambda name, device: placed.append(device))
    for reads in ("generation_texts", "generation_conditions", "null_conditions"):
        monkeypatch.setattr(build, reads, lambda *_: {})
    monkeypatch.setattr(World, "from_first", lambda self, compute: compute())
    evaluator = build_evaluator(config, process, World(1, 2, local_rank=1, local_size=2))
    assert placed == [torch.device(kind, 1)]
    assert evaluator.extractor is not None and evaluator.extractor.on_gpu == (kind == "cuda")


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
