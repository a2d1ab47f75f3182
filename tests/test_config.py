import dataclasses
import json
from pathlib import Path

import pytest

from speed_engine.config import (
    DataConfig,
    EvaluationConfig,
    MethodOptions,
    OptimizerConfig,
    TrainConfig,
    from_json,
    to_json,
)
from speed_engine.models.config import DiTConfig

UNUSUAL = TrainConfig(
    method="uniform",
    seed=-5,
    method_options=MethodOptions(k=2.5),
    data=DataConfig(source="/some/where", image_shape=(3, 32, 16)),
    evaluation=EvaluationConfig(inception_weights=Path("/w.pth")),
)


@pytest.mark.parametrize("config", [TrainConfig(), UNUSUAL])
def test_json_gives_back_the_configuration(config):
    assert from_json(to_json(config)) == config


def test_every_field_is_documented_in_the_source():
    """The text under a field is its help on the command line."""
    package = Path(__file__).parent.parent / "speed_engine"
    text = "".join((package / f"{name}.py").read_text() for name in ("config", "model_config"))
    for cls in (TrainConfig, DataConfig, EvaluationConfig, DiTConfig, OptimizerConfig):
        for field in dataclasses.fields(cls):
            if not dataclasses.is_dataclass(field.type) and "Config" not in str(field.type):
                declared = text.index(f"    {field.name}: ", text.index(f"class {cls.__name__}"))
                following = text[declared:].split("\n", 4)[1:4]
                assert any('"""' in line or "field(" in line for line in following), field.name


def test_unknown_fields_are_named():
    values = json.loads(to_json(TrainConfig()))
    values["optimizer"]["learning_rat"] = 1
    with pytest.raises(ValueError, match=r"config.optimizer has unknown fields \['learning_rat'\]"):
        from_json(json.dumps(values))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: TrainConfig(steps=0), "steps=0: must be at least 1"),
        (
            lambda: TrainConfig(condition_dropout=1.5),
            r"condition_dropout=1.5: is a share in \[0, 1\]",
        ),
        (lambda: TrainConfig(seed=2**63), "signed 64-bit"),
        (lambda: DiTConfig(depth=0), "model.depth=0: must be positive"),
        (lambda: DataConfig(workers=-1), "data.workers=-1"),
        (lambda: OptimizerConfig(ema_decay=1.0), r"ema_decay=1.0: must lie in \[0, 1\)"),
        (lambda: OptimizerConfig(learning_rate=0), "learning_rate=0: must be positive"),
        (
            lambda: TrainConfig(num_timesteps=10),
            "evaluation.solver_steps=25: must be at most num_timesteps=10",
        ),
        (
            lambda: TrainConfig(condition_dropout=0, evaluation=EvaluationConfig(guidance=2)),
            "evaluation.guidance=2: guidance needs a model",
        ),
    ],
)
def test_values_out_of_range_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
