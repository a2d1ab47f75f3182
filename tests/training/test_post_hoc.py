"""Averages that were not kept, from those that were."""

from dataclasses import replace

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from speed_engine.config import TrainConfig
from speed_engine.evaluation.config import EvaluationConfig
from speed_engine.models.config import DiTConfig
from speed_engine.run import starting
from speed_engine.run.averages import load_average
from speed_engine.runtime.checks import UserError
from speed_engine.training.config import OptimizerConfig
from speed_engine.training.ema import Ema, power
from speed_engine.training.post_hoc import combination

TRUE = torch.tensor(True)


def profiles(
    exponents: list[float], steps: int, kept: list[int]
) -> dict[tuple[int, float], Tensor]:
    """What averages weigh the parameters of each step by, as training makes them.

    The model's number t is 1 after step t, and 0 after others.
    """
    model = nn.Linear(steps, 1, bias=False)
    nn.init.zeros_(model.weight)
    averages = {exponent: Ema(model, power(exponent)) for exponent in exponents}
    found = {}
    for step in range(1, steps + 1):
        with torch.no_grad():
            model.weight.zero_()
            model.weight[0, step - 1] = 1
        for exponent, average in averages.items():
            average.update(step, TRUE)
            if step in kept:
                found[step, exponent] = average.model.get_parameter("weight")[0].double().clone()
    return found


@pytest.mark.parametrize("exponent", [5.0, 10.0, 16.0])
@pytest.mark.parametrize("count, bound", [(8, 0.02), (40, 0.008)])
def test_a_reconstructed_average_is_the_tracked_one(exponent, count, bound):
    steps = 1000
    (truth,) = profiles([exponent], steps, [steps]).values()
    stored = profiles([6.94, 16.97], steps, [steps * (i + 1) // count for i in range(count)])
    weights, estimate = combination([*stored], steps, exponent)
    found = weights @ torch.stack([*stored.values()])
    error = (found - truth).norm() / truth.norm()
    nearest = min((profile - truth).norm() / truth.norm() for profile in stored.values())
    assert error < bound and error < nearest / 4
    assert estimate == pytest.approx(float(error), abs=0.01)
    assert float(found.sum()) == pytest.approx(1, abs=5e-3)


def test_an_average_that_was_kept_is_itself():
    stored = [(100, 6.94), (100, 16.97), (200, 6.94), (200, 16.97)]
    expected = torch.tensor([0.0, 0.0, 1.0, 0.0], dtype=torch.float64)
    weights, error = combination(stored, 200, 6.94)
    torch.testing.assert_close(weights, expected, atol=1e-9, rtol=0)
    assert error < 1e-6


def test_inner_products_are_those_of_the_profiles():
    from speed_engine.training.post_hoc import _products

    pairs = torch.tensor([(200.0, 3.0), (500.0, 7.0)], dtype=torch.float64)
    t = (torch.arange(500_000, dtype=torch.float64) + 0.5) / 1000
    both = [torch.where(t <= s, (g + 1) * t**g / s ** (g + 1), 0.0) for s, g in pairs.tolist()]
    expected = torch.stack([torch.stack([(p * q).sum() / 1000 for q in both]) for p in both])
    torch.testing.assert_close(_products(pairs, pairs), expected, rtol=1e-4, atol=0)


def test_a_run_s_average_of_another_length_is_made_of_those_it_kept(tmp_path):
    averages = ("power=6.94", "power=16.97")
    config = TrainConfig(
        steps=60, batch_size=4, checkpoint_every=10, keep_checkpoints=6, device="cpu",
        model=DiTConfig(dim=16, depth=1, num_heads=2),
        optimizer=OptimizerConfig(averages=(*averages, "power=10"), learning_rate=0.01),
        evaluation=EvaluationConfig(every=60, num_images=4, solver_steps=2, features="none"),
    )  # fmt: skip
    folder = tmp_path / "run"
    starting.start(config, folder, Console(quiet=True))
    tracked, _ = load_average(folder, config, torch.device("cpu"), "power=10")
    without = replace(config, optimizer=replace(config.optimizer, averages=averages))
    (folder / "checkpoints" / "step-00000005").mkdir()  # left by a run that was killed
    found, kept = (
        load_average(folder, without, torch.device("cpu"), name)[0].state_dict()
        for name in ("power=9.5", "power=6.94")
    )
    compared = 0
    for name, value in tracked.state_dict().items():
        if value.is_floating_point() and not torch.equal(value, kept[name]):
            away = (kept[name] - value).norm()
            assert (found[name] - value).norm() < away / 2, name
            compared += 1
    assert compared > 0
    one = replace(config, optimizer=OptimizerConfig(averages=("power=6.94",)))
    (folder / "checkpoints").joinpath("others").mkdir()
    for path in sorted((folder / "checkpoints").glob("step-*"))[:-1]:
        path.rename(folder / "checkpoints" / "others" / path.name)
    with pytest.raises(UserError, match=r"power=50 cannot be made of .* \(power=6.94 of step 60\)"):
        load_average(folder, one, torch.device("cpu"), "power=50")
    plain = replace(config, optimizer=OptimizerConfig())
    with pytest.raises(UserError, match=r"no EMA 'power=9.5'; this run keeps ema"):
        load_average(folder, plain, torch.device("cpu"), "power=9.5")
