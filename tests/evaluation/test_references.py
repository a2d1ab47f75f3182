"""Real images come from the data set that is trained on, and from one that never is."""

from pathlib import Path

import pytest

from speed_engine.build import build_evaluator, build_process, build_validation
from speed_engine.config import TrainConfig
from speed_engine.data.config import DataConfig
from speed_engine.data.format.reader import ShardReader
from speed_engine.data.format.writer import ShardWriter
from speed_engine.data.opening import open_data
from speed_engine.data.preparing.sources.digits import digits_folder
from speed_engine.evaluation.config import EvaluationConfig
from speed_engine.runtime.checks import UserError


@pytest.fixture
def some_digits(tmp_path: Path) -> Path:
    """Shards of 300 digits."""
    reader = ShardReader(digits_folder(), ("npy", "cls"))
    with ShardWriter(tmp_path / "test", "x", 100) as writer:
        for i in range(0, 1500, 5):
            writer.write(f"{i:05d}", reader.read(i))
    return tmp_path / "test"


def test_a_test_data_set_is_the_held_out_part_and_nothing_is_taken_from_training(some_digits):
    data = DataConfig(test_source=str(some_digits))
    config = TrainConfig(
        device="cpu",
        data=data,
        evaluation=EvaluationConfig(num_images=100, metrics=("fid", "copies", "loss")),
    )
    assert len(open_data(data)) == len(open_data(data, part=None)) == 1797
    assert len(open_data(data, part="held_out")) == 300
    process = build_process(config)
    evaluator = build_evaluator(config, process)
    assert evaluator.training is not None and len(evaluator.training) == 1797
    assert evaluator.held_out is not None and len(evaluator.held_out) == 300
    assert {"held_out_fid", "copied_share", "validation_loss"} <= evaluator.fields()
    validation = build_validation(config, process)
    assert len(validation._batch.ids) == 300


def test_two_ways_of_holding_out_are_one_too_many():
    with pytest.raises(UserError, match=r"data\.test_source=other holds images out already"):
        DataConfig(test_source="other", held_out=0.1)
