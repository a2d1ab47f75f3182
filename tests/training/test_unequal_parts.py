"""A mean over parts of unequal size is that of the whole, wherever there is one."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fault_harness as harness
from speed_engine.build import build_evaluator, build_model, build_process
from speed_engine.config import TrainConfig
from speed_engine.evaluation.config import EvaluationConfig
from speed_engine.models.config import DiTConfig
from speed_engine.runtime.records import IntervalMean, Sums, read_records
from speed_engine.runtime.world import World

STEPS = 4
RUN = (
    f"digits --steps {STEPS} --batch-size 24 --log-every 3 --model.dim 16 --model.depth 1 "
    f"--model.num-heads 2 --evaluation.every {STEPS} --evaluation.num-images 67 "
    "--evaluation.features classifier --evaluation.metrics fid --evaluation.solver-steps 2 "
    "--optimizer.warmup-steps 2 --checkpoint-every 100 --parallel fsdp"
).split()


@given(
    values=st.lists(st.tuples(st.floats(-4, 4, width=16), st.booleans()), min_size=1, max_size=40),
    cuts=st.sets(st.integers(0, 39)),
)
def test_the_mean_of_an_interval_is_over_its_steps_however_often_it_is_put_aside(values, cuts):
    means = IntervalMean(("loss",), torch.device("cpu"))
    for i, (value, skipped) in enumerate(values):
        bad = math.nan if skipped else value
        means.add(torch.tensor([bad]), torch.tensor(float(skipped)))
        if i in cuts:  # a checkpoint, and the resumed run
            state = means.state()
            means = IntervalMean(("loss",), torch.device("cpu"))
            means.load_state(Sums(**json.loads(json.dumps(dataclasses.asdict(state)))))
    kept = [value for value, skipped in values if not skipped]
    expected = np.mean(kept) if kept else math.nan
    assert means.read()["loss"] == pytest.approx(expected, abs=1e-5, nan_ok=True)


class Alone(World):
    """One of several processes that run one after the other."""

    def gather_on_host(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor


@settings(max_examples=15)
@given(count=st.integers(1, 11), size=st.integers(1, 4))
def test_processes_generate_each_image_of_an_evaluation_once(count, size):
    config = TrainConfig(
        model=DiTConfig(dim=16, depth=1, num_heads=2),
        evaluation=EvaluationConfig(num_images=count, features="none", solver_steps=2),
    )
    model, process = build_model(config), build_process(config)
    whole = build_evaluator(config, process)
    made = [dataclasses.replace(whole, world=Alone(r, size)).generate(model) for r in range(size)]
    assert torch.allclose(torch.cat(made)[:count], whole.generate(model), atol=1e-5)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """One process, batches whole."""
    return trained(tmp_path_factory.mktemp("whole") / "run", 1)


def trained(run, world, *options):
    training = harness.Training(run, [*RUN, *options, "--run", str(run)], world)
    assert training.join(300) == [0] * world, training.said()
    return read_records(run), harness.parameters(run)


@pytest.mark.parametrize("world, microbatch_size", [(1, 7), (2, 5), (3, 3), (4, 4)])
def test_processes_and_microbatches_of_any_size_train_and_measure_as_the_whole(
    tmp_path, whole, world, microbatch_size
):
    records, tensors = trained(tmp_path / "run", world, "--microbatch-size", str(microbatch_size))
    assert len(records) == len(whole[0]) == 3  # an interval of three steps, one of one, the FID
    for ours, theirs in zip(records, whole[0], strict=True):
        for name in ("step", "loss", "squared_error", "grad_norm", "fid"):
            if name in theirs:
                assert ours[name] == pytest.approx(theirs[name], rel=2e-4), name
    for name, tensor in tensors.items():
        assert torch.allclose(tensor, whole[1][name], atol=2e-4), name
    harness.kill_all()
